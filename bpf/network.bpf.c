// SPDX-License-Identifier: GPL-2.0-only
/* Network traffic, as engine core counts it: maps and programs. What is counted is in network.bpf.h. */
#include "kernel.h"
#include "maps.bpf.h"

#include <bpf/bpf_endian.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

char LICENSE[] SEC("license") = "GPL";

#define RECENT_PEERS 1024 /* a power of two */

OVERFLOW_MAP;

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct wb_network);
} network SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 2048); /* twice what the loader enters: it adds new ones before it deletes old ones */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct wb_prefix);
	__type(value, u32);
} classes SEC(".maps");

/* How often `classes` was changed: the loader counts. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} class_changes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, RECENT_PEERS);
	__type(key, u32);
	__type(value, u64);
} recent_peers SEC(".maps");

#include "network.bpf.h"

SEC("cgroup_skb/ingress")
int on_ingress(struct __sk_buff *skb)
{
	return count(skb, true);
}

SEC("cgroup_skb/egress")
int on_egress(struct __sk_buff *skb)
{
	return count(skb, false);
}
