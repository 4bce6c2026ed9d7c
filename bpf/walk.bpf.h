/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every cgroup of the v2 hierarchy in one pass, into an mmapable array. Three ways to make the walk (walk_*.bpf.c), all of them
 * iterators that are pinned, so that whoever may read the pin may have the walk made: no capability is needed. The
 * loader takes the first that the kernel accepts.
 *
 * The kernel flushes once, at the root; the settled counters are then what cpu.stat says of each cgroup, and only grow.
 */
#ifndef WEIGHBRIDGE_WALK_BPF_H
#define WEIGHBRIDGE_WALK_BPF_H

#include "cgroup.bpf.h"
#include "maps.bpf.h"

#define ROOT_ID 1

/* The flush of a cgroup and all below it has another name BEFORE_6_16. */
#ifdef BEFORE_6_16
extern void cgroup_rstat_flush(struct cgroup *cgroup) __ksym;
#define FLUSH(cgroup) cgroup_rstat_flush(cgroup)
#else
extern void css_rstat_flush(struct cgroup_subsys_state *css) __ksym;
#define FLUSH(cgroup) css_rstat_flush(&(cgroup)->self)
#endif

OVERFLOW_MAP;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 + (16384 + WB_ROWS_IN_ELEMENT - 1) / WB_ROWS_IN_ELEMENT);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct wb_rows);
} snapshot SEC(".maps");

/* What every iterator's context begins with. */
struct seq_meta {
	struct seq_file *seq;
	u64 session_id;
	u64 seq_num;
};

static __always_inline struct wb_snapshot_head *head_of(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&snapshot, &zero);
}

static __always_inline void begin(struct wb_snapshot_head *head)
{
	head->sequence |= 1;
	head->rows = head->missed = 0;
	head->begun_boottime_ns = bpf_ktime_get_boot_ns();
}

/* The reader of the pin gets one byte, and so knows that the walk was made. */
static __always_inline void end(struct wb_snapshot_head *head, struct seq_meta *meta)
{
	const char done = '\n';

	head->ended_boottime_ns = bpf_ktime_get_boot_ns();
	head->sequence = (head->sequence | 1) + 1;
	bpf_seq_write(meta->seq, &done, sizeof(done));
}

static __always_inline void put_controllers(struct cgroup *cgroup, struct wb_row *row)
{
	struct task_group *cpu = css_of(cgroup, bpf_core_enum_value(enum cgroup_subsys_id, cpu_cgrp_id));
	struct pids_cgroup *pids = css_of(cgroup, bpf_core_enum_value(enum cgroup_subsys_id, pids_cgrp_id));
	struct memory memory;

	if (cpu && bpf_core_field_exists(cpu->cfs_bandwidth)) {
		row->cpu_periods = BPF_CORE_READ(cpu, cfs_bandwidth.nr_periods);
		row->cpu_throttled_periods = BPF_CORE_READ(cpu, cfs_bandwidth.nr_throttled);
		row->cpu_throttled_ns = BPF_CORE_READ(cpu, cfs_bandwidth.throttled_time);
		row->flags |= WB_KNOWS_THROTTLING;
	}
	if (memory_of(cgroup, &memory)) {
		row->memory_current_bytes = memory.current_bytes;
		row->memory_peak_bytes = memory.peak_bytes;
		row->memory_limit_bytes = memory.limit_bytes;
		row->oom_kills = memory.oom_kills;
		row->flags |= WB_KNOWS_MEMORY | WB_KNOWS_MEMORY_PEAK | WB_KNOWS_OOM_KILLS;
	}
	if (pids) {
		row->pids_current = BPF_CORE_READ(pids, counter.counter);
		row->flags |= WB_KNOWS_PIDS;
		if (has_pids_peak()) {
			row->pids_peak = BPF_CORE_READ(pids, watermark);
			row->flags |= WB_KNOWS_PIDS_PEAK;
		}
	}
}

static __always_inline void put_pressure(struct cgroup *cgroup, struct wb_row *row)
{
	const struct psi_group *pressure = pressure_of(cgroup);
	u64 total[6] = {};

	/* enum psi_states: io, memory, cpu; each some, then full. total[0] is what the files show. */
	if (!pressure || bpf_probe_read_kernel(total, sizeof(total),
					       (void *)pressure + bpf_core_field_offset(struct psi_group, total)))
		return;
	row->psi_io_some_ns = total[0];
	row->psi_io_full_ns = total[1];
	row->psi_memory_some_ns = total[2];
	row->psi_memory_full_ns = total[3];
	row->psi_cpu_some_ns = total[4];
	row->psi_cpu_full_ns = total[5];
	row->flags |= WB_KNOWS_PRESSURE;
}

static __always_inline void put(struct wb_snapshot_head *head, struct cgroup *cgroup, u64 id)
{
	u32 at = head->rows, element = 1 + at / WB_ROWS_IN_ELEMENT;
	u64 within = at % WB_ROWS_IN_ELEMENT;
	struct wb_rows *rows = bpf_map_lookup_elem(&snapshot, &element);
	struct cpu_time cpu = settled_cpu(cgroup);
	struct wb_row *row;

	barrier_var(within); /* so that the verifier sees the bound of what the compiler indexes with */
	if (!rows || within >= WB_ROWS_IN_ELEMENT) {
		COUNT_OVERFLOW(snapshot_rows, 1);
		head->missed++;
		return;
	}
	row = &rows->row[within];
	__builtin_memset(row, 0, sizeof(*row));
	row->cgroup_id = id;
	row->parent_id = parent_id_of(cgroup);
	row->level = READ(cgroup, level);
	row->cpu_usage_ns = cpu.usage_ns;
	row->cpu_user_ns = cpu.user_ns;
	row->cpu_system_ns = cpu.system_ns;
	row->flags = WB_KNOWS_CPU;
	put_controllers(cgroup, row);
	put_pressure(cgroup, row);
	head->rows = at + 1;
}

#endif
