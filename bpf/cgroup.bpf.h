/* SPDX-License-Identifier: GPL-2.0-only */
/* What is read of one cgroup, by whoever looks at it. */
#ifndef WEIGHBRIDGE_CGROUP_BPF_H
#define WEIGHBRIDGE_CGROUP_BPF_H

#include "compat.bpf.h"
#include "records.h"

struct cpu_time {
	u64 usage_ns, user_ns, system_ns;
};

struct memory {
	u64 current_bytes, peak_bytes, limit_bytes, oom_kills;
};

/* Tracepoints fire for every hierarchy; exactly the v2 one has the id 0. */
static __always_inline bool is_v2(struct cgroup *cgroup)
{
	return BPF_CORE_READ(cgroup, root, hierarchy_id) == 0;
}

static __always_inline u64 id_of(struct cgroup *cgroup)
{
	return BPF_CORE_READ(cgroup, kn, id);
}

static __always_inline u64 parent_id_of(struct cgroup *cgroup)
{
	struct cgroup_subsys_state *parent = BPF_CORE_READ(cgroup, self.parent);

	return parent ? BPF_CORE_READ(parent, cgroup, kn, id) : 0;
}

/* The css of a controller on this very cgroup; NULL where the controller is not enabled or belongs to v1. */
static __always_inline void *css_of(struct cgroup *cgroup, u32 controller)
{
	struct cgroup_subsys_state *css = 0;

	bpf_probe_read_kernel(&css, sizeof(css),
			      (void *)cgroup + bpf_core_field_offset(struct cgroup, subsys) + controller * sizeof(css));
	return css;
}

/* CPU time as of the last flush, what lies below included. Only grows. */
static __always_inline struct cpu_time settled_cpu(struct cgroup *cgroup)
{
	struct task_cputime time = {};

	bpf_probe_read_kernel(&time, sizeof(time),
			      (void *)cgroup + bpf_core_field_offset(struct cgroup, bstat.cputime));
	return (struct cpu_time){time.sum_exec_runtime, time.utime, time.stime};
}

/* memory.current, memory.peak, memory.max and memory.events:oom_kill. */
static __always_inline bool memory_of(struct cgroup *cgroup, struct memory *memory)
{
	struct mem_cgroup *memcg = css_of(cgroup, bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id));
	u32 kills_at = bpf_core_enum_value(enum memcg_memory_event, MEMCG_OOM_KILL) * sizeof(atomic64_t);
	atomic64_t kills = {};

	*memory = (struct memory){};
	if (!memcg)
		return false;
	memory->current_bytes = BPF_CORE_READ(memcg, memory.usage.counter) * host.page_bytes;
	memory->peak_bytes = BPF_CORE_READ(memcg, memory.watermark) * host.page_bytes;
	memory->limit_bytes = BPF_CORE_READ(memcg, memory.max) * host.page_bytes;
	bpf_probe_read_kernel(&kills, sizeof(kills),
			      (void *)memcg + bpf_core_field_offset(struct mem_cgroup, memory_events) + kills_at);
	memory->oom_kills = kills.counter;
	return true;
}

#endif
