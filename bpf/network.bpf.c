// SPDX-License-Identifier: GPL-2.0-only
/*
 * Bytes and packets per cgroup and class, at the root of the v2 hierarchy. A socket stays charged to the cgroup that made it.
 * Never drops anything: both programs answer 1, whatever happens.
 */
#include "kernel.h"
#include "maps.bpf.h"

#include <bpf/bpf_endian.h>
#include <linux/if_ether.h>

char LICENSE[] SEC("license") = "GPL";

#define LOOPBACK_IFINDEX 1 /* the first device of every network namespace */
#define IPV4_SOURCE_AT 12
#define IPV4_DESTINATION_AT 16
#define IPV6_SOURCE_AT 8
#define IPV6_DESTINATION_AT 24

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

static __always_inline struct wb_network *counters_of(u64 id)
{
	static const struct wb_network nothing;
	struct wb_network *counters = bpf_map_lookup_elem(&network, &id);

	if (counters)
		return counters;
	/* Two CPUs may come here at once: the second finds the first one's element. */
	bpf_map_update_elem(&network, &id, &nothing, BPF_NOEXIST);
	return bpf_map_lookup_elem(&network, &id);
}

static __always_inline u64 class_of(struct __sk_buff *skb, bool received)
{
	struct wb_prefix peer = {.bits = 128};
	u32 *class;

	if (skb->ifindex == LOOPBACK_IFINDEX)
		return WB_LOOPBACK;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		peer.address[10] = peer.address[11] = 0xff;
		if (bpf_skb_load_bytes(skb, received ? IPV4_SOURCE_AT : IPV4_DESTINATION_AT, peer.address + 12, 4))
			return WB_EXTERNAL;
	} else if (bpf_skb_load_bytes(skb, received ? IPV6_SOURCE_AT : IPV6_DESTINATION_AT, peer.address, 16)) {
		return WB_EXTERNAL;
	}
	class = bpf_map_lookup_elem(&classes, &peer);
	return class ? *class : WB_EXTERNAL;
}

static __always_inline int count(struct __sk_buff *skb, bool received)
{
	struct wb_network *counters = counters_of(bpf_skb_cgroup_id(skb));
	u64 class = class_of(skb, received);
	u32 segments = skb->gso_segs;
	struct wb_traffic *traffic;

	barrier_var(class); /* so that the compiler bounds the register it indexes with */

	if (!counters || class >= WB_CLASSES) {
		COUNT_OVERFLOW(network_skbs, 1);
		COUNT_OVERFLOW(network_bytes, skb->len);
		return 1;
	}
	traffic = received ? &counters->rx[class] : &counters->tx[class];
	traffic->bytes += skb->len;
	traffic->skbs += 1;
	traffic->segments += segments ? segments : 1;
	return 1;
}

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
