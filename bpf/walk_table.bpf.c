// SPDX-License-Identifier: GPL-2.0-only
/*
 * WB_WALK_TABLE: an own table of cgroups, for kernels before 6.1: iterators over maps are as old as "bpf: Implement bpf iterator for hash maps"
 * (5.9). No function to flush with exists there: the reader makes the kernel flush, by reading cpu.stat.
 */
#define BY_ADDRESS
#include "walk.bpf.h"

#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

#define MAX_DEPTH 64

/* The context of an iterator over the elements of a map. */
struct element_context {
	struct seq_meta *meta;
	void *map, *key, *value; /* key and value: NULL behind the last element */
};

struct task_context {
	void *meta;
	struct task_struct *task; /* NULL behind the last */
};

/* id -> address of the cgroup. Kernel addresses: its pin is root's only. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, u64);
} table SEC(".maps");

static __always_inline void remember(struct cgroup *cgroup)
{
	u64 id = id_of(cgroup), address = (u64)cgroup;

	if (bpf_map_update_elem(&table, &id, &address, BPF_ANY))
		COUNT_OVERFLOW(snapshot_rows, 1);
}

SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(table_mkdir, struct cgroup *cgroup)
{
	if (is_v2(cgroup))
		remember(cgroup);
	return 0;
}

SEC("tp_btf/cgroup_release")
int BPF_PROG(table_release, struct cgroup *cgroup)
{
	u64 id = id_of(cgroup);

	if (is_v2(cgroup))
		bpf_map_delete_elem(&table, &id);
	return 0;
}

/* Cgroups that were there before: those of every task, and what is around them. Empty ones have nothing to count. */
SEC("iter/task")
int table_fill(struct task_context *context)
{
	struct task_struct *task = context->task;
	struct cgroup_subsys_state *parent;
	struct cgroup *cgroup;
	int depth;

	if (!task)
		return 0;
	cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp);
	for (depth = 0; depth < 64 && cgroup; depth++) {
		parent = BPF_CORE_READ(cgroup, self.parent);
		if (!parent)
			break;
		remember(cgroup);
		cgroup = BPF_CORE_READ(parent, cgroup);
	}
	return 0;
}

SEC("iter/bpf_map_elem")
int walk(struct element_context *context)
{
	struct wb_snapshot_head *head = head_of();
	const u64 *key = context->key, *value = context->value;
	struct cgroup *cgroup;
	u64 id;

	if (!head)
		return 0;
	if (!key || !value) {
		end(head, context->meta);
		return 0;
	}
	if (!(head->sequence & 1))
		begin(head);
	id = *key;
	cgroup = (struct cgroup *)*value;
	/* An entry can be older than its cgroup's end when both happen at once. */
	if (id_of(cgroup) == id)
		put(head, cgroup, id);
	return 0;
}
