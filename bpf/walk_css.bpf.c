// SPDX-License-Identifier: GPL-2.0-only
/*
 * WB_WALK_CSS: an RCU walk of the css tree, "bpf: Introduce css open-coded iterator kfuncs" (6.7). It holds no lock that the
 * start of a container waits for. Compiled twice, see FLUSH.
 */
#include "walk.bpf.h"

char LICENSE[] SEC("license") = "GPL";

struct bpf_iter_css {
	u64 opaque[3];
} __attribute__((aligned(8)));

enum { DESCENDANTS_PRE = 2 }; /* enum bpf_cgroup_iter_order */

extern struct cgroup *bpf_cgroup_from_id(u64 id) __ksym;
extern void bpf_cgroup_release(struct cgroup *cgroup) __ksym;
extern int bpf_iter_css_new(struct bpf_iter_css *it, struct cgroup_subsys_state *start, unsigned int flags) __ksym;
extern struct cgroup_subsys_state *bpf_iter_css_next(struct bpf_iter_css *it) __ksym;
extern void bpf_iter_css_destroy(struct bpf_iter_css *it) __ksym;
extern void bpf_rcu_read_lock(void) __ksym;
extern void bpf_rcu_read_unlock(void) __ksym;

/*
 * The iterator is over the tasks of the host, and the walk is made at the first of them: a reader of one byte is answered then and the
 * others are not looked at. Iterators over maps or links cannot sleep, and the one over cgroups holds cgroup_mutex.
 */
struct task_context {
	struct seq_meta *meta;
	void *task; /* NULL behind the last */
};

SEC("iter.s/task")
int walk(struct task_context *context)
{
	struct wb_snapshot_head *head = head_of();
	struct cgroup_subsys_state *css;
	struct bpf_iter_css tree;
	struct cgroup *root;

	if (!context->task || context->meta->seq_num > 0 || !head)
		return 0;
	root = bpf_cgroup_from_id(ROOT_ID);
	if (!root)
		return 0;
	begin(head);
	FLUSH(root);
	bpf_rcu_read_lock();
	bpf_iter_css_new(&tree, &root->self, DESCENDANTS_PRE);
	while ((css = bpf_iter_css_next(&tree))) {
		u64 id = id_of(css->cgroup);

		if (id != ROOT_ID)
			put(head, css->cgroup, id);
	}
	bpf_iter_css_destroy(&tree);
	bpf_rcu_read_unlock();
	bpf_cgroup_release(root);
	end(head, context->meta);
	return 0;
}
