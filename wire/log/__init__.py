"""The collector's durable log as its readers see it: the collector writes it, collector and ledger read it.

    <directory>/00000000000000000000.log   named by the offset of its first byte in the whole log
    group  = mark | record …               one write, then one fdatasync; only then the next group is written
    record = header | note | batch         header: magic, sizes, CRC-32 of header and note, kind, received_at,
                                           agent, epoch, seq, SHA-256 of the batch
    mark   = a header of kind MARK         its seq is its own offset: all before it had been synced

    records.py    the format; pure: bytes -> records and damaged places
    segments.py   the files
    reader.py     from files to records, also of a log that is being written

What is proven. A mark is written only after everything before it was synced; so is a segment created, whose name
therefore says the same. What lies behind the last proof may be gone after a power cut, and other bytes in its place. A
bad place before a proof was synced and has changed since; behind it, it is a group that is being written or was torn.

Here does not belong: writing, and what a person does about damage (`collector/handoff/log`).
"""

from wire.log.reader import Damage, records_at, scan, unfinished_bytes
from wire.log.records import HANDED_ON, MAX_BODY_BYTES, UNVERIFIED, Kind, Record, frame
from wire.log.segments import segment_path, segments

__all__ = [
    "HANDED_ON",
    "MAX_BODY_BYTES",
    "UNVERIFIED",
    "Damage",
    "Kind",
    "Record",
    "frame",
    "records_at",
    "scan",
    "segment_path",
    "segments",
    "unfinished_bytes",
]
