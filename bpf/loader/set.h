/* SPDX-License-Identifier: Apache-2.0 */
/* A set of programs: load it, attach it, pin it; or put it in the place of the one that is there. */
#ifndef WEIGHBRIDGE_SET_H
#define WEIGHBRIDGE_SET_H

#include "pins.h"

struct load_options {
	const char *networks; /* NULL: the private ones */
	const char *walk; /* "auto", or the one that must be used */
	unsigned int max_cgroups, max_ended;
	bool replace; /* programs of the same version too */
};

/* Elements of a map that the options size; 0: as the programs declare it. */
unsigned int room_for(const char *map, const struct load_options *options);

/*
 * Load what is not there; put other programs in the place of those that are, over the same maps: every event is counted by
 * old or new or, where both see it, written twice with the same content. A program that the kernel refuses is
 * said and left out. 0, or 1 if none could be loaded, after saying why.
 */
int load_set(struct pins *pins, const struct load_options *options);

#endif
