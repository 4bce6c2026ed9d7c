/* SPDX-License-Identifier: Apache-2.0 */
#ifndef WEIGHBRIDGE_STATUS_H
#define WEIGHBRIDGE_STATUS_H

#include <stdbool.h>

/* What is loaded, on stdout. 0; 3 if nothing is; 1 if it cannot be told, after saying why. Needs to read the pins only. */
int print_status(const char *directory, bool json);

#endif
