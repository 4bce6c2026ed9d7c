/* SPDX-License-Identifier: Apache-2.0 */
/* The pins: what is at which path, and who may open it. */
#ifndef WEIGHBRIDGE_PINS_H
#define WEIGHBRIDGE_PINS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "records.h"

#define PIN_PATH 1024

struct pins {
	char directory[512]; /* the bpffs */
	char set[600]; /* directory/v<layout> */
	gid_t group;
	int lock;
};

struct map_pin {
	const char *name;
	mode_t mode;
	unsigned int key_bytes, value_bytes; /* per CPU for a per-CPU map */
};

/* Every map that is pinned, `about` last: what has no `about` is not ready. */
extern const struct map_pin map_pins[];
extern const size_t map_pin_count;

/* NULL: not pinned. */
const struct map_pin *pin_of(const char *name);

/* Open the bpffs and take its lock, so that two loaders never work at once. 0, or 1 after saying why not. */
int open_pins(struct pins *pins, const char *directory, gid_t group);

/* Path of a pin of the set, in a buffer that the next call but three overwrites. */
const char *pin_path(const struct pins *pins, const char *name);

enum pin_state { SET_ABSENT, SET_UNFINISHED, SET_READY, SET_FOREIGN };

/* What lies there. SET_READY fills in `about`; SET_FOREIGN is said, with what is wrong. */
enum pin_state look(const struct pins *pins, struct wb_about *about);

/* Remove the set's links, then its iterator, then its maps: nothing counts into what is being removed. 0 or 1. */
int remove_set(const struct pins *pins);

/* Give a new pin its mode and the group. 0, or 1 after saying why not. */
int hand_to_group(const struct pins *pins, const char *path, mode_t mode);

#endif
