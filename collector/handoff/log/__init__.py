"""The local durable log: batches verbatim, in segment files, one fdatasync for many.

The format is in `wire/log`: the ledger reads it too.

    files.py     what is beside the segments in the directory; the lock
    writer.py    DurableLog, the one who appends
    tail.py      Tail, who follows it within the collector
    recent.py    what was written last, for a reader that follows closely
    prune.py     where the log may begin: what nobody needs any more
    mend.py      repair, when a person decides

Invariants. A record is reported durable only after fdatasync returned. Behind the durable end the file has
nothing that somebody was told about. A mark is written only after everything before it was synced; so is a
segment created, whose name therefore says the same. The log is one stretch: what goes, goes from its beginning on, each
segment durably before the next.

Failure model. The disk keeps what fdatasync promised; of a write it did not promise it keeps any pages in any
order, and a kill leaves any beginning of it. So a bad place behind the last proof (mark, segment name,
checkpoint) is the torn write of a group that nobody was answered for: the start cuts it off and keeps a copy.
A bad place before a proof was synced and has changed since: `DamagedLog`, and a person decides. A group that is
the last for SEAL_AFTER_SECONDS, and the last of all at the end, gets a mark of its own behind it, so what rests
is proven (docs/decisions/0015). After a failed write or sync the page cache is not trusted: the file is cut back
to the durable end and reopened before anything else is written.
"""

from collector.handoff.log.files import DamagedLog, LogError, damage_text
from collector.handoff.log.mend import repair
from collector.handoff.log.prune import Keep
from collector.handoff.log.recent import Recent
from collector.handoff.log.tail import Tail
from collector.handoff.log.writer import DurableLog
from wire.log import (
    HANDED_ON,
    MAX_BODY_BYTES,
    UNVERIFIED,
    Damage,
    Kind,
    Record,
    frame,
    records_at,
    scan,
    segments,
    unfinished_bytes,
)

__all__ = [
    "HANDED_ON",
    "MAX_BODY_BYTES",
    "UNVERIFIED",
    "Damage",
    "DamagedLog",
    "DurableLog",
    "Keep",
    "Kind",
    "LogError",
    "Recent",
    "Record",
    "Tail",
    "damage_text",
    "frame",
    "records_at",
    "repair",
    "scan",
    "segments",
    "unfinished_bytes",
]
