"""Bounds both sides hold each other to. Each is checked where bytes enter, and counted when hit."""

from __future__ import annotations

SCHEMA_VERSION = 1

MAX_BATCH_BYTES = 1 << 20
"""One UsageBatch. 1,000 rows with 1 KiB paths do not fit, so the agent splits by bytes as well as by rows."""

MAX_BATCH_ROWS = 1_000

MAX_TABLE_EXPANSION = 16
"""A packed container table may open to so many times its bytes: honest ones have 3 to 5, and a bucket that counts what arrives
must not be paid for a thousandth of the work."""

MAX_MESSAGE_BYTES = 4 << 20
"""One gRPC message."""

MAX_ITEMS_PER_DELIVERY = 256

MAX_GROUP_BYTES = MAX_BATCH_BYTES
"""Batches of one request to the collector's side door: room for the largest, and nobody else is held up for long."""

WINDOW = 256
"""Out-of-order window of a stream at the collector, and the most an agent has unanswered."""

MAX_METADATA_BYTES = 16 << 10

MAX_TENANT_BYTES = 128
MAX_PATH_BYTES = 1_024
MAX_NAME_BYTES = 256
"""Container id, pod uid, runtime and name; host, producer and where its totals were read."""
MAX_DETAIL_BYTES = 256

MAX_DEVICES_PER_BATCH = 16_384
MAX_GAPS_PER_BATCH = 64

MAX_VALUE = 1 << 62
"""Above every real counter (146 years of CPU nanoseconds, 4 EiB); a negative number cast to unsigned is larger."""
