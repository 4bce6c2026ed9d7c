/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A map is known by its name: each object declares those it uses, the loader makes one of each and pins it. Hashes are not
 * preallocated: sized for hours of churn with no agent to empty them, they cost nothing until then.
 */
#ifndef WEIGHBRIDGE_MAPS_BPF_H
#define WEIGHBRIDGE_MAPS_BPF_H

#include "kernel.h"
#include "records.h"

#include <bpf/bpf_helpers.h>

/* What could not be stored, for want of room or of memory, is counted here, by every program. */
#define OVERFLOW_MAP                                                                                                   \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                                      \
		__uint(max_entries, 1);                                                                                \
		__type(key, u32);                                                                                      \
		__type(value, struct wb_overflow);                                                                     \
	} overflow SEC(".maps")

#define COUNT_OVERFLOW(field, amount)                                                                                  \
	do {                                                                                                           \
		u32 zero_ = 0;                                                                                         \
		struct wb_overflow *overflow_ = bpf_map_lookup_elem(&overflow, &zero_);                                \
		if (overflow_)                                                                                         \
			__sync_fetch_and_add(&overflow_->field, amount);                                               \
	} while (0)

#endif
