// SPDX-License-Identifier: Apache-2.0
#include "set.h"

#include "bcc.h"
#include "host.h"
#include "objects.h"
#include "say.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>

#include "networks.h"

/* One concern, and what to do when it is refused. */
struct concern {
	const char *name, *without_it;
	unsigned int has;
};

static const struct concern lifecycle = {"lifecycle", "ends of containers are not captured", WB_HAS_LIFECYCLE};
static const struct concern network = {"network", "network traffic is not counted", WB_HAS_NETWORK};

static const struct walk {
	const char *option, *object;
	enum wb_walk kind;
} walks[] = {
	{"css", "walk_css", WB_WALK_CSS},
	{"css", "walk_css_before_6_16", WB_WALK_CSS},
	{"iterator", "walk_iterator", WB_WALK_CGROUP_ITERATOR},
	{"iterator", "walk_iterator_before_6_16", WB_WALK_CGROUP_ITERATOR},
	{"table", "walk_table", WB_WALK_TABLE},
};

static unsigned long long boottime_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

unsigned int room_for(const char *map, const struct load_options *options)
{
	if (strcmp(map, "snapshot") == 0)
		return 1 + (options->max_cgroups + WB_ROWS_IN_ELEMENT - 1) / WB_ROWS_IN_ELEMENT;
	if (strcmp(map, "births") == 0 || strcmp(map, "table") == 0 || strcmp(map, "paths") == 0)
		return options->max_cgroups;
	if (strcmp(map, "tombstones") == 0)
		return options->max_ended;
	/* Ended cgroups keep their traffic until the agent has read it. */
	if (strcmp(map, "network") == 0)
		return options->max_cgroups + options->max_ended;
	return 0;
}

/* Constants of the programs and the size of new maps; maps that are pinned already are used again. 0 or -errno. */
static int prepare(const struct pins *pins, struct bpf_object *object, const struct load_options *options)
{
	struct bpf_map *map;

	bpf_object__for_each_map(map, object) {
		const char *name = bpf_map__name(map);

		if (pin_of(name)) {
			int pinned = bpf_obj_get(pin_path(pins, name));
			int failed = pinned < 0 ? 0 : bpf_map__reuse_fd(map, pinned);

			if (pinned >= 0)
				close(pinned);
			else if (room_for(name, options))
				failed = bpf_map__set_max_entries(map, room_for(name, options));
			if (failed)
				return failed;
		} else if (strstr(name, ".rodata.host")) {
			const struct wb_host host = {libbpf_num_possible_cpus(), sysconf(_SC_PAGESIZE)};
			int failed = bpf_map__set_initial_value(map, &host, sizeof(host));

			if (failed)
				return failed;
		}
	}
	return 0;
}

static struct bpf_object *open_and_load(const struct pins *pins, const char *name, const struct load_options *options)
{
	const struct object *embedded = object_named(name);
	/* Given the path, libbpf looks for types in the kernel's own BTF only; modules' would need CAP_SYS_ADMIN. */
	LIBBPF_OPTS(bpf_object_open_opts, named, .object_name = name, .btf_custom_path = "/sys/kernel/btf/vmlinux");
	struct bpf_object *object = bpf_object__open_mem(embedded->begin, embedded->end - embedded->begin, &named);

	if (!object)
		return NULL;
	if (prepare(pins, object, options) || bpf_object__load(object)) {
		bpf_object__close(object);
		return NULL;
	}
	return object;
}

static int pin_maps(const struct pins *pins, struct bpf_object *object)
{
	struct bpf_map *map;

	bpf_object__for_each_map(map, object) {
		const struct map_pin *pin = pin_of(bpf_map__name(map));
		const char *path;

		if (!pin)
			continue;
		path = pin_path(pins, pin->name);
		if (bpf_obj_pin(bpf_map__fd(map), path)) {
			if (errno == EEXIST)
				continue;
			return fail("%s: %s", path, strerror(errno));
		}
		if (hand_to_group(pins, path, pin->mode))
			return 1;
	}
	return 0;
}

/* Pin beside the pin that may be there, then take its place: at every instant one of the two is attached. 0 or 1. */
static int pin_link(const struct pins *pins, struct bpf_link *link, const char *name, mode_t mode)
{
	char fresh[64];

	snprintf(fresh, sizeof(fresh), "%s_new", name);
	unlink(pin_path(pins, fresh));
	if (bpf_link__pin(link, pin_path(pins, fresh)))
		return fail("%s: %s", pin_path(pins, fresh), strerror(errno));
	if (hand_to_group(pins, pin_path(pins, fresh), mode) || rename(pin_path(pins, fresh), pin_path(pins, name)))
		return fail("%s: %s", pin_path(pins, name), strerror(errno));
	return 0;
}

/* A tracepoint: both programs see the events in between, and write the same record twice. */
static int attach_tracepoint(const struct pins *pins, struct bpf_program *program)
{
	char name[64];
	struct bpf_link *link = bpf_program__attach(program);
	int failed;

	if (!link)
		return 1;
	snprintf(name, sizeof(name), "link_%s", bpf_program__name(program));
	failed = pin_link(pins, link, name, 0600);
	bpf_link__destroy(link);
	return failed;
}

/* The kernel exchanges the program of a cgroup link at once: each skb is counted by exactly one of the two. */
static int attach_to_cgroup(const struct pins *pins, struct bpf_program *program, int cgroup)
{
	struct bpf_link *link;
	char name[64];
	int there, failed;

	snprintf(name, sizeof(name), "link_%s", bpf_program__name(program));
	there = bpf_obj_get(pin_path(pins, name));
	if (there >= 0) {
		failed = bpf_link_update(there, bpf_program__fd(program), NULL);
		close(there);
		return failed ? 1 : 0;
	}
	link = bpf_program__attach_cgroup(program, cgroup);
	if (!link)
		return 1;
	failed = pin_link(pins, link, name, 0600);
	bpf_link__destroy(link);
	return failed;
}

/* percpu.bpf.h. On every CPU, since older kernels can only learn where they are. */
static int learn_cpus(struct bpf_object *object)
{
	struct bpf_program *program = bpf_object__find_program_by_name(object, "learn_offsets");
	int cpus = libbpf_num_possible_cpus(), learned = 0;

	for (int cpu = 0; program && cpu < cpus; cpu++) {
		LIBBPF_OPTS(bpf_test_run_opts, on_cpu, .flags = BPF_F_TEST_RUN_ON_CPU, .cpu = cpu);

		/* A CPU that is offline refuses. */
		learned += bpf_prog_test_run_opts(bpf_program__fd(program), &on_cpu) == 0;
	}
	return program && !learned ? 1 : 0;
}

static int attach_all(const struct pins *pins, struct bpf_object *object, int cgroup)
{
	struct bpf_program *program;

	bpf_object__for_each_program(program, object) {
		switch (bpf_program__type(program)) {
		case BPF_PROG_TYPE_CGROUP_SKB:
			if (attach_to_cgroup(pins, program, cgroup))
				return 1;
			break;
		case BPF_PROG_TYPE_TRACING:
			if (bpf_program__expected_attach_type(program) == BPF_TRACE_RAW_TP &&
			    attach_tracepoint(pins, program))
				return 1;
			break;
		default:
			break;
		}
	}
	return 0;
}

/* `has` of what could be loaded, 0 otherwise. */
static unsigned int load_concern(const struct pins *pins, const struct concern *concern, int cgroup,
				 const struct load_options *options)
{
	struct bpf_object *object;
	unsigned int has = 0;

	last_reason();
	object = open_and_load(pins, concern->name, options);
	if (object && !learn_cpus(object) && !pin_maps(pins, object) &&
	    (concern->has != WB_HAS_NETWORK || !fill_classes(pins, options->networks)) && !attach_all(pins, object, cgroup))
		has = concern->has;
	else
		say("%s: the kernel refuses it, so %s (%s)", concern->name, concern->without_it, last_reason());
	bpf_object__close(object);
	return has;
}

static int pin_iterator(const struct pins *pins, struct bpf_object *object, int cgroup, enum wb_walk kind)
{
	struct bpf_program *program = bpf_object__find_program_by_name(object, "walk");
	union bpf_iter_link_info info = {};
	LIBBPF_OPTS(bpf_iter_attach_opts, options, .link_info = &info, .link_info_len = sizeof(info));
	struct bpf_link *link;
	int failed;

	if (kind == WB_WALK_CGROUP_ITERATOR) {
		info.cgroup.cgroup_fd = cgroup;
		info.cgroup.order = BPF_CGROUP_ITER_DESCENDANTS_PRE;
	} else if (kind == WB_WALK_TABLE) {
		info.map.map_fd = bpf_map__fd(bpf_object__find_map_by_name(object, "table"));
	}
	link = bpf_program__attach_iter(program, &options);
	if (!link)
		return 1;
	failed = pin_link(pins, link, "walk", 0440);
	bpf_link__destroy(link);
	return failed;
}

/* Cgroups that were there before the table. */
static int fill_table(struct bpf_object *object)
{
	struct bpf_program *program = bpf_object__find_program_by_name(object, "table_fill");
	struct bpf_link *link;
	char nothing[64];
	int iterator;

	if (!program)
		return 0;
	link = bpf_program__attach_iter(program, NULL);
	if (!link)
		return 1;
	iterator = bpf_iter_create(bpf_link__fd(link));
	while (iterator >= 0 && read(iterator, nothing, sizeof(nothing)) > 0)
		;
	if (iterator >= 0)
		close(iterator);
	bpf_link__destroy(link);
	return iterator < 0;
}

static enum wb_walk load_walk(const struct pins *pins, int cgroup, const struct load_options *options)
{
	char first_reason[256] = "";
	struct bpf_object *object;

	for (size_t i = 0; i < sizeof(walks) / sizeof(walks[0]); i++) {
		const struct walk *walk = &walks[i];

		if (strcmp(options->walk, "auto") != 0 && strcmp(options->walk, walk->option) != 0)
			continue;
		last_reason();
		object = open_and_load(pins, walk->object, options);
		if (object && !pin_maps(pins, object) && !attach_all(pins, object, cgroup) && !fill_table(object) &&
		    !pin_iterator(pins, object, cgroup, walk->kind)) {
			bpf_object__close(object);
			return walk->kind;
		}
		bpf_object__close(object);
		if (!first_reason[0])
			snprintf(first_reason, sizeof(first_reason), "%s", last_reason());
	}
	say("walk: the kernel refuses every way, so the files of each cgroup are read instead (%s)", first_reason);
	return WB_WALK_NONE;
}

static int write_about(const struct pins *pins, const struct wb_about *about)
{
	unsigned int zero = 0;
	int map = bpf_obj_get(pin_path(pins, "about")), fresh = map < 0, failed = 0;

	if (fresh)
		map = bpf_map_create(BPF_MAP_TYPE_ARRAY, "about", sizeof(zero), sizeof(*about), 1, NULL);
	if (map < 0 || bpf_map_update_elem(map, &zero, about, BPF_ANY))
		failed = fail("map about: %s", strerror(errno));
	/* Pinned under another name first: whoever sees `about` may open it. */
	if (!failed && fresh) {
		unlink(pin_path(pins, "about_new"));
		if (bpf_obj_pin(map, pin_path(pins, "about_new")))
			failed = fail("%s: %s", pin_path(pins, "about_new"), strerror(errno));
		else if (hand_to_group(pins, pin_path(pins, "about_new"), pin_of("about")->mode))
			failed = 1;
		else if (rename(pin_path(pins, "about_new"), pin_path(pins, "about")))
			failed = fail("%s: %s", pin_path(pins, "about"), strerror(errno));
	}
	if (map >= 0)
		close(map);
	return failed;
}

int load_set(struct pins *pins, const struct load_options *options)
{
	struct wb_about about = {};
	enum pin_state state = look(pins, &about);
	char mounted_at[PIN_PATH];
	bool replaces_bcc;
	int cgroup;

	if (state == SET_FOREIGN)
		return fail("%s holds what is not ours or of another version: `weighbridge-probes unload`, then load", pins->set);
	replaces_bcc = state == SET_READY && about.engine == WB_ENGINE_BCC;
	if (state == SET_READY && !replaces_bcc && !options->replace && strcmp(about.version, WB_VERSION) == 0) {
		say("version %s is loaded already", about.version);
		return 0;
	}
	if (state == SET_UNFINISHED && remove_set(pins))
		return 1;
	if (state != SET_READY && (mkdir(pins->set, 0750) || hand_to_group(pins, pins->set, 0750)))
		return fail("%s: %s", pins->set, strerror(errno));
	if (find_cgroup2(mounted_at, sizeof(mounted_at)))
		return 1;
	cgroup = open(mounted_at, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (cgroup < 0)
		return fail("%s: %s", mounted_at, strerror(errno));

	about.has = load_concern(pins, &lifecycle, cgroup, options) | load_concern(pins, &network, cgroup, options);
	about.walk = load_walk(pins, cgroup, options);
	close(cgroup);
	about.has |= about.walk == WB_WALK_NONE ? 0 : WB_HAS_SNAPSHOT;
	about.layout = WB_LAYOUT;
	about.engine = WB_ENGINE_CORE;
	about.programs_boottime_ns = boottime_ns();
	if (state != SET_READY)
		about.load_id = about.programs_boottime_ns;
	snprintf(about.version, sizeof(about.version), "%s", WB_VERSION);
	if (!about.has) {
		if (state != SET_READY)
			remove_set(pins);
		return fail("nothing was loaded%s", state == SET_READY ? ": the earlier programs stay" : "");
	}
	if (write_about(pins, &about))
		return 1;
	if (replaces_bcc)
		remove_bcc_pins(pins);
	say("%s version %s: lifecycle %s, network %s, walk %s", state == SET_READY ? "replaced the programs by" : "loaded",
	    about.version, about.has & WB_HAS_LIFECYCLE ? "yes" : "no", about.has & WB_HAS_NETWORK ? "yes" : "no",
	    about.walk == WB_WALK_CSS ? "css" : about.walk == WB_WALK_CGROUP_ITERATOR ? "iterator"
	    : about.walk == WB_WALK_TABLE ? "table" : "none");
	return 0;
}
