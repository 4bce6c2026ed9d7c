// SPDX-License-Identifier: Apache-2.0
#include "pins.h"

#include "say.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bpf/bpf.h>

/* Root's are for writing too: an upgrade opens them again, with no capability to override modes. */
#define READ 0640
#define READ_AND_EMPTY 0660
#define ROOT_ONLY 0600

const struct map_pin map_pins[] = {
	{"births", READ, 8, sizeof(struct wb_birth)},
	{"tombstones", READ_AND_EMPTY, 8, sizeof(struct wb_tombstone)},
	{"wake", READ_AND_EMPTY, 0, 0},
	{"network", READ_AND_EMPTY, 8, sizeof(struct wb_network)},
	{"classes", READ, sizeof(struct wb_prefix), sizeof(unsigned int)},
	{"class_changes", ROOT_ONLY, 4, 4},
	{"snapshot", READ, 4, sizeof(struct wb_rows)},
	{"table", ROOT_ONLY, 8, 8},
	{"paths", ROOT_ONLY, WB_PATH_BYTES, sizeof(struct wb_place)},
	{"overflow", READ, 4, sizeof(struct wb_overflow)},
	{"about", READ, 4, sizeof(struct wb_about)},
};
const size_t map_pin_count = sizeof(map_pins) / sizeof(map_pins[0]);

_Static_assert(sizeof(struct wb_snapshot_head) <= sizeof(struct wb_rows), "the head fits the first element");

const struct map_pin *pin_of(const char *name)
{
	for (size_t i = 0; i < map_pin_count; i++)
		if (strcmp(map_pins[i].name, name) == 0)
			return &map_pins[i];
	return NULL;
}

int open_pins(struct pins *pins, const char *directory, gid_t group)
{
	pins->group = group;
	if (snprintf(pins->directory, sizeof(pins->directory), "%s", directory) >= (int)sizeof(pins->directory))
		return fail("%s: the path is too long", directory);
	snprintf(pins->set, sizeof(pins->set), "%s/v%d", directory, WB_LAYOUT);
	pins->lock = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (pins->lock < 0)
		return fail("%s: %s", directory, strerror(errno));
	if (flock(pins->lock, LOCK_EX | LOCK_NB))
		return fail("%s: another weighbridge-probes is at work", directory);
	return 0;
}

const char *pin_path(const struct pins *pins, const char *name)
{
	static char paths[4][PIN_PATH];
	static unsigned int next;
	char *path = paths[next++ % 4];

	snprintf(path, PIN_PATH, "%s/%s", pins->set, name);
	return path;
}

static int check_map(const struct pins *pins, const struct map_pin *pin)
{
	const char *path = pin_path(pins, pin->name);
	struct bpf_map_info info = {};
	unsigned int size = sizeof(info);
	LIBBPF_OPTS(bpf_obj_get_opts, read_only, .file_flags = BPF_F_RDONLY);
	int map = bpf_obj_get_opts(path, &read_only), wrong;

	/* A set need not have every map, and members of the group may not look at root's. */
	if (map < 0)
		return errno == ENOENT || (errno == EACCES && pin->mode == ROOT_ONLY) ? 0 : fail("%s: %s", path, strerror(errno));
	wrong = bpf_obj_get_info_by_fd(map, &info, &size) || info.key_size != pin->key_bytes ||
		info.value_size != pin->value_bytes;
	close(map);
	return wrong ? fail("%s is no map of layout %d", path, WB_LAYOUT) : 0;
}

enum pin_state look(const struct pins *pins, struct wb_about *about)
{
	LIBBPF_OPTS(bpf_obj_get_opts, read_only, .file_flags = BPF_F_RDONLY);
	unsigned int zero = 0;
	int map, wrong = 0;

	if (access(pins->set, F_OK))
		return SET_ABSENT;
	for (size_t i = 0; i < map_pin_count; i++)
		wrong |= check_map(pins, &map_pins[i]);
	if (wrong)
		return SET_FOREIGN;
	map = bpf_obj_get_opts(pin_path(pins, "about"), &read_only);
	if (map < 0)
		return SET_UNFINISHED;
	wrong = bpf_map_lookup_elem(map, &zero, about);
	close(map);
	about->version[sizeof(about->version) - 1] = 0;
	if (wrong || about->layout != WB_LAYOUT) {
		say("%s says layout %u, not %d", pin_path(pins, "about"), about->layout, WB_LAYOUT);
		return SET_FOREIGN;
	}
	return SET_READY;
}

static int remove_all(const struct pins *pins, const char *prefix)
{
	DIR *directory = opendir(pins->set);
	struct dirent *entry;
	int failed = 0;

	while (directory && (entry = readdir(directory)))
		if (entry->d_name[0] != '.' && strncmp(entry->d_name, prefix, strlen(prefix)) == 0)
			if (unlink(pin_path(pins, entry->d_name)))
				failed = fail("%s: %s", pin_path(pins, entry->d_name), strerror(errno));
	if (directory)
		closedir(directory);
	return failed;
}

int remove_set(const struct pins *pins)
{
	/* Without `about` it is no set any more, however far this gets. */
	unlink(pin_path(pins, "about"));
	if (remove_all(pins, "link_") || remove_all(pins, "walk") || remove_all(pins, ""))
		return 1;
	if (rmdir(pins->set))
		return fail("%s: %s", pins->set, strerror(errno));
	return 0;
}

int hand_to_group(const struct pins *pins, const char *path, mode_t mode)
{
	if (chown(path, -1, pins->group) || chmod(path, mode))
		return fail("%s: cannot give it to group %u: %s", path, pins->group, strerror(errno));
	return 0;
}
