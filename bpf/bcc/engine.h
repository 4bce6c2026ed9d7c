/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What engine bcc offers to the text it shares with engine core. bcc brings types and helpers with it. The maps are there
 * already: the loader made them, and compiler.py says the descriptor and the room of each (FD_name, ROOM_name).
 */
#ifndef WEIGHBRIDGE_BCC_ENGINE_H
#define WEIGHBRIDGE_BCC_ENGINE_H

#include "records.h"

#define MAP(name) ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, FD_##name))

#define barrier_var(variable) asm volatile("" : "+r"(variable))

#include "overflow.bpf.h"

#endif
