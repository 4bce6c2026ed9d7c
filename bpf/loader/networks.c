// SPDX-License-Identifier: Apache-2.0
#include "networks.h"

#include "pins.h"
#include "say.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <bpf/bpf.h>

#define MAX_NETWORKS 1024
#define IPV4_BITS_BEFORE 96

static const char *const private_networks[] = {
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "fc00::/7", "fe80::/10",
};

struct network {
	struct wb_prefix prefix;
	unsigned int class;
};

struct networks {
	struct network list[MAX_NETWORKS];
	size_t count;
};

/* NULL, or what is wrong with it. */
static const char *parse(char *text, struct network *network)
{
	struct wb_prefix *prefix = &network->prefix;
	unsigned int most, before;
	char *slash, *end;
	unsigned long bits;

	memset(network, 0, sizeof(*network));
	network->class = WB_INTERNAL;
	if (*text == '!') {
		network->class = WB_EXTERNAL;
		text += 1 + strspn(text + 1, " \t");
	}
	slash = strchr(text, '/');
	if (slash)
		*slash = 0;
	if (inet_pton(AF_INET, text, prefix->address + 12) == 1) {
		prefix->address[10] = prefix->address[11] = 0xff;
		most = 32;
		before = IPV4_BITS_BEFORE;
	} else if (inet_pton(AF_INET6, text, prefix->address) == 1) {
		most = 128;
		before = 0;
	} else {
		return "is no IPv4 or IPv6 address";
	}
	bits = slash ? strtoul(slash + 1, &end, 10) : most;
	if (slash && (slash[1] < '0' || slash[1] > '9' || *end || bits > most))
		return most == 32 ? "needs a prefix length of 0 to 32" : "needs a prefix length of 0 to 128";
	prefix->bits = before + bits;
	for (unsigned int bit = prefix->bits; bit < 128; bit++)
		if (prefix->address[bit / 8] & (0x80 >> bit % 8))
			return "has bits behind its prefix length";
	return NULL;
}

static int read_file(const char *path, struct networks *networks)
{
	char text[256], kept[256];
	int number = 0, failed = 0;
	FILE *file = fopen(path, "re");

	if (!file)
		return fail("%s: %s", path, strerror(errno));
	while (fgets(text, sizeof(text), file)) {
		const char *wrong;
		char *begin;

		number++;
		text[strcspn(text, "#\n")] = 0;
		begin = text + strspn(text, " \t\r");
		for (size_t n = strlen(begin); n && strchr(" \t\r", begin[n - 1]); n--)
			begin[n - 1] = 0;
		if (!*begin)
			continue;
		strcpy(kept, begin);
		wrong = networks->count == MAX_NETWORKS ? "is one more than the 1024 that fit"
							 : parse(begin, &networks->list[networks->count]);
		if (wrong)
			failed = fail("%s:%d: %s %s", path, number, kept, wrong);
		else
			networks->count++;
	}
	fclose(file);
	return failed;
}

static bool wanted(const struct networks *networks, const struct wb_prefix *prefix)
{
	for (size_t i = 0; i < networks->count; i++)
		if (memcmp(&networks->list[i].prefix, prefix, sizeof(*prefix)) == 0)
			return true;
	return false;
}

static int set_networks(int classes, int changes, const char *file)
{
	static struct networks networks;
	unsigned int zero = 0, changed = 0;
	struct wb_prefix key, next;
	bool more;

	networks.count = 0;
	if (file && read_file(file, &networks))
		return 1;
	for (size_t i = 0; !file && i < sizeof(private_networks) / sizeof(private_networks[0]); i++) {
		char text[64];

		strcpy(text, private_networks[i]);
		parse(text, &networks.list[networks.count++]);
	}
	for (size_t i = 0; i < networks.count; i++)
		if (bpf_map_update_elem(classes, &networks.list[i].prefix, &networks.list[i].class, BPF_ANY))
			return fail("map classes: %s", strerror(errno));
	/* A key that was deleted has no next: the next is looked up first. */
	more = bpf_map_get_next_key(classes, NULL, &key) == 0;
	while (more) {
		more = bpf_map_get_next_key(classes, &key, &next) == 0;
		if (!wanted(&networks, &key))
			bpf_map_delete_elem(classes, &key);
		key = next;
	}
	bpf_map_lookup_elem(changes, &zero, &changed);
	changed++;
	if (bpf_map_update_elem(changes, &zero, &changed, BPF_ANY))
		return fail("map class_changes: %s", strerror(errno));
	return 0;
}

enum change { WHERE_EMPTY, ALWAYS };

/* set_networks on what is pinned; `fix` is said where it is not. */
static int change_pinned(const struct pins *pins, const char *file, enum change when, const char *fix)
{
	int classes = bpf_obj_get(pin_path(pins, "classes")), changes = bpf_obj_get(pin_path(pins, "class_changes"));
	struct wb_prefix any;
	int failed = 0;

	if (classes < 0 || changes < 0)
		failed = fail("%s: %s%s", pin_path(pins, "classes"), strerror(errno), fix);
	else if (when == ALWAYS || bpf_map_get_next_key(classes, NULL, &any))
		failed = set_networks(classes, changes, file);
	if (classes >= 0)
		close(classes);
	if (changes >= 0)
		close(changes);
	return failed;
}

int fill_classes(const struct pins *pins, const char *file)
{
	return change_pinned(pins, file, file ? ALWAYS : WHERE_EMPTY, "");
}

int change_networks(const struct pins *pins, const char *file)
{
	return change_pinned(pins, file, ALWAYS, ": weighbridge-probes load");
}
