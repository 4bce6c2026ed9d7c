/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The kernel's types, as far as the programs read them. Every offset is relocated against the running kernel's BTF when
 * the program is loaded (CO-RE), so only names and types of the fields matter here, not their places. A build therefore
 * needs no kernel and no vmlinux.h, and gives the same bytes everywhere.
 */
#ifndef WEIGHBRIDGE_KERNEL_H
#define WEIGHBRIDGE_KERNEL_H

#include <stdbool.h>

#include <linux/bpf.h>

typedef __u64 u64;
typedef __u32 u32;
typedef __u8 u8;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kernfs_node {
	u64 id;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup_root {
	int hierarchy_id;
};

struct task_cputime {
	u64 stime;
	u64 utime;
	unsigned long long sum_exec_runtime;
};

struct cgroup_base_stat {
	struct task_cputime cputime;
};

struct psi_group {
	u64 total[2];
};

struct cgroup_rstat_base_cpu {
	struct cgroup_base_stat bstat;
	struct cgroup_base_stat last_bstat;
};

struct cgroup {
	struct cgroup_subsys_state self;
	int level;
	struct kernfs_node *kn;
	struct cgroup_subsys_state *subsys[1];
	struct cgroup_root *root;
	struct cgroup_rstat_base_cpu *rstat_base_cpu;
	struct cgroup_base_stat bstat;
	struct psi_group *psi;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct task_struct {
	struct css_set *cgroups;
};

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	__s64 counter;
} atomic64_t;

struct page_counter {
	atomic64_t usage;
	unsigned long watermark;
	unsigned long max;
};

struct mem_cgroup {
	struct page_counter memory;
	atomic64_t memory_events[1];
};

struct pids_cgroup {
	atomic64_t counter;
	__s64 watermark;
};

struct cfs_bandwidth {
	int nr_periods;
	int nr_throttled;
	u64 throttled_time;
};

struct task_group {
	struct cfs_bandwidth cfs_bandwidth;
};

enum cgroup_subsys_id { cpu_cgrp_id, memory_cgrp_id, pids_cgrp_id };
enum memcg_memory_event { MEMCG_OOM_KILL };

struct bpf_array {
	void *pptrs[1];
};

#pragma clang attribute pop

#endif
