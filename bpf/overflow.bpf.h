/* SPDX-License-Identifier: GPL-2.0-only */
/* For both engines: COUNT_OVERFLOW(field of struct wb_overflow, amount). */
#ifndef WEIGHBRIDGE_OVERFLOW_BPF_H
#define WEIGHBRIDGE_OVERFLOW_BPF_H

#define COUNT_OVERFLOW(field, amount)                                                                                  \
	do {                                                                                                           \
		u32 zero_ = 0;                                                                                         \
		struct wb_overflow *overflow_ = bpf_map_lookup_elem(MAP(overflow), &zero_);                              \
		if (overflow_)                                                                                         \
			__sync_fetch_and_add(&overflow_->field, amount);                                               \
	} while (0)

#endif
