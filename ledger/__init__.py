"""Batches -> billing. The folders are the flow: `consume` (where batches come from), `book` (what is done with them),
`store` (ClickHouse), `rollup` (hours and days), `periods` (closed for ever), `recover` (what openings say no batch carried).
`ledger` is all of that as one object, `worker` the thread that owns it, `server` the process, `cli` the door for people.
"""

__version__ = "0.1.0"
