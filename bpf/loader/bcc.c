// SPDX-License-Identifier: Apache-2.0
#include "bcc.h"

#include "host.h"
#include "networks.h"
#include "objects.h"
#include "say.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

/* Of the distribution, since its python3-bpfcc is for no other. */
#define PYTHON "/usr/bin/python3"

#define HELPER_LOOKS_EVERY_US 1000000

struct shape {
	const char *name;
	enum bpf_map_type type;
	unsigned int key_bytes, value_bytes, room, flags;
};

/* Make and pin what is not there. 0, or 1 after saying why not. */
static int make_map(const struct pins *pins, const struct shape *shape)
{
	LIBBPF_OPTS(bpf_map_create_opts, options, .map_flags = shape->flags);
	const struct map_pin *pin = pin_of(shape->name);
	const char *path = pin_path(pins, shape->name);
	int map, failed;

	/* What is no part of the layout is scratch; the next programs may have another idea of it. */
	if (!pin)
		unlink(path);
	else if (access(path, F_OK) == 0)
		return 0;
	map = bpf_map_create(shape->type, shape->name, shape->key_bytes, shape->value_bytes, shape->room, &options);
	if (map < 0)
		return fail("map %s: %s", shape->name, strerror(errno));
	failed = bpf_obj_pin(map, path) ? fail("%s: %s", path, strerror(errno))
					: hand_to_group(pins, path, pin ? pin->mode : 0600);
	close(map);
	return failed;
}

/* The maps that an object of engine core declares, bar those for its own per-CPU arithmetic. */
static int make_maps_of(const struct pins *pins, const char *name, const struct load_options *options)
{
	const struct object *embedded = object_named(name);
	LIBBPF_OPTS(bpf_object_open_opts, named, .object_name = name);
	struct bpf_object *object = bpf_object__open_mem(embedded->begin, embedded->end - embedded->begin, &named);
	struct bpf_map *map;
	int failed = 0;

	if (!object)
		return fail("%s: %s", name, last_reason());
	bpf_object__for_each_map(map, object) {
		struct shape shape = {bpf_map__name(map),	bpf_map__type(map),	   bpf_map__key_size(map),
				      bpf_map__value_size(map), bpf_map__max_entries(map), bpf_map__map_flags(map)};
		unsigned int room = room_for(shape.name, options);

		if (bpf_map__is_internal(map) || strcmp(shape.name, "here") == 0)
			continue;
		if (room)
			shape.room = room;
		failed |= make_map(pins, &shape);
	}
	bpf_object__close(object);
	return failed;
}

static int make_maps(const struct pins *pins, const struct load_options *options)
{
	const struct shape paths = {"paths",
				    BPF_MAP_TYPE_HASH,
				    WB_PATH_BYTES,
				    sizeof(struct wb_place),
				    room_for("paths", options),
				    BPF_F_NO_PREALLOC};

	return make_maps_of(pins, "lifecycle", options) || make_maps_of(pins, "network", options) || make_map(pins, &paths) ||
	       fill_classes(pins, options->networks);
}

/* The lock on the set is held by its helper as long as it lives. A descriptor that outlives exec, or -1 after saying why not. */
static int lock_set(const struct pins *pins)
{
	int set = open(pins->set, O_RDONLY | O_DIRECTORY);

	if (set < 0) {
		say("%s: %s", pins->set, strerror(errno));
	} else if (flock(set, LOCK_EX | LOCK_NB)) {
		say("%s: its helper is running: end it first (systemctl restart weighbridge-probes does)", pins->set);
		close(set);
		set = -1;
	}
	return set;
}

static int run_helper(const struct pins *pins, const struct bcc_options *bcc, const char *cgroup_root)
{
	char lock[16];
	const char *words[20] = {PYTHON, "-IB", bcc->helper, "--set", pins->set, "--cgroup-root", cgroup_root, "--version", WB_VERSION,
				 "--lock", lock};
	size_t count = 11;

	snprintf(lock, sizeof(lock), "%d", pins->lock);
	if (bcc->verbose)
		words[count++] = "--verbose";
	if (bcc->accept_foreign_headers)
		words[count++] = "--for-tests-only-accept-foreign-headers";
	if (bcc->hold_tracepoints)
		words[count++] = "--for-tests-only-hold-tracepoints";
	if (access(bcc->helper, R_OK) || fcntl(pins->lock, F_SETFD, 0))
		return fail("%s: %s", bcc->helper, strerror(errno));
	execv(PYTHON, (char *const *)words);
	return fail("%s: %s: apt-get install python3 python3-bpfcc", PYTHON, strerror(errno));
}

int become_bcc_helper(struct pins *pins, const struct load_options *load, const struct bcc_options *bcc)
{
	struct wb_about about = {};
	enum pin_state state = look(pins, &about);
	char cgroup_root[PIN_PATH];

	if (state == SET_FOREIGN)
		return fail("%s holds what is not ours or of another version: `weighbridge-probes unload`, then load", pins->set);
	if (state == SET_READY && about.engine != WB_ENGINE_BCC && !load->replace)
		return fail("engine core is loaded, and knows more: `weighbridge-probes upgrade --engine bcc` replaces it all the same");
	if (find_cgroup2(cgroup_root, sizeof(cgroup_root)))
		return 1;
	if (state == SET_UNFINISHED && remove_set(pins))
		return 1;
	if (state != SET_READY && (mkdir(pins->set, 0750) || hand_to_group(pins, pins->set, 0750)))
		return fail("%s: %s", pins->set, strerror(errno));
	if (lock_set(pins) < 0)
		return 1;
	if (!make_maps(pins, load))
		run_helper(pins, bcc, cgroup_root);
	if (state != SET_READY)
		remove_set(pins);
	return 1;
}

void remove_bcc_pins(const struct pins *pins)
{
	static const char *const names[] = {"paths", "new_birth", "new_tombstone", "recent_peers"};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		unlink(pin_path(pins, names[i]));
}

int wait_for_bcc_helper(int set)
{
	for (int tenths = 0; tenths < 50; tenths++) {
		if (flock(set, LOCK_EX | LOCK_NB) == 0)
			return 0;
		usleep(HELPER_LOOKS_EVERY_US / 10);
	}
	return fail("the helper of engine bcc is still running: systemctl stop weighbridge-probes");
}
