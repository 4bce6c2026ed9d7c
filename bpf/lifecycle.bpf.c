// SPDX-License-Identifier: GPL-2.0-only
/*
 * Births and ends of cgroups. rmdir is prompt: a task may still be exiting on another CPU. release is exact: nothing can run
 * in the cgroup any more; a zombie memory cgroup can delay it indefinitely. All three tracepoints fire with
 * cgroup_mutex held, so one scratch record serves them all.
 */
#include "cgroup.bpf.h"
#include "maps.bpf.h"
#include "percpu.bpf.h"

#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

OVERFLOW_MAP;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct wb_birth);
} births SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct wb_tombstone);
} tombstones SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} wake SEC(".maps");

/* Records are larger than a program's stack. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct wb_birth);
} new_birth SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct wb_tombstone);
} new_tombstone SEC(".maps");

static __always_inline u32 copy_path(char *to, const char *path)
{
	/* A cut string ends in the last byte; so does one that just fits, which no caller minds. */
	if (bpf_probe_read_kernel_str(to, WB_PATH_BYTES, path) < WB_PATH_BYTES)
		return 0;
	COUNT_OVERFLOW(paths_cut, 1);
	return WB_PATH_CUT;
}

SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(on_mkdir, struct cgroup *cgroup, const char *path)
{
	u32 zero = 0;
	u64 id, parent_id;
	struct wb_birth *birth, *parent;

	if (!is_v2(cgroup))
		return 0;
	birth = bpf_map_lookup_elem(&new_birth, &zero);
	if (!birth)
		return 0;
	id = id_of(cgroup);
	parent_id = parent_id_of(cgroup);
	parent = bpf_map_lookup_elem(&births, &parent_id);
	if (parent)
		parent->children++;
	birth->parent_id = parent_id;
	birth->born_boottime_ns = bpf_ktime_get_boot_ns();
	birth->level = READ(cgroup, level);
	birth->flags = copy_path(birth->path, path);
	if (bpf_map_update_elem(&births, &id, birth, BPF_ANY))
		COUNT_OVERFLOW(births, 1);
	if (bpf_ringbuf_output(&wake, &id, sizeof(id), 0))
		COUNT_OVERFLOW(wakes, 1);
	return 0;
}

/* Σ over the CPUs of the cgroup's own time, cumulative; less what has been flushed, if asked. */
static __always_inline struct cpu_time own_cpu(const struct percpu_stat *stat, bool unflushed_only)
{
	struct cpu_time total = {};
	u32 cpu;

	for (cpu = 0; cpu < MAX_CPUS && cpu < host.possible_cpus; cpu++) {
		const void *there = on_cpu(stat->percpu, cpu);
		struct task_cputime now = {}, flushed = {};

		if (!there)
			continue;
		bpf_probe_read_kernel(&now, sizeof(now), there + stat->current_at);
		if (unflushed_only)
			bpf_probe_read_kernel(&flushed, sizeof(flushed), there + stat->flushed_at);
		total.usage_ns += now.sum_exec_runtime - flushed.sum_exec_runtime;
		total.user_ns += now.utime - flushed.utime;
		total.system_ns += now.stime - flushed.stime;
	}
	return total;
}

/*
 * CPU time of the whole life, what lay below included: settled, and not yet flushed. A flush on another CPU between the two
 * reads would count its part twice or not at all, so what a cgroup that never had children used is
 * read from its per-CPU counters alone, which no flush touches; for the others the reads must agree.
 */
static __always_inline bool whole_cpu(struct cgroup *cgroup, bool childless, struct cpu_time *cpu)
{
	struct percpu_stat stat = percpu_stat_of(cgroup);
	struct cpu_time before, unflushed, after;
	int attempt;

	if (!stat.percpu)
		return false;
	if (childless) {
		*cpu = own_cpu(&stat, false);
		return true;
	}
	for (attempt = 0; attempt < 3; attempt++) {
		before = settled_cpu(cgroup);
		unflushed = own_cpu(&stat, true);
		after = settled_cpu(cgroup);
		if (before.usage_ns == after.usage_ns)
			break;
	}
	cpu->usage_ns = before.usage_ns + unflushed.usage_ns;
	cpu->user_ns = before.user_ns + unflushed.user_ns;
	cpu->system_ns = before.system_ns + unflushed.system_ns;
	return true;
}

static __always_inline int write_tombstone(struct cgroup *cgroup, const char *path, bool released)
{
	u32 zero = 0;
	u64 id = id_of(cgroup), now = bpf_ktime_get_boot_ns();
	struct wb_birth *birth = bpf_map_lookup_elem(&births, &id);
	struct wb_tombstone *written = bpf_map_lookup_elem(&tombstones, &id);
	struct wb_tombstone *record = bpf_map_lookup_elem(&new_tombstone, &zero);
	struct cpu_time cpu = {};
	struct memory memory = {};
	u32 flags = 0;

	if (!record)
		return 0;
	/* The birth is gone once a tombstone was written: at the release, and when an upgrade has two sets see one removal. */
	if (written ? written->flags & WB_CHILDLESS : birth && birth->children == 0)
		flags |= WB_CHILDLESS;
	if (whole_cpu(cgroup, flags & WB_CHILDLESS, &cpu))
		flags |= WB_KNOWS_CPU;
	if (written) {
		*record = *written;
		flags |= written->flags;
	} else {
		record->parent_id = parent_id_of(cgroup);
		record->born_boottime_ns = birth ? birth->born_boottime_ns : 0;
		record->removed_boottime_ns = now;
		record->level = READ(cgroup, level);
		flags |= copy_path(record->path, path);
		/* Only while cgroup_mutex of the rmdir is held is the memory cgroup still linked to the cgroup. */
		if (!released && memory_of(cgroup, &memory))
			flags |= WB_KNOWS_MEMORY | WB_KNOWS_MEMORY_PEAK | WB_KNOWS_OOM_KILLS;
		record->memory_current_bytes = memory.current_bytes;
		record->memory_peak_bytes = memory.peak_bytes;
		record->oom_kills = memory.oom_kills;
	}
	record->released_boottime_ns = released ? now : 0;
	record->cpu_usage_ns = cpu.usage_ns;
	record->cpu_user_ns = cpu.user_ns;
	record->cpu_system_ns = cpu.system_ns;
	record->flags = flags;
	if (bpf_map_update_elem(&tombstones, &id, record, BPF_ANY)) {
		COUNT_OVERFLOW(tombstones, 1);
		if (released)
			COUNT_OVERFLOW(tombstones_cpu_ns, cpu.usage_ns);
		if (!released)
			return 0; /* The release needs the birth. */
	}
	/* A removed cgroup can live on for as long as a page of it does: its birth makes room for others. */
	bpf_map_delete_elem(&births, &id);
	return 0;
}

SEC("tp_btf/cgroup_rmdir")
int BPF_PROG(on_rmdir, struct cgroup *cgroup, const char *path)
{
	return is_v2(cgroup) ? write_tombstone(cgroup, path, false) : 0;
}

SEC("tp_btf/cgroup_release")
int BPF_PROG(on_release, struct cgroup *cgroup, const char *path)
{
	return is_v2(cgroup) ? write_tombstone(cgroup, path, true) : 0;
}
