/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The one layout shared by the programs, the loader and the agent (agent/read/probes/records.py mirrors it; a
 * test compares the two byte for byte). Host byte order, natural alignment, no implicit padding.
 *
 * Change nothing here without a new WB_LAYOUT: pins of two layouts live side by side in v<layout>/.
 */
#ifndef WEIGHBRIDGE_RECORDS_H
#define WEIGHBRIDGE_RECORDS_H

#define WB_LAYOUT 1

/*
 * Kubernetes' deepest usual path has 190 bytes, and 320 when its node is a container itself. With 360 a tombstone takes 512
 * bytes of the kernel's memory, not 1024.
 */
#define WB_PATH_BYTES 360

/* What a record can tell. A clear bit: unknown, and the field is 0. */
#define WB_KNOWS_CPU (1u << 0)
#define WB_KNOWS_THROTTLING (1u << 1)
#define WB_KNOWS_MEMORY (1u << 2)
#define WB_KNOWS_OOM_KILLS (1u << 3)
#define WB_KNOWS_PIDS (1u << 4)
#define WB_KNOWS_PIDS_PEAK (1u << 5)
#define WB_KNOWS_PRESSURE (1u << 6)
#define WB_KNOWS_MEMORY_PEAK (1u << 7)
/* No cgroup was ever made in it. */
#define WB_CHILDLESS (1u << 30)
/* The path is longer than WB_PATH_BYTES - 1 and was cut. */
#define WB_PATH_CUT (1u << 31)

/*
 * births: HASH, u64 cgroup id -> struct wb_birth. Written at mkdir, deleted when a tombstone is written (engine
 * bcc: at release, since it goes by births to find the ends it missed). Agent: read.
 */
struct wb_birth {
	unsigned long long parent_id; /* 0: not known (engine bcc, paths beyond WB_PATH_BYTES) */
	unsigned long long born_boottime_ns;
	unsigned int flags; /* WB_PATH_CUT */
	unsigned int level; /* 0 is the root */
	unsigned int children; /* made in it since, gone ones included */
	unsigned int unused;
	char path[WB_PATH_BYTES]; /* from the root of the v2 hierarchy, NUL-terminated */
};

/*
 * tombstones: HASH, u64 cgroup id -> struct wb_tombstone. Written at rmdir (prompt; released_boottime_ns = 0) and
 * again at release (exact). Deleted by the agent, after the commit that billed it.
 *
 * cpu_*: cumulative since birth, what lies below included, as cpu.stat would say after a flush. memory_*,
 * oom_kills: at rmdir, as memory.current, memory.peak and memory.events say.
 */
struct wb_tombstone {
	unsigned long long parent_id;
	unsigned long long born_boottime_ns; /* 0: before the probes were there */
	unsigned long long removed_boottime_ns;
	unsigned long long released_boottime_ns; /* 0: not yet */
	unsigned long long cpu_usage_ns;
	unsigned long long cpu_user_ns; /* not scaled to fit cpu_usage_ns, as cpu.stat's is */
	unsigned long long cpu_system_ns;
	unsigned long long memory_current_bytes;
	unsigned long long memory_peak_bytes;
	unsigned long long oom_kills;
	unsigned int flags; /* WB_KNOWS_*, WB_CHILDLESS, WB_PATH_CUT */
	unsigned int level;
	char path[WB_PATH_BYTES];
};

/* network: PERCPU_HASH, u64 cgroup id -> struct wb_network. Never reset. Deleted by the agent, after release. */
enum wb_class { WB_LOOPBACK = 0, WB_INTERNAL = 1, WB_EXTERNAL = 2, WB_CLASSES = 3 };

struct wb_traffic {
	unsigned long long bytes; /* from the IP header on */
	unsigned long long skbs; /* passes through the stack: what an interface's packet counter sees */
	unsigned long long segments; /* packets of the wire: a GSO or GRO skb stands for several */
};

struct wb_network {
	struct wb_traffic rx[WB_CLASSES];
	struct wb_traffic tx[WB_CLASSES];
};

/* classes: LPM_TRIE, struct wb_prefix -> u32 enum wb_class. IPv4 is mapped (::ffff:0:0/96). No match: external. */
struct wb_prefix {
	unsigned int bits; /* 0 to 128 */
	unsigned char address[16]; /* network order */
};

/*
 * snapshot: ARRAY, mmapable. Element 0 begins with the head, the others are full of rows: the cgroups below the root, in no
 * order. Written whenever one byte is read from the pin `walk` (one read is enough, and cheapest: the css walk's iterator is
 * over tasks). `sequence` is odd while that happens. The agent reads it with BPF_MAP_LOOKUP_BATCH, which costs by the
 * element: the kernel refuses to map a descriptor into memory that was opened read-only (mmap drops VM_SHARED from it: EINVAL).
 */
#define WB_ROWS_IN_ELEMENT 24

struct wb_snapshot_head {
	unsigned long long sequence;
	unsigned long long rows;
	unsigned long long missed; /* cgroups this walk had no room for */
	unsigned long long begun_boottime_ns;
	unsigned long long ended_boottime_ns;
};

/* Cumulative, what lies below included, as the files of the cgroup say (throttling, pressure, pids: its own). */
struct wb_row {
	unsigned long long cgroup_id;
	unsigned long long parent_id;
	unsigned long long cpu_usage_ns;
	unsigned long long cpu_user_ns; /* not scaled */
	unsigned long long cpu_system_ns;
	unsigned long long cpu_periods;
	unsigned long long cpu_throttled_periods;
	unsigned long long cpu_throttled_ns;
	unsigned long long memory_current_bytes;
	unsigned long long memory_peak_bytes;
	unsigned long long memory_limit_bytes; /* page_counter's maximum: unlimited */
	unsigned long long oom_kills;
	unsigned long long pids_current;
	unsigned long long pids_peak;
	/* Of the kernel's last averaging (every 2 s while active); the files average anew when read. */
	unsigned long long psi_io_some_ns;
	unsigned long long psi_io_full_ns;
	unsigned long long psi_memory_some_ns;
	unsigned long long psi_memory_full_ns;
	unsigned long long psi_cpu_some_ns;
	unsigned long long psi_cpu_full_ns;
	unsigned int flags; /* WB_KNOWS_* */
	unsigned int level;
};

struct wb_rows {
	struct wb_row row[WB_ROWS_IN_ELEMENT];
};

/* overflow: ARRAY of one. What there was no room for since the load. */
struct wb_overflow {
	unsigned long long births;
	unsigned long long tombstones; /* counted once per record that could not be written */
	unsigned long long tombstones_cpu_ns; /* at release */
	unsigned long long network_skbs;
	unsigned long long network_bytes;
	unsigned long long snapshot_rows;
	unsigned long long wakes;
	unsigned long long paths_cut;
};

/* wake: RINGBUF of u64 cgroup ids, at birth. A hint that `births` has something new; maps are the truth. */

/*
 * paths: HASH, char[WB_PATH_BYTES] (zero-padded) -> struct wb_place. Engine bcc's own: a tracepoint says a cgroup's path and
 * not its parent. Cgroups that live; written at mkdir, deleted at rmdir.
 */
struct wb_place {
	unsigned long long id;
	unsigned int level;
	unsigned int unused;
};

/* about: ARRAY of one, written by the loader or engine bcc's helper. Its pin is made last: what has no `about` is not ready. */
#define WB_HAS_LIFECYCLE (1u << 0)
#define WB_HAS_NETWORK (1u << 1)
#define WB_HAS_SNAPSHOT (1u << 2)

enum wb_walk {
	WB_WALK_NONE = 0,
	WB_WALK_CSS = 1, /* RCU walk of the css tree: no lock that container starts wait for */
	WB_WALK_CGROUP_ITERATOR = 2, /* holds cgroup_mutex for the walk */
	WB_WALK_TABLE = 3, /* own table of cgroups; the reader must have the counters flushed by the kernel */
};

enum wb_engine { WB_ENGINE_CORE = 1, WB_ENGINE_BCC = 2 };

struct wb_about {
	unsigned int layout;
	unsigned int engine; /* enum wb_engine */
	unsigned int has; /* WB_HAS_* */
	unsigned int walk; /* enum wb_walk */
	unsigned long long load_id; /* boottime of the load: counters of another load_id start from 0 */
	unsigned long long programs_boottime_ns; /* of the load or the last upgrade */
	char version[32]; /* of the programs, NUL-terminated */
};

/* .rodata.host: constants of the programs, set by the loader before it loads them. */
struct wb_host {
	unsigned int possible_cpus;
	unsigned int page_bytes;
};

#endif
