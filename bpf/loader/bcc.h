/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Engine bcc: for kernels without BTF but with headers. The loader makes the maps, then becomes the helper (bcc/), which
 * compiles the programs, attaches them, and stays.
 */
#ifndef WEIGHBRIDGE_BCC_H
#define WEIGHBRIDGE_BCC_H

#include "set.h"

struct bcc_options {
	const char *helper; /* its directory */
	bool accept_foreign_headers; /* for tests only: of another kernel than the one that is running */
	bool hold_tracepoints; /* for tests only: as on kernels before 5.15 */
	bool verbose;
};

/* Does not return where it succeeds. 1 after saying why not. */
int become_bcc_helper(struct pins *pins, const struct load_options *load, const struct bcc_options *bcc);

/* What nobody but this engine keeps up to date, once another has taken its place. */
void remove_bcc_pins(const struct pins *pins);

/* After the set `set` (a directory, opened before) was removed: its helper has seen that and ended. 0 or 1. */
int wait_for_bcc_helper(int set);

#endif
