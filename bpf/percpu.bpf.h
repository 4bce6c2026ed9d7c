/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Other CPUs' copies of a per-CPU object of the kernel. bpf_per_cpu_ptr refuses pointers found in structs (gcc leaves no percpu
 * type tag), and `__per_cpu_offset` is neither in BTF nor, without CONFIG_KALLSYMS_ALL, any variable. But a per-CPU map's element
 * lies at the map's own base plus the CPU's offset, and that tells the offset.
 */
#ifndef WEIGHBRIDGE_PERCPU_BPF_H
#define WEIGHBRIDGE_PERCPU_BPF_H

#include "compat.bpf.h"

/* Twice what CONFIG_NR_CPUS of any distribution allows; the verifier wants a bound. */
#define MAX_CPUS 16384

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} here SEC(".maps");

u64 offset_plus_one[MAX_CPUS]; /* 0: not learned */

/* A pointer's number, by way of memory: the verifier forbids arithmetic on pointers it knows. */
static __always_inline u64 number_of(const void *pointer)
{
	const void *volatile in_memory = pointer;
	u64 number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), (const void *)&in_memory);
	return number;
}

static __always_inline void learn(u32 cpu, const void *element)
{
	u64 base_at = number_of(&here) + bpf_core_field_offset(struct bpf_array, pptrs), base = 0;

	bpf_probe_read_kernel(&base, sizeof(base), (const void *)base_at);
	if (element && cpu < MAX_CPUS)
		offset_plus_one[cpu] = number_of(element) - base + 1;
}

/* Run by the loader, once on every CPU that is online. */
SEC("raw_tp/")
int learn_offsets(void *context)
{
	u32 zero = 0, cpu;

	/* "bpf: add bpf_map_lookup_percpu_elem for percpu map" (5.19). Before, CPUs that come online later stay unknown. */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_map_lookup_percpu_elem)) {
		for (cpu = 0; cpu < MAX_CPUS && cpu < host.possible_cpus; cpu++)
			learn(cpu, bpf_map_lookup_percpu_elem(&here, &zero, cpu));
	} else {
		learn(bpf_get_smp_processor_id(), bpf_map_lookup_elem(&here, &zero));
	}
	return 0;
}

static __always_inline const void *on_cpu(const void *percpu, u32 cpu)
{
	u64 offset = cpu < MAX_CPUS ? offset_plus_one[cpu] : 0;

	return offset ? percpu + (offset - 1) : 0;
}

#endif
