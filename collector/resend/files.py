"""Files of batches, as agents export them or as JSON lines, record by record. What is no batch is named, and passed over.

JSON lines are UsageBatch in protobuf's JSON form (https://protobuf.dev/programming-guides/json/), one a line. The identity
is part of the record, and the same record is always encoded to the same bytes, so bringing it twice changes nothing. A
writer of JSON need not know a digest: a `previous_digest` that is left out is that of the stream's record before it in
these files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from collector.errors import CollectorError
from collector.resend.batches import Found, Source, unreadable
from wire.delimited import delimited
from wire.identity import AgentId, BatchId, digest
from wire.limits import MAX_BATCH_BYTES
from wire.v1 import usage_pb2 as pb

Form = Literal["auto", "delimited", "json"]

MAX_LINE_BYTES = 16 * MAX_BATCH_BYTES
MAX_LINE_OBJECTS = 1 << 16
"""Of which a batch has some thousand. Each costs the parser 150 bytes, also if nothing is in it."""
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_JSON_BEGINS = re.compile(rb'\{\s*["}]|\s')
"""A delimited file has a length and then the tag of schema_version there."""

_Streams = dict[tuple[str, int], tuple[int, bytes]]
"""(agent_id, epoch) -> (seq, digest) of the last record."""


class BatchFiles:
    """Reads files one after the other. JSON lines may go on with a stream of the file before."""

    def __init__(self, form: Form = "auto") -> None:
        self._form = form
        self._last: _Streams = {}

    def read(self, path: Path) -> Source:
        """Every record of a file. CollectorError if it cannot be read."""
        try:
            with path.open("rb") as file:
                form = self._form
                if form == "auto":
                    form = "json" if _JSON_BEGINS.match(file.read(64)) else "delimited"
                    file.seek(0)
                yield from self._json_lines(path, file) if form == "json" else self._delimited(path, file)
        except OSError as error:
            raise CollectorError(
                f"{path}: {error.strerror}; name a file of `weighbridge-agent spool export` or of JSON lines"
            ) from error

    def _delimited(self, path: Path, file: BinaryIO) -> Source:
        for found in delimited(file):
            place = f"{path} at byte {found.offset}"
            if found.trouble:
                yield unreadable(place, found.end, found.trouble)
                continue
            try:
                yield described(place, found.end, pb.UsageBatch.FromString(found.body), found.body)
            except DecodeError as error:
                yield unreadable(place, found.end, f"no UsageBatch: {error}")

    def _json_lines(self, path: Path, file: BinaryIO) -> Source:
        for offset, end, line in _lines(file):
            place = f"{path} at byte {offset}"
            if not line.strip():
                continue
            if len(line) > MAX_LINE_BYTES:
                yield unreadable(place, end, f"a line of {end - offset} bytes, at most {MAX_LINE_BYTES}")
                continue
            # One in a name counts, too: it is told from an object by parsing alone.
            if (objects := line.count(b"{")) > MAX_LINE_OBJECTS:
                yield unreadable(place, end, f"a line of {objects} objects, at most {MAX_LINE_OBJECTS}")
                continue
            try:
                batch = json_format.Parse(line, pb.UsageBatch(), max_recursion_depth=16)
            except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
                yield unreadable(place, end, " ".join(str(error).split())[:256])
                continue
            yield self._chained(place, end, batch)

    def _chained(self, place: str, end: int, batch: pb.UsageBatch) -> Found:
        stream = batch.agent_id, batch.epoch
        seq, last_digest = self._last.get(stream, (0, b""))
        if batch.seq > 1 and not batch.previous_digest:
            if seq != batch.seq - 1:
                return unreadable(
                    place, end, f"previous_digest: missing, and seq {batch.seq - 1} is not before it here"
                )
            batch.previous_digest = last_digest
        body = batch.SerializeToString(deterministic=True)
        self._last[stream] = batch.seq, digest(body)
        return described(place, end, batch, body)


def described(place: str, end: int, batch: pb.UsageBatch, body: bytes) -> Found:
    """What is known of a batch that could be decoded."""
    if not _UUID.fullmatch(batch.agent_id):
        return unreadable(place, end, "agent_id: not a UUID in lower case")
    if len(body) > MAX_BATCH_BYTES:
        return unreadable(place, end, f"{len(body)} bytes are more than a batch may have ({MAX_BATCH_BYTES})")
    return Found(
        place,
        end,
        BatchId(AgentId(batch.agent_id), batch.epoch, batch.seq),
        batch.tenant,
        batch.interval_start_unix_ns,
        batch.interval_end_unix_ns,
        len(batch.known),
        body,
        "",
    )


def of_identity(place: str, end: int, identity: BatchId, body: bytes) -> Found:
    """A batch that a collector kept under this identity, also one it rejected for having no other like it inside."""
    try:
        found = described(place, end, pb.UsageBatch.FromString(body), body)
    except DecodeError:
        found = unreadable(place, end, "")
    if found.identity == identity:
        return found
    # Rejected for this very reason. Its number in the stream was used up with these bytes.
    return Found(place, end, identity, "", 0, 0, 0, body, "")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(offset, end, line); of a line over the bound only its beginning."""
    offset = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        end, last = offset + len(line), line
        while not last.endswith(b"\n") and (last := file.readline(MAX_LINE_BYTES)):
            end += len(last)
        yield offset, end, line
        offset = end
