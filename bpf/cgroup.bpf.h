/* SPDX-License-Identifier: GPL-2.0-only */
/* What is read of one cgroup, by whoever looks at it. */
#ifndef WEIGHBRIDGE_CGROUP_BPF_H
#define WEIGHBRIDGE_CGROUP_BPF_H

#include "compat.bpf.h"
#include "records.h"

/*
 * READ(pointer, field, field ...): pointer->field->field... The verifier knows the cgroups that tracepoints, iterators and the css walk
 * hand out, and lets programs load from them at the cost of a load. One that is only known BY_ADDRESS must be copied from.
 */
#ifdef BY_ADDRESS
#define READ BPF_CORE_READ
#else
#define READ1(p, a) (p)->a
#define READ2(p, a, b) (p)->a->b
#define READ3(p, a, b, c) (p)->a->b->c
#define READ_OF(_1, _2, _3, _4, name, ...) name
#define READ(...) READ_OF(__VA_ARGS__, READ3, READ2, READ1)(__VA_ARGS__)
#endif

struct cpu_time {
	u64 usage_ns, user_ns, system_ns;
};

struct memory {
	u64 current_bytes, peak_bytes, limit_bytes, oom_kills;
};

/* Tracepoints fire for every hierarchy; exactly the v2 one has the id 0. */
static __always_inline bool is_v2(struct cgroup *cgroup)
{
	return READ(cgroup, root, hierarchy_id) == 0;
}

static __always_inline u64 id_of(struct cgroup *cgroup)
{
	return READ(cgroup, kn, id);
}

static __always_inline u64 parent_id_of(struct cgroup *cgroup)
{
	struct cgroup_subsys_state *parent = READ(cgroup, self.parent);

	return parent ? READ(parent, cgroup, kn, id) : 0;
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
	return (struct cpu_time){
		READ(cgroup, bstat.cputime.sum_exec_runtime),
		READ(cgroup, bstat.cputime.utime),
		READ(cgroup, bstat.cputime.stime),
	};
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
