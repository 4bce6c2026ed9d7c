// SPDX-License-Identifier: Apache-2.0
/* The compiled programs, inside the loader: nothing to find at run time, nothing that could be of another version. */
#include "objects.h"

#include <string.h>

#define EMBED(name)                                                                                                    \
	__asm__(".pushsection .rodata\n"                                                                               \
		".balign 8\n"                                                                                          \
		"object_" #name "_begin: .incbin \"" OBJECTS #name ".bpf.o\"\n"                                        \
		"object_" #name "_end:\n"                                                                              \
		".popsection\n");                                                                                      \
	extern const char object_##name##_begin[], object_##name##_end[];

#define ENTRY(name) {#name, object_##name##_begin, object_##name##_end}

EMBED(lifecycle)
EMBED(network)
EMBED(walk_css)
EMBED(walk_css_before_6_16)
EMBED(walk_iterator)
EMBED(walk_iterator_before_6_16)
EMBED(walk_table)

static const struct object objects[] = {
	ENTRY(lifecycle),	ENTRY(network),
	ENTRY(walk_css),	ENTRY(walk_css_before_6_16),
	ENTRY(walk_iterator),	ENTRY(walk_iterator_before_6_16),
	ENTRY(walk_table),
};

const struct object *object_named(const char *name)
{
	for (size_t i = 0; i < sizeof(objects) / sizeof(objects[0]); i++)
		if (strcmp(objects[i].name, name) == 0)
			return &objects[i];
	return NULL;
}
