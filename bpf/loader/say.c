// SPDX-License-Identifier: Apache-2.0
#include "say.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <bpf/libbpf.h>

static bool all;
static char reason[512];

static void line(const char *format, va_list arguments)
{
	fputs("weighbridge-probes: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
}

void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	line(format, arguments);
	va_end(arguments);
}

int fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	line(format, arguments);
	va_end(arguments);
	return 1;
}

/* libbpf tells causes before consequences, so the first line of a failure says most. */
static int print(enum libbpf_print_level level, const char *format, va_list arguments)
{
	va_list again;

	if (level == LIBBPF_DEBUG)
		return 0;
	va_copy(again, arguments);
	if (all)
		vfprintf(stderr, format, arguments);
	if (!reason[0]) {
		vsnprintf(reason, sizeof(reason), format, again);
		reason[strcspn(reason, "\n")] = 0;
	}
	va_end(again);
	return 0;
}

void be_verbose(bool verbose)
{
	all = verbose;
	libbpf_set_print(print);
}

const char *last_reason(void)
{
	static char told[sizeof(reason)];

	memcpy(told, reason, sizeof(told));
	reason[0] = 0;
	return told;
}
