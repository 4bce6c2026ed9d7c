"""Targets: a file that somebody imports, of delimited batches or of JSON lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import json_format

from collector.resend.batches import Found
from collector.resend.files import MAX_LINE_OBJECTS, BatchFiles, Form
from tests.fuzz.reference import decoded
from wire.identity import digest
from wire.limits import MAX_BATCH_BYTES
from wire.v1 import usage_pb2 as pb

MOST_TROUBLE_BYTES = 1_024
_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

Place = tuple[int, bytes | None]
"""Where a record ends, and the batch; None: there has to be trouble."""


def delimited(data: bytes) -> None:
    """Each batch is found at its place, and each place that has none is named."""
    found = _read(data, "delimited")
    assert [_place(one) for one in found] == list(_delimited_places(data))


def json_lines(data: bytes) -> None:
    """Each line that is not blank is the batch it says, in the one encoding that this has, or is named."""
    found = _read(data, "json")
    assert [_place(one) for one in found] == list(_json_places(data))


def _read(data: bytes, form: Form) -> list[Found]:
    """By the reader that the command uses, from a file that lies in memory."""
    fd = os.memfd_create("input")
    try:
        os.write(fd, data)
        return list(BatchFiles(form).read(Path(f"/proc/self/fd/{fd}")))
    finally:
        os.close(fd)


def _place(found: Found) -> Place:
    if found.trouble:
        assert len(found.trouble.encode(errors="backslashreplace")) <= MOST_TROUBLE_BYTES
        assert (found.identity, found.body) == (None, b"")
        return found.end, None
    batch = decoded(found.body)
    assert batch is not None
    assert found.identity == (batch.agent_id, batch.epoch, batch.seq)
    assert found.tenant == batch.tenant
    assert found.rows == len(batch.known)
    assert found.interval_start_unix_ns == batch.interval_start_unix_ns
    assert found.interval_end_unix_ns == batch.interval_end_unix_ns
    return found.end, found.body


def _delimited_places(data: bytes) -> Iterator[Place]:
    at = 0
    while at < len(data):
        prefix = data[at : at + 5]
        size = next((n for n, byte in enumerate(prefix, 1) if byte < 0x80), 0)
        if not size:
            yield at + len(prefix), None
            return
        length = sum((byte & 0x7F) << 7 * n for n, byte in enumerate(prefix[:size]))
        begin, end = at + size, at + size + length
        body = data[begin:end]
        if len(body) < length:
            yield len(data), None
            return
        yield end, body if _may_be_sent(body, decoded(body)) else None
        at = end


def _json_places(data: bytes) -> Iterator[Place]:
    digests: dict[tuple[str, int, int], bytes] = {}
    latest: dict[tuple[str, int], int] = {}
    end = 0
    for line in re.findall(rb"[^\n]*\n|[^\n]+", data):
        end += len(line)
        if line.strip():
            yield end, _encoded(line, digests, latest) if line.count(b"{") <= MAX_LINE_OBJECTS else None


def _encoded(
    line: bytes, digests: dict[tuple[str, int, int], bytes], latest: dict[tuple[str, int], int]
) -> bytes | None:
    try:
        batch = json_format.Parse(line, pb.UsageBatch(), max_recursion_depth=16)
    except (json_format.ParseError, UnicodeDecodeError, RecursionError):
        return None
    stream = batch.agent_id, batch.epoch
    if batch.seq > 1 and not batch.previous_digest:
        if latest.get(stream, 0) != batch.seq - 1:
            return None
        batch.previous_digest = digests.get((*stream, batch.seq - 1), b"")
    body = batch.SerializeToString(deterministic=True)
    latest[stream] = batch.seq
    digests[*stream, batch.seq] = digest(body)
    # Whoever writes the same record in another way gives it the same bytes.
    again = json_format.Parse(json_format.MessageToJson(batch), pb.UsageBatch())
    assert again.SerializeToString(deterministic=True) == body
    return body if _may_be_sent(body, batch) else None


def _may_be_sent(body: bytes, batch: pb.UsageBatch | None) -> bool:
    return batch is not None and _UUID.fullmatch(batch.agent_id) is not None and len(body) <= MAX_BATCH_BYTES
