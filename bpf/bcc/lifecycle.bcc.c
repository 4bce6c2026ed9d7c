// SPDX-License-Identifier: GPL-2.0-only
/*
 * Births and ends of cgroups from what the tracepoints say, and nothing else: with headers that differ from the kernel, a
 * field that is read from one of its structs is silently another one. So there is no CPU time and no memory here, and a parent is
 * known by its path. All three tracepoints fire with cgroup_mutex held, so one scratch record serves them all.
 *
 * bcc takes the layout of a tracepoint from tracefs, hence from the running kernel.
 */
#include "bcc/engine.h"

#define V2 0 /* id of the hierarchy; tracepoints fire for every one */

/* Zero-padded, since it is a key of `paths` too. */
static __always_inline u32 copy_path(char *to, const void *path)
{
	__builtin_memset(to, 0, WB_PATH_BYTES);
	/* A cut string ends in the last byte; so does one that just fits, which no caller minds. */
	return bpf_probe_read_kernel_str(to, WB_PATH_BYTES, path) < WB_PATH_BYTES ? 0 : WB_PATH_CUT;
}

/* Id of the cgroup around the one with this path and level; 0: not known. Leaves the path cut to its directory's. */
static __always_inline u64 parent_of(char *path, u32 level)
{
	struct wb_place *parent;
	u32 at;

	for (at = WB_PATH_BYTES - 1; at > 0 && path[at] != '/'; at--)
		path[at] = 0;
	if (at > 0)
		path[at] = 0;
	parent = bpf_map_lookup_elem(MAP(paths), path);
	/* What is left of a path that was cut may be a directory further up. */
	return parent && parent->level + 1 == level ? parent->id : 0;
}

int on_mkdir(struct tracepoint__cgroup__cgroup_mkdir *event)
{
	const void *path = (const void *)event + (event->data_loc_path & 0xffff);
	struct wb_place place = {.id = event->id, .level = event->level};
	u32 zero = 0;
	struct wb_birth *birth = bpf_map_lookup_elem(MAP(new_birth), &zero), *parent;

	if (event->root != V2 || !birth)
		return 0;
	birth->flags = copy_path(birth->path, path);
	/* Engine core, should it take over, relies on the number of children: one too many is on the safe side. */
	birth->children = birth->flags || bpf_map_update_elem(MAP(paths), birth->path, &place, BPF_ANY);
	birth->parent_id = parent_of(birth->path, place.level);
	parent = bpf_map_lookup_elem(MAP(births), &birth->parent_id);
	if (parent)
		parent->children++;
	if (copy_path(birth->path, path))
		COUNT_OVERFLOW(paths_cut, 1);
	birth->born_boottime_ns = bpf_ktime_get_boot_ns();
	birth->level = place.level;
	if (bpf_map_update_elem(MAP(births), &place.id, birth, BPF_ANY))
		COUNT_OVERFLOW(births, 1);
	if (bpf_ringbuf_output(MAP(wake), &place.id, sizeof(place.id), 0))
		COUNT_OVERFLOW(wakes, 1);
	return 0;
}

struct end {
	u64 id;
	u32 level;
	const void *path;
	bool released;
};

static __always_inline int write_tombstone(struct end *end)
{
	u64 id = end->id, now = bpf_ktime_get_boot_ns();
	u32 zero = 0;
	struct wb_birth *birth = bpf_map_lookup_elem(MAP(births), &id);
	struct wb_tombstone *written = bpf_map_lookup_elem(MAP(tombstones), &id);
	struct wb_tombstone *record = bpf_map_lookup_elem(MAP(new_tombstone), &zero);

	if (!record)
		return 0;
	__builtin_memset(record, 0, sizeof(*record));
	record->flags = copy_path(record->path, end->path);
	if (!end->released && !record->flags)
		bpf_map_delete_elem(MAP(paths), record->path);
	if (written) {
		/* Engine core, if it was here before, may have known more. */
		*record = *written;
	} else {
		record->parent_id = birth ? birth->parent_id : parent_of(record->path, end->level);
		if (copy_path(record->path, end->path))
			COUNT_OVERFLOW(paths_cut, 1);
		record->born_boottime_ns = birth ? birth->born_boottime_ns : 0;
		record->removed_boottime_ns = now;
		record->level = end->level;
	}
	record->released_boottime_ns = end->released ? now : 0;
	if (bpf_map_update_elem(MAP(tombstones), &id, record, BPF_ANY))
		COUNT_OVERFLOW(tombstones, 1);
	if (end->released)
		bpf_map_delete_elem(MAP(births), &id);
	return 0;
}

int on_rmdir(struct tracepoint__cgroup__cgroup_rmdir *event)
{
	struct end end = {event->id, event->level, (const void *)event + (event->data_loc_path & 0xffff), false};

	return event->root == V2 ? write_tombstone(&end) : 0;
}

int on_release(struct tracepoint__cgroup__cgroup_release *event)
{
	struct end end = {event->id, event->level, (const void *)event + (event->data_loc_path & 0xffff), true};

	return event->root == V2 ? write_tombstone(&end) : 0;
}

/* Run by the helper (missed.py), with what the kernel kept from the programs above: births, and ends. */
int count_missed(struct bpf_raw_tracepoint_args *missed)
{
	u64 births = missed->args[0], ends = missed->args[1];

	COUNT_OVERFLOW(births, births);
	COUNT_OVERFLOW(tombstones, ends);
	return 0;
}
