"""The ring of births: a hint who has just been born, so that its labels can be asked for while it lives.

Nobody has to read it. What it had no room for is in the maps all the same, which alone are the truth; so it is read
without a lock, and an id that was torn is an id that nobody knows.
"""

from __future__ import annotations

import mmap
import struct

from agent.read.probes.bpf import BpfError, Map

_POSITION = struct.Struct("=Q")
_HEADER = struct.Struct("=II")  # length and flags, offset of the page: struct bpf_ringbuf_hdr
_BUSY, _DISCARDED = 1 << 31, 1 << 30
_LENGTH = _DISCARDED - 1
_RECORD = struct.Struct("=Q")
RINGBUF = 27


class Ring:
    """Page 0 is the consumer's position and ours to write; page 1 the producer's, the data behind it, mapped
    twice in a row so that no record is cut (kernel/bpf/ringbuf.c).
    """

    def __init__(self, found: Map) -> None:
        if found.type != RINGBUF:
            raise BpfError(f"{found.name} is no ring buffer", 22)
        page = mmap.PAGESIZE
        self._size = found.max_entries
        self._page = page
        try:
            self._consumer = mmap.mmap(found.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._data = mmap.mmap(
                found.fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
            )
        except OSError as error:
            raise BpfError(f"mapping {found.name} into memory", error.errno or 22) from error

    def take(self) -> list[int]:
        """The cgroup ids that were put in since the last time."""
        (at,) = _POSITION.unpack_from(self._consumer, 0)
        (end,) = _POSITION.unpack_from(self._data, 0)
        ids = []
        while 0 < end - at <= self._size:
            start = self._page + at % self._size
            length, _ = _HEADER.unpack_from(self._data, start)
            if length & _BUSY:
                break
            size = length & _LENGTH
            if size == _RECORD.size and not length & _DISCARDED:
                ids.append(_RECORD.unpack_from(self._data, start + _HEADER.size)[0])
            at += -(-(_HEADER.size + size) // 8) * 8
        _POSITION.pack_into(self._consumer, 0, at)
        return ids

    def close(self) -> None:
        self._consumer.close()
        self._data.close()
