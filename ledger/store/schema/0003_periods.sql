-- Billing periods. Everything here is only ever added to.
CREATE TABLE IF NOT EXISTS manifests
(
    period String,
    digest FixedString(32),
    closed_at_ns UInt64,
    -- Canonical JSON; SHA-256 of it is the digest, and the next manifest names it.
    manifest String CODEC(ZSTD(3))
)
ENGINE = ReplacingMergeTree
ORDER BY (period, digest)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;

-- What an operator took on himself: that a period is closed although a blocker stands.
CREATE TABLE IF NOT EXISTS waivers
(
    period String,
    blocker String,
    reason String,
    waived_by String,
    waived_at_ns UInt64
)
ENGINE = ReplacingMergeTree(waived_at_ns)
ORDER BY (period, blocker)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;

-- Hosts that are gone: nothing more is waited for from then on.
CREATE TABLE IF NOT EXISTS retirements
(
    agent_id UUID,
    retired_at_ns UInt64,
    reason String,
    retired_by String,
    written_at_ns UInt64
)
ENGINE = ReplacingMergeTree(written_at_ns)
ORDER BY agent_id
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;

-- Each time that everything was compared, and what differed.
CREATE TABLE IF NOT EXISTS reconciliations
(
    at_ns UInt64,
    differences UInt64
)
ENGINE = MergeTree
ORDER BY at_ns
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1;
