// SPDX-License-Identifier: Apache-2.0
/* weighbridge-probes: loads the programs, pins them, and goes away. */
#include "bcc.h"
#include "host.h"
#include "networks.h"
#include "pins.h"
#include "say.h"
#include "set.h"
#include "status.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include <bpf/bpf.h>

/* Read at every load, upgrade and `networks` that names no other, if it is there. */
#define NETWORKS_FILE "/etc/weighbridge/internal-networks"

#define USAGE                                                                                                          \
	"weighbridge-probes load [OPTION ...]      load the programs; replace those of another version\n"              \
	"weighbridge-probes upgrade [OPTION ...]   replace the programs that are loaded; counters go on\n"              \
	"weighbridge-probes status [--json]        what is loaded, and how full its maps are\n"                        \
	"weighbridge-probes networks [FILE]        which peers are internal, from now on\n"                            \
	"weighbridge-probes unload                 detach, and forget what was counted and not read\n"                  \
	"\n"                                                                                                           \
	"  --directory D     a bpffs of its own (/run/weighbridge/bpf)\n"                                              \
	"  --group G         who may read the pins (weighbridge)\n"                                                    \
	"  --networks FILE   internal networks, a CIDR a line; !CIDR: external after all\n"                             \
	"                    (" NETWORKS_FILE "; if that is not there, the private ones)\n"                                 \
	"  --walk KIND       auto, css, iterator or table (auto)\n"                                                    \
	"  --max-cgroups N   cgroups alive at a time (16384)\n"                                                        \
	"  --max-ended N     ended ones that wait for the agent (65536)\n"                                             \
	"  --engine E        core, or bcc for kernels without BTF: stays, as a service; see bpf/README.md (core)\n"      \
	"  --bcc-helper D    where engine bcc's helper is\n"                                                          \
	"  --verbose         all that libbpf and the kernel's verifier say\n"

enum { DIRECTORY = 256, GROUP, NETWORKS, WALK, MAX_CGROUPS, MAX_ENDED, ENGINE, BCC_HELPER, FOREIGN_HEADERS, HOLD_TRACEPOINTS,
       VERBOSE, JSON, VERSION };

static const struct option long_options[] = {
	{"directory", required_argument, NULL, DIRECTORY},
	{"group", required_argument, NULL, GROUP},
	{"networks", required_argument, NULL, NETWORKS},
	{"walk", required_argument, NULL, WALK},
	{"max-cgroups", required_argument, NULL, MAX_CGROUPS},
	{"max-ended", required_argument, NULL, MAX_ENDED},
	{"engine", required_argument, NULL, ENGINE},
	{"bcc-helper", required_argument, NULL, BCC_HELPER},
	{"for-tests-only-accept-foreign-headers", no_argument, NULL, FOREIGN_HEADERS},
	{"for-tests-only-hold-tracepoints", no_argument, NULL, HOLD_TRACEPOINTS},
	{"verbose", no_argument, NULL, VERBOSE},
	{"json", no_argument, NULL, JSON},
	{"help", no_argument, NULL, 'h'},
	{"version", no_argument, NULL, VERSION},
	{},
};

struct command_line {
	const char *directory, *group, *engine;
	struct load_options load;
	struct bcc_options bcc;
	bool verbose, json;
};

static int usage(void)
{
	fputs(USAGE, stderr);
	return 2;
}

/* 1 to 1,000,000. */
static int read_count(const char *text, const char *option, unsigned int *count)
{
	char *end;
	unsigned long number = strtoul(text, &end, 10);

	if (*text < '0' || *text > '9' || *end || number < 1 || number > 1000000) {
		say("%s needs a number from 1 to 1000000, not %s", option, text);
		return 1;
	}
	*count = number;
	return 0;
}

static bool is_walk(const char *text)
{
	return !strcmp(text, "auto") || !strcmp(text, "css") || !strcmp(text, "iterator") || !strcmp(text, "table");
}

/* 0, 2 for wrong usage, -1 when all is said. */
static int read_options(int count, char **arguments, struct command_line *line)
{
	int option, wrong = 0;

	while ((option = getopt_long(count, arguments, "h", long_options, NULL)) != -1) {
		switch (option) {
		case DIRECTORY: line->directory = optarg; break;
		case GROUP: line->group = optarg; break;
		case NETWORKS: line->load.networks = optarg; break;
		case WALK: line->load.walk = optarg; break;
		case MAX_CGROUPS: wrong |= read_count(optarg, "--max-cgroups", &line->load.max_cgroups); break;
		case MAX_ENDED: wrong |= read_count(optarg, "--max-ended", &line->load.max_ended); break;
		case ENGINE: line->engine = optarg; break;
		case BCC_HELPER: line->bcc.helper = optarg; break;
		case FOREIGN_HEADERS: line->bcc.accept_foreign_headers = true; break;
		case HOLD_TRACEPOINTS: line->bcc.hold_tracepoints = true; break;
		case VERBOSE: line->verbose = line->bcc.verbose = true; break;
		case JSON: line->json = true; break;
		case VERSION: puts("weighbridge-probes " WB_VERSION); return -1;
		case 'h': fputs(USAGE, stdout); return -1;
		default: wrong = 1;
		}
	}
	if (!is_walk(line->load.walk)) {
		say("--walk is auto, css, iterator or table, not %s", line->load.walk);
		wrong = 1;
	}
	if (line->engine && strcmp(line->engine, "core") != 0 && strcmp(line->engine, "bcc") != 0) {
		say("--engine is core or bcc, not %s", line->engine);
		wrong = 1;
	}
	if (line->directory[0] != '/') {
		say("--directory needs a whole path, not %s", line->directory);
		wrong = 1;
	}
	return wrong ? 2 : 0;
}

static int load(const struct command_line *line)
{
	struct pins pins;
	bool bcc = line->engine && strcmp(line->engine, "bcc") == 0;
	gid_t group;

	if (!bcc && access("/sys/kernel/btf/vmlinux", R_OK))
		return fail("this kernel does not describe its types (no /sys/kernel/btf/vmlinux, CONFIG_DEBUG_INFO_BTF): "
			    "load with --engine bcc, or let the agent read files alone");
	if (require_capabilities() || find_group(line->group, &group) || require_bpffs(line->directory, group) ||
	    open_pins(&pins, line->directory, group))
		return 1;
	if (bcc)
		return become_bcc_helper(&pins, &line->load, &line->bcc);
	return load_set(&pins, &line->load);
}

static int upgrade(struct command_line *line)
{
	struct pins pins;
	struct wb_about about;
	enum pin_state state;

	if (open_pins(&pins, line->directory, 0))
		return 1;
	state = look(&pins, &about);
	close(pins.lock);
	if (state != SET_READY)
		return fail("%s: nothing is loaded that could be replaced: weighbridge-probes load", pins.set);
	line->load.replace = true;
	return load(line);
}

static int networks(const struct command_line *line, const char *file)
{
	struct pins pins;

	return open_pins(&pins, line->directory, 0) || change_networks(&pins, file);
}

static int unload(const struct command_line *line)
{
	struct pins pins;
	int set, failed;

	if (access(line->directory, F_OK) && errno == ENOENT)
		return 0;
	if (open_pins(&pins, line->directory, 0))
		return 1;
	if (access(pins.set, F_OK))
		return 0;
	set = open(pins.set, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	failed = remove_set(&pins) || (set >= 0 && wait_for_bcc_helper(set));
	if (set >= 0)
		close(set);
	return failed;
}

int main(int count, char **arguments)
{
	struct command_line line = {
		.directory = "/run/weighbridge/bpf",
		.group = "weighbridge",
		.bcc = {.helper = WB_BCC_HELPER},
		.load = {.walk = "auto", .max_cgroups = 16384, .max_ended = 65536},
	};
	int wrong = read_options(count, arguments, &line);
	const char *command, *operand;

	if (wrong)
		return wrong < 0 ? 0 : usage();
	if (optind == count && !line.engine)
		return usage();
	/* The engine alone stands for loading it. */
	command = optind < count ? arguments[optind++] : "load";
	operand = optind < count ? arguments[optind++] : NULL;
	be_verbose(line.verbose);
	if (!line.load.networks && access(NETWORKS_FILE, F_OK) == 0)
		line.load.networks = NETWORKS_FILE;
	if (optind < count || (operand && strcmp(command, "networks") != 0))
		return usage();
	if (strcmp(command, "load") == 0)
		return load(&line);
	if (strcmp(command, "upgrade") == 0)
		return upgrade(&line);
	if (strcmp(command, "status") == 0)
		return print_status(line.directory, line.json);
	if (strcmp(command, "networks") == 0)
		return networks(&line, operand ? operand : line.load.networks);
	if (strcmp(command, "unload") == 0)
		return unload(&line);
	say("there is no command %s", command);
	return usage();
}
