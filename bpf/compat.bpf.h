/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Where kernels differ. Each branch names the change that made it; which one holds is asked of the running kernel's
 * BTF, never of its version: distributions carry features back.
 */
#ifndef WEIGHBRIDGE_COMPAT_BPF_H
#define WEIGHBRIDGE_COMPAT_BPF_H

#include "kernel.h"
#include "records.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

const volatile struct wb_host host SEC(".rodata.host");

/* "cgroup: use separate rstat trees for each subsystem" (6.16): rstat_cpu became rstat_base_cpu. */
struct cgroup_rstat_cpu {
	struct cgroup_base_stat bstat;
	struct cgroup_base_stat last_bstat;
} __attribute__((preserve_access_index));

struct cgroup___before_6_16 {
	struct cgroup_rstat_cpu *rstat_cpu;
} __attribute__((preserve_access_index));

struct percpu_stat {
	const void *percpu;
	u32 current_at, flushed_at;
};

static __always_inline struct percpu_stat percpu_stat_of(struct cgroup *cgroup)
{
	struct percpu_stat stat = {};
	struct cgroup___before_6_16 *old = (void *)cgroup;

	if (bpf_core_field_exists(cgroup->rstat_base_cpu)) {
		stat.percpu = BPF_CORE_READ(cgroup, rstat_base_cpu);
		stat.current_at = bpf_core_field_offset(struct cgroup_rstat_base_cpu, bstat.cputime);
		stat.flushed_at = bpf_core_field_offset(struct cgroup_rstat_base_cpu, last_bstat.cputime);
	} else if (bpf_core_field_exists(old->rstat_cpu)) {
		stat.percpu = BPF_CORE_READ(old, rstat_cpu);
		stat.current_at = bpf_core_field_offset(struct cgroup_rstat_cpu, bstat.cputime);
		stat.flushed_at = bpf_core_field_offset(struct cgroup_rstat_cpu, last_bstat.cputime);
	}
	return stat;
}

/* "sched/psi: add kernel cmdline parameter..., allocate psi_group dynamically" (6.1): a pointer where a struct was. */
struct cgroup___psi_within {
	struct psi_group psi;
} __attribute__((preserve_access_index));

static __always_inline const struct psi_group *pressure_of(struct cgroup *cgroup)
{
	struct cgroup___psi_within *old = (void *)cgroup;

	if (!bpf_core_field_exists(cgroup->psi))
		return 0;
	if (bpf_core_field_size(cgroup->psi) == sizeof(void *))
		return BPF_CORE_READ(cgroup, psi);
	return (void *)old + bpf_core_field_offset(struct cgroup___psi_within, psi);
}

/* "cgroup: add pids.peak interface for pids controller" (6.1). */
static __always_inline bool has_pids_peak(void)
{
	return bpf_core_field_exists(struct pids_cgroup, watermark);
}

#endif
