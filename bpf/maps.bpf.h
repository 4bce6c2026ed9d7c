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

/* For text that engine bcc compiles too: there a map is a descriptor. */
#define MAP(name) (&name)

#include "overflow.bpf.h"

#endif
