// SPDX-License-Identifier: GPL-2.0-only
/* Network traffic, as engine bcc counts it: the same text as engine core's. */
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>

#include "bcc/engine.h"

#define RECENT_PEERS ROOM_recent_peers

#include "network.bpf.h"

int on_ingress(struct __sk_buff *skb)
{
	return count(skb, true);
}

int on_egress(struct __sk_buff *skb)
{
	return count(skb, false);
}
