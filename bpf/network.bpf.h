/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Bytes and packets per cgroup and class, at the root of the v2 hierarchy. A socket stays charged to the cgroup that made it.
 * Never drops anything: `count` answers 1, whatever happens.
 *
 * Both engines count by this text: network.bpf.c (core) and bcc/network.bcc.c. Each includes before it what is different
 * between them: types, helpers, the protocols' headers, maps (MAP, RECENT_PEERS) and COUNT_OVERFLOW.
 */
#ifndef WEIGHBRIDGE_NETWORK_BPF_H
#define WEIGHBRIDGE_NETWORK_BPF_H

#include "records.h"

#define LOOPBACK_IFINDEX 1 /* the first device of every network namespace */

static __always_inline struct wb_network *counters_of(u64 id)
{
	struct wb_network *counters = bpf_map_lookup_elem(MAP(network), &id);

	if (!counters) {
		struct wb_network nothing = {};

		/* Two CPUs may come here at once: the second finds the first one's element. */
		bpf_map_update_elem(MAP(network), &id, &nothing, BPF_NOEXIST);
		counters = bpf_map_lookup_elem(MAP(network), &id);
	}
	return counters;
}

static __always_inline u32 look_up(struct wb_prefix *peer)
{
	const u32 *class = bpf_map_lookup_elem(MAP(classes), peer);

	return class ? *class : WB_EXTERNAL;
}

/*
 * A walk down the trie costs as much as all the rest, so the classes of the last IPv4 peers are remembered. An entry is
 * one word, address | changes | class: others write it at the same time.
 */
static __always_inline u32 class_of_ipv4(u32 address)
{
	u32 zero = 0, slot = (address ^ address >> 16 ^ address >> 24) % RECENT_PEERS, class;
	const u32 *changes = bpf_map_lookup_elem(MAP(class_changes), &zero);
	u64 *recent = bpf_map_lookup_elem(MAP(recent_peers), &slot), wanted;
	struct wb_prefix peer = {.bits = 128};

	if (!changes || !recent)
		return WB_EXTERNAL;
	/* A change after this line makes what is remembered below void. */
	wanted = (u64)address << 32 | (*changes << 2 | 3);
	if ((*recent | 3) == wanted && (*recent & 3) < WB_CLASSES)
		return *recent & 3;
	peer.address[10] = peer.address[11] = 0xff;
	__builtin_memcpy(peer.address + 12, &address, sizeof(address));
	class = look_up(&peer);
	*recent = (wanted & ~3ULL) | (class & 3);
	return class;
}

static __always_inline u64 class_of(struct __sk_buff *skb, bool received)
{
	const void *end = (void *)(long)skb->data_end;
	const struct iphdr *ipv4 = (void *)(long)skb->data;
	const struct ipv6hdr *ipv6 = (void *)(long)skb->data;
	struct wb_prefix peer = {.bits = 128};

	if (skb->ifindex == LOOPBACK_IFINDEX)
		return WB_LOOPBACK;
	/* The stack has pulled the header of every packet that gets here into the linear part. */
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return (void *)(ipv4 + 1) <= end ? class_of_ipv4(received ? ipv4->saddr : ipv4->daddr) : WB_EXTERNAL;
	if ((void *)(ipv6 + 1) > end)
		return WB_EXTERNAL;
	__builtin_memcpy(peer.address, received ? &ipv6->saddr : &ipv6->daddr, sizeof(peer.address));
	return look_up(&peer);
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

#endif
