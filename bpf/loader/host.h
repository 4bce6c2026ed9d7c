/* SPDX-License-Identifier: Apache-2.0 */
/* What the host must offer: privileges, a bpffs, the v2 hierarchy. */
#ifndef WEIGHBRIDGE_HOST_H
#define WEIGHBRIDGE_HOST_H

#include <sys/types.h>

/* 0, or 1 after naming each capability that is missing. */
int require_capabilities(void);

/* Mount point of the cgroup v2 hierarchy into `path`. 0, or 1 after saying why not. */
int find_cgroup2(char *path, size_t size);

/* Make sure that `directory` is a bpffs whose files the group may reach. 0, or 1 after saying why not. */
int require_bpffs(const char *directory, gid_t group);

/* Group id of a name or number. 0, or 1 after saying why not. */
int find_group(const char *name, gid_t *group);

#endif
