// SPDX-License-Identifier: GPL-2.0-only
/*
 * WB_WALK_CGROUP_ITERATOR: "bpf: Introduce cgroup iter" (6.1). It holds cgroup_mutex for the walk.
 * Compiled twice, see FLUSH.
 */
#include "walk.bpf.h"

char LICENSE[] SEC("license") = "GPL";

struct cgroup_context {
	struct seq_meta *meta;
	struct cgroup *cgroup; /* NULL behind the last */
};

SEC("iter.s/cgroup")
int walk(struct cgroup_context *context)
{
	struct wb_snapshot_head *head = head_of();
	struct cgroup *cgroup = context->cgroup;

	if (!head)
		return 0;
	if (!cgroup) {
		end(head, context->meta);
	} else if (context->meta->seq_num == 0) {
		/* The root itself: its totals are the host's, which the agent reads elsewhere. */
		begin(head);
		FLUSH(cgroup);
	} else {
		put(head, cgroup, id_of(cgroup));
	}
	return 0;
}
