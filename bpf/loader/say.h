/* SPDX-License-Identifier: Apache-2.0 */
#ifndef WEIGHBRIDGE_SAY_H
#define WEIGHBRIDGE_SAY_H

#include <stdbool.h>

/* One line on stderr, behind the program's name. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* As `say`; the value is 1, for `return fail(...)`. */
int fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Whether libbpf and the kernel's verifier may tell all (--verbose). */
void be_verbose(bool verbose);

/* The last line libbpf or the verifier had to say, "" if none since the last call. */
const char *last_reason(void);

#endif
