-- What arrived. One row is one UsageBatch as its agent encoded it, rows of usage as columns of equal length: so a batch is
-- in the books whole or not at all. Read it with FINAL: the key makes a batch that was written twice one batch, whatever
-- crashed or was replayed. Two batches with one identity and different bytes stay two, and are a finding.
-- Times are nanoseconds of Unix time, [interval_start_ns, interval_end_ns) is wall clock, the duration CLOCK_BOOTTIME.
CREATE TABLE IF NOT EXISTS batches
(
    agent_id UUID,
    epoch UInt64,
    seq UInt64,
    digest FixedString(32),
    previous_digest FixedString(32),
    received_at_ns UInt64,
    schema_version UInt32,
    tenant LowCardinality(String),
    interval_start_ns UInt64 CODEC(Delta, ZSTD(1)),
    interval_end_ns UInt64 CODEC(Delta, ZSTD(1)),
    interval_duration_ns UInt64 CODEC(ZSTD(1)),
    boot_id LowCardinality(String),
    host LowCardinality(String),
    producer LowCardinality(String),
    flags UInt32,
    coverage UInt32,
    cpus UInt32,

    -- One entry per row of the batch.
    `units.cgroup_id` Array(UInt64) CODEC(ZSTD(1)),
    `units.cgroup_path` Array(LowCardinality(String)) CODEC(ZSTD(1)),
    `units.kind` Array(UInt8) CODEC(ZSTD(1)),
    `units.runtime` Array(LowCardinality(String)) CODEC(ZSTD(1)),
    `units.container_id` Array(LowCardinality(String)) CODEC(ZSTD(1)),
    `units.pod_uid` Array(LowCardinality(String)) CODEC(ZSTD(1)),
    `units.name` Array(LowCardinality(String)) CODEC(ZSTD(1)),
    `units.row_flags` Array(UInt32) CODEC(ZSTD(1)),
    -- Bit k: measure k was measured. Where it is clear the 0 means nothing.
    `units.known` Array(UInt64) CODEC(ZSTD(1)),
    `units.cpu_usage_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.cpu_user_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.cpu_system_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.cpu_periods` Array(UInt64) CODEC(ZSTD(1)),
    `units.cpu_throttled_periods` Array(UInt64) CODEC(ZSTD(1)),
    `units.cpu_throttled_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.memory_byte_seconds` Array(UInt64) CODEC(ZSTD(1)),
    `units.memory_working_set_byte_seconds` Array(UInt64) CODEC(ZSTD(1)),
    `units.memory_error_byte_seconds` Array(UInt64) CODEC(ZSTD(1)),
    `units.memory_peak_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.oom_kills` Array(UInt64) CODEC(ZSTD(1)),
    `units.io_read_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.io_write_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.io_read_ops` Array(UInt64) CODEC(ZSTD(1)),
    `units.io_write_ops` Array(UInt64) CODEC(ZSTD(1)),
    `units.pids_peak` Array(UInt64) CODEC(ZSTD(1)),
    `units.psi_cpu_some_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.psi_cpu_full_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.psi_memory_some_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.psi_memory_full_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.psi_io_some_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.psi_io_full_ns` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_rx_loopback_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_tx_loopback_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_rx_internal_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_tx_internal_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_rx_external_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_tx_external_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_rx_loopback_packets` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_tx_loopback_packets` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_rx_internal_packets` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_tx_internal_packets` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_rx_external_packets` Array(UInt64) CODEC(ZSTD(1)),
    `units.net_tx_external_packets` Array(UInt64) CODEC(ZSTD(1)),

    -- I/O by device; `row` counts from 0 in the columns above, as everywhere.
    `devices.row` Array(UInt32) CODEC(ZSTD(1)),
    `devices.major` Array(UInt32) CODEC(ZSTD(1)),
    `devices.minor` Array(UInt32) CODEC(ZSTD(1)),
    `devices.read_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `devices.write_bytes` Array(UInt64) CODEC(ZSTD(1)),
    `devices.read_ops` Array(UInt64) CODEC(ZSTD(1)),
    `devices.write_ops` Array(UInt64) CODEC(ZSTD(1)),

    -- Cumulative counters of a row's incarnation at the start of that row.
    `openings.row` Array(UInt32),
    `openings.known` Array(UInt64),
    `openings.cpu_usage_ns` Array(UInt64),
    `openings.cpu_user_ns` Array(UInt64),
    `openings.cpu_system_ns` Array(UInt64),
    `openings.cpu_periods` Array(UInt64),
    `openings.cpu_throttled_periods` Array(UInt64),
    `openings.cpu_throttled_ns` Array(UInt64),
    `openings.oom_kills` Array(UInt64),
    `openings.io_read_bytes` Array(UInt64),
    `openings.io_write_bytes` Array(UInt64),
    `openings.io_read_ops` Array(UInt64),
    `openings.io_write_ops` Array(UInt64),

    `gaps.start_ns` Array(UInt64),
    `gaps.end_ns` Array(UInt64),
    `gaps.reason` Array(UInt8),
    `gaps.count` Array(UInt64),
    `gaps.detail` Array(String),

    -- Conservation, in the batch that has the host's own row.
    has_host_totals Bool,
    host_cpu_usage_ns UInt64,
    host_cpu_deficit_ns UInt64,
    host_cpu_source LowCardinality(String),

    INDEX by_start interval_start_ns TYPE minmax GRANULARITY 1
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMMDD(toDateTime(intDiv(interval_end_ns, 1000000000), 'UTC'))
ORDER BY (agent_id, epoch, seq, digest)
-- A crash of the machine keeps what an INSERT said it wrote: only then does the source's position move on.
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, index_granularity_bytes = 1048576;

-- One row of usage per unit and interval. Its sums are the bill.
CREATE VIEW IF NOT EXISTS usage_rows AS
SELECT
    agent_id, epoch, seq, row_number - 1 AS row, tenant, interval_start_ns, interval_end_ns, interval_duration_ns,
    boot_id, host, flags, coverage,
    u.cgroup_id AS cgroup_id, u.cgroup_path AS cgroup_path, u.kind AS kind, u.runtime AS runtime,
    u.container_id AS container_id, u.pod_uid AS pod_uid, u.name AS name, u.row_flags AS row_flags, u.known AS known,
    u.cpu_usage_ns AS cpu_usage_ns,
    u.cpu_user_ns AS cpu_user_ns,
    u.cpu_system_ns AS cpu_system_ns,
    u.cpu_periods AS cpu_periods,
    u.cpu_throttled_periods AS cpu_throttled_periods,
    u.cpu_throttled_ns AS cpu_throttled_ns,
    u.memory_byte_seconds AS memory_byte_seconds,
    u.memory_working_set_byte_seconds AS memory_working_set_byte_seconds,
    u.memory_error_byte_seconds AS memory_error_byte_seconds,
    u.memory_peak_bytes AS memory_peak_bytes,
    u.oom_kills AS oom_kills,
    u.io_read_bytes AS io_read_bytes,
    u.io_write_bytes AS io_write_bytes,
    u.io_read_ops AS io_read_ops,
    u.io_write_ops AS io_write_ops,
    u.pids_peak AS pids_peak,
    u.psi_cpu_some_ns AS psi_cpu_some_ns,
    u.psi_cpu_full_ns AS psi_cpu_full_ns,
    u.psi_memory_some_ns AS psi_memory_some_ns,
    u.psi_memory_full_ns AS psi_memory_full_ns,
    u.psi_io_some_ns AS psi_io_some_ns,
    u.psi_io_full_ns AS psi_io_full_ns,
    u.net_rx_loopback_bytes AS net_rx_loopback_bytes,
    u.net_tx_loopback_bytes AS net_tx_loopback_bytes,
    u.net_rx_internal_bytes AS net_rx_internal_bytes,
    u.net_tx_internal_bytes AS net_tx_internal_bytes,
    u.net_rx_external_bytes AS net_rx_external_bytes,
    u.net_tx_external_bytes AS net_tx_external_bytes,
    u.net_rx_loopback_packets AS net_rx_loopback_packets,
    u.net_tx_loopback_packets AS net_tx_loopback_packets,
    u.net_rx_internal_packets AS net_rx_internal_packets,
    u.net_tx_internal_packets AS net_tx_internal_packets,
    u.net_rx_external_packets AS net_rx_external_packets,
    u.net_tx_external_packets AS net_tx_external_packets
FROM batches FINAL
ARRAY JOIN units AS u, arrayEnumerate(units.cgroup_id) AS row_number;

-- What an incarnation's counters stood at when an epoch first saw it.
CREATE VIEW IF NOT EXISTS opening_rows AS
SELECT
    agent_id, epoch, seq, o.row AS row, tenant, interval_start_ns, boot_id,
    units.cgroup_id[o.row + 1] AS cgroup_id, units.cgroup_path[o.row + 1] AS cgroup_path, units.kind[o.row + 1] AS kind,
    o.known AS known,
    o.cpu_usage_ns AS cpu_usage_ns,
    o.cpu_user_ns AS cpu_user_ns,
    o.cpu_system_ns AS cpu_system_ns,
    o.cpu_periods AS cpu_periods,
    o.cpu_throttled_periods AS cpu_throttled_periods,
    o.cpu_throttled_ns AS cpu_throttled_ns,
    o.oom_kills AS oom_kills,
    o.io_read_bytes AS io_read_bytes,
    o.io_write_bytes AS io_write_bytes,
    o.io_read_ops AS io_read_ops,
    o.io_write_ops AS io_write_ops
FROM batches FINAL
ARRAY JOIN openings AS o;

CREATE VIEW IF NOT EXISTS gap_rows AS
SELECT agent_id, epoch, seq, host, g.start_ns AS start_ns, g.end_ns AS end_ns, g.reason AS reason, g.count AS count, g.detail AS detail
FROM batches FINAL
ARRAY JOIN gaps AS g;

-- What arrived and is not booked: parked (its release will be), rejected for ever, refused, or in conflict with what is booked.
CREATE TABLE IF NOT EXISTS verdicts
(
    agent_id UUID,
    epoch UInt64,
    seq UInt64,
    digest FixedString(32),
    kind Enum8('parked' = 1, 'rejected' = 2, 'refused' = 3, 'conflict' = 4),
    tenant String,
    -- 0 where the bytes could not be read.
    interval_start_ns UInt64,
    interval_end_ns UInt64,
    received_at_ns UInt64,
    reason String
)
ENGINE = ReplacingMergeTree
ORDER BY (agent_id, epoch, seq, digest, kind)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;

-- How far each source is read. Written after what was read is booked, so a crash reads some of it again.
CREATE TABLE IF NOT EXISTS progress
(
    place String,
    position UInt64,
    written_at_ns UInt64
)
ENGINE = ReplacingMergeTree(written_at_ns)
ORDER BY place
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;

-- What a source had and can no longer give: offsets [first, last) of a place. Batches in it show as missing.
CREATE TABLE IF NOT EXISTS lost_ranges
(
    place String,
    first UInt64,
    last UInt64,
    found_at_ns UInt64
)
ENGINE = ReplacingMergeTree
ORDER BY (place, first, last)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;
