/* SPDX-License-Identifier: Apache-2.0 */
/* Which peers are internal: a file of CIDRs, into the map `classes`. */
#ifndef WEIGHBRIDGE_NETWORKS_H
#define WEIGHBRIDGE_NETWORKS_H

struct pins;

/* Before the programs count. A set that is replaced keeps its networks unless a file gives others. 0 or 1. */
int fill_classes(const struct pins *pins, const char *file);

/*
 * While they count: make `classes` hold exactly the networks of `file`: one CIDR a line, "!" before one that is external though
 * it lies within another, "#" begins a comment. NULL: the private networks of RFC 1918, RFC 6598, RFC 3927, RFC 4193 and
 * link-local. New ones are entered before old ones are deleted; then `class_changes` is counted up, which voids what CPUs
 * remember. A file with an error changes nothing. 0, or 1 after saying file and line.
 */
int change_networks(const struct pins *pins, const char *file);

#endif
