// SPDX-License-Identifier: Apache-2.0
#include "host.h"

#include "say.h"

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

static const struct {
	int bit;
	const char *name, *what_for;
} capabilities[] = {
	{CAP_BPF, "CAP_BPF", "to make maps and load programs"},
	{CAP_PERFMON, "CAP_PERFMON", "to attach to tracepoints and read the kernel's counters"},
	{CAP_NET_ADMIN, "CAP_NET_ADMIN", "to count network traffic"},
};

int require_capabilities(void)
{
	unsigned long long effective = 0;
	char text[256];
	int missing = 0;
	FILE *status = fopen("/proc/self/status", "re");

	while (status && fgets(text, sizeof(text), status))
		sscanf(text, "CapEff: %llx", &effective);
	if (status)
		fclose(status);
	for (size_t i = 0; i < sizeof(capabilities) / sizeof(capabilities[0]); i++) {
		/* CAP_BPF and CAP_PERFMON were parts of CAP_SYS_ADMIN once, and it still stands for them. */
		if (effective & (1ULL << capabilities[i].bit) || effective & (1ULL << CAP_SYS_ADMIN))
			continue;
		say("%s is missing, %s: run as root, or give the unit AmbientCapabilities=%s", capabilities[i].name,
		    capabilities[i].what_for, capabilities[i].name);
		missing = 1;
	}
	return missing;
}

int find_cgroup2(char *path, size_t size)
{
	char text[4096], point[2048], type[64];
	int found = 0;
	FILE *mounts = fopen("/proc/self/mountinfo", "re");

	while (mounts && !found && fgets(text, sizeof(text), mounts)) {
		const char *behind = strstr(text, " - ");

		/* 36 35 98:0 /root /mount/point options ... - type source */
		if (!behind || sscanf(text, "%*s %*s %*s %*s %2047s", point) != 1 || sscanf(behind, " - %63s", type) != 1)
			continue;
		found = strcmp(type, "cgroup2") == 0 && strlen(point) < size;
	}
	if (mounts)
		fclose(mounts);
	if (!found)
		return fail("no cgroup v2 hierarchy is mounted: boot with systemd.unified_cgroup_hierarchy=1 or mount -t cgroup2");
	strcpy(path, point);
	return 0;
}

/*
 * The agent's RuntimeDirectory= may be among them, and one that is not its user's already is handed to that user by systemd with
 * all that lies below: root's pins.
 */
static int make_parent(const char *path, gid_t group)
{
	const struct group *entry = getgrgid(group);
	const struct passwd *agent = entry ? getpwnam(entry->gr_name) : NULL;

	if (mkdir(path, 0755))
		return errno == EEXIST ? 0 : -1;
	return agent ? chown(path, agent->pw_uid, group) : 0;
}

static int make_directories(const char *path, gid_t group)
{
	char part[4096];

	if (strlen(path) >= sizeof(part))
		return -1;
	strcpy(part, path);
	for (char *slash = strchr(part + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = 0;
		if (make_parent(part, group))
			return -1;
		*slash = '/';
	}
	return mkdir(part, 0750) && errno != EEXIST ? -1 : 0;
}

int require_bpffs(const char *directory, gid_t group)
{
	struct statfs filesystem;
	char options[64];

	if (make_directories(directory, group))
		return fail("%s: %s", directory, strerror(errno));
	if (statfs(directory, &filesystem))
		return fail("%s: %s", directory, strerror(errno));
	if (filesystem.f_type != BPF_FS_MAGIC) {
		/* A bpffs of its own: the system's is closed to everybody but root. */
		snprintf(options, sizeof(options), "mode=0750,gid=%u", group);
		if (mount("bpf", directory, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)) {
			if (errno == EPERM)
				return fail("%s is no bpffs, and mounting one needs CAP_SYS_ADMIN. Once, as root: mount -t bpf -o %s bpf %s",
					    directory, options, directory);
			return fail("mount -t bpf -o %s bpf %s: %s", options, directory, strerror(errno));
		}
	}
	/* Kernels before 6.9 mount it without looking at uid and gid. */
	if (chown(directory, -1, group) || chmod(directory, 0750))
		return fail("%s: cannot give it to group %u: %s", directory, group, strerror(errno));
	return 0;
}

int find_group(const char *name, gid_t *group)
{
	const struct group *entry = getgrnam(name);
	char *end;
	unsigned long number = strtoul(name, &end, 10);

	if (entry)
		*group = entry->gr_gid;
	else if (*name && !*end)
		*group = number;
	else
		return fail("there is no group %s: groupadd --system %s, or name another with --group", name, name);
	return 0;
}
