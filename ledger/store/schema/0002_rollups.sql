-- Rollups: an hour of usage_rows is added up as a whole. A build counts once its row in rollup_builds says so, and before an
-- hour that is built changes, that row says 'stale'. So what a reader of the views sees is always equal to the rows it was made
-- of, also between any two writes. Days and periods are sums of hours.
CREATE TABLE IF NOT EXISTS rollup_builds
(
    start_ns UInt64,
    generation UInt64,
    state Enum8('built' = 1, 'stale' = 2),
    -- Of the batches it was made of: how many, and the sum of cityHash64(agent_id, epoch, seq, digest).
    batches UInt64,
    fingerprint UInt64,
    written_at_ns UInt64
)
ENGINE = ReplacingMergeTree(generation)
ORDER BY start_ns
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;

-- By tenant and minute.
CREATE TABLE IF NOT EXISTS usage_minutes
(
    start_ns UInt64,
    -- That of the build it belongs to; only the one that rollup_builds names counts.
    generation UInt64,
    tenant LowCardinality(String),
    rows SimpleAggregateFunction(sum, UInt64),
    -- Rows whose interval crossed a boundary and was divided by duration.
    divided_rows SimpleAggregateFunction(sum, UInt64),
    -- Bit k: measure k was measured in every row, in some row.
    known_all SimpleAggregateFunction(groupBitAnd, UInt64),
    known_any SimpleAggregateFunction(groupBitOr, UInt64),
    units AggregateFunction(uniqExact, String, UInt64),
    -- CPUs in use, row by row: 1 % relative error (DDSketch), the same however parts are merged.
    cpus_used AggregateFunction(quantilesDD(0.01, 0.5, 0.95, 0.99), Float64),
    cpu_usage_ns SimpleAggregateFunction(sum, UInt128),
    cpu_user_ns SimpleAggregateFunction(sum, UInt128),
    cpu_system_ns SimpleAggregateFunction(sum, UInt128),
    cpu_periods SimpleAggregateFunction(sum, UInt128),
    cpu_throttled_periods SimpleAggregateFunction(sum, UInt128),
    cpu_throttled_ns SimpleAggregateFunction(sum, UInt128),
    memory_byte_seconds SimpleAggregateFunction(sum, UInt128),
    memory_working_set_byte_seconds SimpleAggregateFunction(sum, UInt128),
    memory_error_byte_seconds SimpleAggregateFunction(sum, UInt128),
    memory_peak_bytes SimpleAggregateFunction(max, UInt64),
    oom_kills SimpleAggregateFunction(sum, UInt128),
    io_read_bytes SimpleAggregateFunction(sum, UInt128),
    io_write_bytes SimpleAggregateFunction(sum, UInt128),
    io_read_ops SimpleAggregateFunction(sum, UInt128),
    io_write_ops SimpleAggregateFunction(sum, UInt128),
    pids_peak SimpleAggregateFunction(max, UInt64),
    psi_cpu_some_ns SimpleAggregateFunction(sum, UInt128),
    psi_cpu_full_ns SimpleAggregateFunction(sum, UInt128),
    psi_memory_some_ns SimpleAggregateFunction(sum, UInt128),
    psi_memory_full_ns SimpleAggregateFunction(sum, UInt128),
    psi_io_some_ns SimpleAggregateFunction(sum, UInt128),
    psi_io_full_ns SimpleAggregateFunction(sum, UInt128),
    net_rx_loopback_bytes SimpleAggregateFunction(sum, UInt128),
    net_tx_loopback_bytes SimpleAggregateFunction(sum, UInt128),
    net_rx_internal_bytes SimpleAggregateFunction(sum, UInt128),
    net_tx_internal_bytes SimpleAggregateFunction(sum, UInt128),
    net_rx_external_bytes SimpleAggregateFunction(sum, UInt128),
    net_tx_external_bytes SimpleAggregateFunction(sum, UInt128),
    net_rx_loopback_packets SimpleAggregateFunction(sum, UInt128),
    net_tx_loopback_packets SimpleAggregateFunction(sum, UInt128),
    net_rx_internal_packets SimpleAggregateFunction(sum, UInt128),
    net_tx_internal_packets SimpleAggregateFunction(sum, UInt128),
    net_rx_external_packets SimpleAggregateFunction(sum, UInt128),
    net_tx_external_packets SimpleAggregateFunction(sum, UInt128)
)
ENGINE = AggregatingMergeTree
PARTITION BY toYYYYMM(toDateTime(intDiv(start_ns, 1000000000), 'UTC'))
ORDER BY (tenant, start_ns, generation)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;

-- By tenant, hour and unit.
CREATE TABLE IF NOT EXISTS usage_hours
(
    start_ns UInt64,
    -- That of the build it belongs to; only the one that rollup_builds names counts.
    generation UInt64,
    tenant LowCardinality(String),
    agent_id UUID,
    boot_id LowCardinality(String),
    cgroup_id UInt64,
    host SimpleAggregateFunction(max, String),
    kind SimpleAggregateFunction(max, UInt8),
    runtime SimpleAggregateFunction(max, String),
    container_id SimpleAggregateFunction(max, String),
    pod_uid SimpleAggregateFunction(max, String),
    name SimpleAggregateFunction(max, String),
    cgroup_path SimpleAggregateFunction(max, String),
    rows SimpleAggregateFunction(sum, UInt64),
    -- Rows whose interval crossed a boundary and was divided by duration.
    divided_rows SimpleAggregateFunction(sum, UInt64),
    -- Bit k: measure k was measured in every row, in some row.
    known_all SimpleAggregateFunction(groupBitAnd, UInt64),
    known_any SimpleAggregateFunction(groupBitOr, UInt64),
    units AggregateFunction(uniqExact, String, UInt64),
    -- CPUs in use, row by row: 1 % relative error (DDSketch), the same however parts are merged.
    cpus_used AggregateFunction(quantilesDD(0.01, 0.5, 0.95, 0.99), Float64),
    cpu_usage_ns SimpleAggregateFunction(sum, UInt128),
    cpu_user_ns SimpleAggregateFunction(sum, UInt128),
    cpu_system_ns SimpleAggregateFunction(sum, UInt128),
    cpu_periods SimpleAggregateFunction(sum, UInt128),
    cpu_throttled_periods SimpleAggregateFunction(sum, UInt128),
    cpu_throttled_ns SimpleAggregateFunction(sum, UInt128),
    memory_byte_seconds SimpleAggregateFunction(sum, UInt128),
    memory_working_set_byte_seconds SimpleAggregateFunction(sum, UInt128),
    memory_error_byte_seconds SimpleAggregateFunction(sum, UInt128),
    memory_peak_bytes SimpleAggregateFunction(max, UInt64),
    oom_kills SimpleAggregateFunction(sum, UInt128),
    io_read_bytes SimpleAggregateFunction(sum, UInt128),
    io_write_bytes SimpleAggregateFunction(sum, UInt128),
    io_read_ops SimpleAggregateFunction(sum, UInt128),
    io_write_ops SimpleAggregateFunction(sum, UInt128),
    pids_peak SimpleAggregateFunction(max, UInt64),
    psi_cpu_some_ns SimpleAggregateFunction(sum, UInt128),
    psi_cpu_full_ns SimpleAggregateFunction(sum, UInt128),
    psi_memory_some_ns SimpleAggregateFunction(sum, UInt128),
    psi_memory_full_ns SimpleAggregateFunction(sum, UInt128),
    psi_io_some_ns SimpleAggregateFunction(sum, UInt128),
    psi_io_full_ns SimpleAggregateFunction(sum, UInt128),
    net_rx_loopback_bytes SimpleAggregateFunction(sum, UInt128),
    net_tx_loopback_bytes SimpleAggregateFunction(sum, UInt128),
    net_rx_internal_bytes SimpleAggregateFunction(sum, UInt128),
    net_tx_internal_bytes SimpleAggregateFunction(sum, UInt128),
    net_rx_external_bytes SimpleAggregateFunction(sum, UInt128),
    net_tx_external_bytes SimpleAggregateFunction(sum, UInt128),
    net_rx_loopback_packets SimpleAggregateFunction(sum, UInt128),
    net_tx_loopback_packets SimpleAggregateFunction(sum, UInt128),
    net_rx_internal_packets SimpleAggregateFunction(sum, UInt128),
    net_tx_internal_packets SimpleAggregateFunction(sum, UInt128),
    net_rx_external_packets SimpleAggregateFunction(sum, UInt128),
    net_tx_external_packets SimpleAggregateFunction(sum, UInt128)
)
ENGINE = AggregatingMergeTree
PARTITION BY toYYYYMM(toDateTime(intDiv(start_ns, 1000000000), 'UTC'))
ORDER BY (tenant, start_ns, generation, agent_id, boot_id, cgroup_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;

-- The builds that count. Hours that are not built, or stale, are not in here: `weighbridge-ledger usage` adds those up from the rows.
CREATE VIEW IF NOT EXISTS usage_by_hour AS
SELECT * FROM usage_hours
WHERE (start_ns, generation) IN (SELECT start_ns, generation FROM rollup_builds FINAL WHERE state = 'built');

CREATE VIEW IF NOT EXISTS usage_by_minute AS
SELECT * FROM usage_minutes
WHERE (intDiv(start_ns, 3600000000000) * 3600000000000, generation) IN (SELECT start_ns, generation FROM rollup_builds FINAL WHERE state = 'built');
