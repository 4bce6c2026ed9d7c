// SPDX-License-Identifier: Apache-2.0
#include "status.h"

#include "pins.h"
#include "say.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <bpf/bpf.h>

static const char *const engines[] = {"none", "core", "bcc"};
static const char *const walks[] = {"none", "css", "iterator", "table"};

static const struct {
	const char *name;
	size_t at;
} overflow_kinds[] = {
	{"births", offsetof(struct wb_overflow, births)},
	{"tombstones", offsetof(struct wb_overflow, tombstones)},
	{"tombstones_cpu_ns", offsetof(struct wb_overflow, tombstones_cpu_ns)},
	{"network_skbs", offsetof(struct wb_overflow, network_skbs)},
	{"network_bytes", offsetof(struct wb_overflow, network_bytes)},
	{"snapshot_rows", offsetof(struct wb_overflow, snapshot_rows)},
	{"wakes", offsetof(struct wb_overflow, wakes)},
	{"paths_cut", offsetof(struct wb_overflow, paths_cut)},
};

static const char *const hashes[] = {"births", "tombstones", "network", "classes"};

/* Element 0 of an array; 0 or -1. */
static int read_one(const struct pins *pins, const char *name, void *value)
{
	LIBBPF_OPTS(bpf_obj_get_opts, read_only, .file_flags = BPF_F_RDONLY);
	unsigned int zero = 0;
	int map = bpf_obj_get_opts(pin_path(pins, name), &read_only), failed;

	if (map < 0)
		return -1;
	failed = bpf_map_lookup_elem(map, &zero, value);
	close(map);
	return failed;
}

/* Elements of a hash, and room for how many; -1 if it is not there. */
static long count(const struct pins *pins, const char *name, unsigned int *room)
{
	LIBBPF_OPTS(bpf_obj_get_opts, read_only, .file_flags = BPF_F_RDONLY);
	int map = bpf_obj_get_opts(pin_path(pins, name), &read_only);
	struct bpf_map_info info = {};
	unsigned int size = sizeof(info);
	unsigned char key[sizeof(struct wb_prefix)], next[sizeof(struct wb_prefix)];
	long elements = 0;

	if (map < 0)
		return -1;
	if (bpf_obj_get_info_by_fd(map, &info, &size) || info.key_size > sizeof(key)) {
		close(map);
		return -1;
	}
	*room = info.max_entries;
	/* A key that goes away meanwhile begins the walk anew, so the room bounds it. */
	for (int first = 1; elements < *room && bpf_map_get_next_key(map, first ? NULL : key, next) == 0; first = 0) {
		memcpy(key, next, info.key_size);
		elements++;
	}
	close(map);
	return elements;
}

static const char *word(const char *const *words, size_t count, unsigned int at)
{
	return at < count ? words[at] : "unknown";
}

int print_status(const char *directory, bool json)
{
	struct pins pins = {};
	struct wb_about about = {};
	struct wb_overflow overflow = {};
	const char *before = "";
	unsigned int room;

	snprintf(pins.directory, sizeof(pins.directory), "%s", directory);
	snprintf(pins.set, sizeof(pins.set), "%s/v%d", directory, WB_LAYOUT);
	if (access(pins.set, X_OK) && errno != ENOENT)
		return fail("%s: %s: ask as root or as a member of its group", pins.set, strerror(errno));
	switch (look(&pins, &about)) {
	case SET_READY:
		break;
	case SET_FOREIGN:
		return 1;
	default:
		puts(json ? "{\"loaded\": false}" : "nothing is loaded: weighbridge-probes load");
		return 3;
	}
	if (read_one(&pins, "overflow", &overflow))
		return fail("%s: %s", pin_path(&pins, "overflow"), strerror(errno));
	printf(json ? "{\"loaded\": true, \"version\": \"%s\", \"engine\": \"%s\", \"lifecycle\": %s, \"network\": %s, "
		      "\"walk\": \"%s\", \"maps\": {"
		    : "version %s, engine %s: lifecycle %s, network %s, walk %s\n",
	       about.version, word(engines, 3, about.engine),
	       about.has & WB_HAS_LIFECYCLE ? (json ? "true" : "yes") : (json ? "false" : "no"),
	       about.has & WB_HAS_NETWORK ? (json ? "true" : "yes") : (json ? "false" : "no"), word(walks, 4, about.walk));
	for (size_t i = 0; i < sizeof(hashes) / sizeof(hashes[0]); i++) {
		long elements = count(&pins, hashes[i], &room);

		if (elements < 0)
			continue;
		if (json)
			printf("%s\"%s\": {\"elements\": %ld, \"room\": %u}", before, hashes[i], elements, room);
		else
			printf("%-12s %7ld of %u\n", hashes[i], elements, room);
		before = ", ";
	}
	fputs(json ? "}, \"overflow\": {" : "not stored:", stdout);
	for (size_t i = 0; i < sizeof(overflow_kinds) / sizeof(overflow_kinds[0]); i++)
		printf(json ? "%s\"%s\": %llu" : "%s %s %llu", json ? (i ? ", " : "") : (i ? "," : ""), overflow_kinds[i].name,
		       *(unsigned long long *)((char *)&overflow + overflow_kinds[i].at));
	puts(json ? "}}" : "");
	return 0;
}
