/* SPDX-License-Identifier: Apache-2.0 */
#ifndef WEIGHBRIDGE_OBJECTS_H
#define WEIGHBRIDGE_OBJECTS_H

struct object {
	const char *name;
	const char *begin, *end;
};

/* NULL if there is none of that name. */
const struct object *object_named(const char *name);

#endif
