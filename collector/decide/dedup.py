"""What a stream has delivered: a contiguous watermark, a small window ahead of it, digests behind it. Pure.

A batch that was judged and is on its way to the disk is *claimed*: a second copy is recognised by it, and it is
forgotten (`release`) if the disk refuses. Claims are never saved.

Memory per stream is bounded and does not grow with time: no time window to fall out of. Behind the last
RING batches a repeat is a duplicate by its number alone; its content was pinned by the hash chain.
"""

from __future__ import annotations

from enum import Enum

from wire.identity import DIGEST_BYTES
from wire.limits import WINDOW

RING = 64
KEPT_DIGEST_BYTES = 16
"""Of a digest behind the watermark; 2^-128 is as good as equal for telling a conflict from a repeat."""


class Seen(Enum):
    NEW = "new"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    OUT_OF_WINDOW = "out_of_window"


# Looked up once: an enum resolves a member in Python at every access.
_NEW, _DUPLICATE, _CONFLICT = Seen.NEW, Seen.DUPLICATE, Seen.CONFLICT


class StreamState:
    """One stream. Marks are made only for what is durable."""

    __slots__ = ("_claimed", "_ring", "ahead", "dirty", "last_digest", "watermark")

    def __init__(
        self,
        watermark: int = 0,
        last_digest: bytes = b"",
        ring: bytes = b"",
        ahead: dict[int, bytes] | None = None,
    ) -> None:
        self.watermark = watermark
        self.last_digest = last_digest
        """Digest of the batch at the watermark; empty if unknown (adopted) or nothing was delivered."""
        self._ring = bytearray(ring)
        self.ahead = ahead or {}
        self._claimed: dict[int, bytes] | None = None
        """None while nothing is on its way, so that a quiet stream costs no dictionary."""
        self.dirty = False

    @property
    def claims(self) -> bool:
        """Whether something is on its way to the disk."""
        return self._claimed is not None

    @property
    def ring(self) -> bytes:
        return bytes(self._ring)

    def judge(self, seq: int, digest: bytes) -> Seen:
        if self._claimed is not None and (claimed := self._claimed.get(seq)) is not None:
            return _DUPLICATE if claimed == digest else _CONFLICT
        watermark = self.watermark
        if seq > watermark:
            if self.ahead and (known := self.ahead.get(seq)) is not None:
                return _DUPLICATE if known == digest else _CONFLICT
            return _NEW if seq <= watermark + WINDOW else Seen.OUT_OF_WINDOW
        kept = self._kept(seq)
        if kept is None or kept == digest[:KEPT_DIGEST_BYTES]:
            return _DUPLICATE
        return _CONFLICT

    def digest_of(self, seq: int) -> bytes | None:
        """The whole digest of a batch from the watermark on, where it is known."""
        if self._claimed is not None and (claimed := self._claimed.get(seq)) is not None:
            return claimed
        if seq == self.watermark:
            return self.last_digest if self.last_digest or seq == 0 else None
        return self.ahead.get(seq)

    def claim(self, seq: int, digest: bytes) -> None:
        """A batch judged NEW goes to the disk; `mark` or `release` must follow."""
        if self._claimed is None:
            self._claimed = {}
        self._claimed[seq] = digest

    def release(self, seq: int) -> None:
        """A claim is over."""
        if self._claimed is not None:
            self._claimed.pop(seq, None)
            if not self._claimed:
                self._claimed = None

    def mark(self, seq: int, digest: bytes) -> None:
        """Record a durable batch. Marking again what is known changes nothing."""
        if self._claimed is not None:
            self.release(seq)
        if seq <= self.watermark:
            return
        self.dirty = True
        if seq != self.watermark + 1:
            self.ahead[seq] = digest
            return
        self._advance(seq, digest)
        while self.ahead:
            following = self.ahead.pop(self.watermark + 1, None)
            if following is None:
                break
            self._advance(self.watermark + 1, following)

    def recall(self, seq: int, digest: bytes) -> None:
        """Mark what a log tells, which may begin later than the stream. Whatever is in it was judged within the window, so
        all that is further behind had been answered; in a whole log the watermark is there already.
        """
        if seq > self.watermark + WINDOW:
            self.adopt(seq - WINDOW + 1)
        self.mark(seq, digest)

    def adopt(self, seq: int) -> None:
        """Go on at `seq`: what came before was answered elsewhere, or is lost and shows in the ledger."""
        if seq - 1 <= self.watermark:
            return
        self.dirty = True
        self.watermark, self.last_digest = seq - 1, b""
        self._ring.clear()
        self.ahead = {s: d for s, d in self.ahead.items() if s >= seq}
        following = self.ahead.pop(seq, None)
        if following is not None:
            self.mark(seq, following)

    def _advance(self, seq: int, digest: bytes) -> None:
        if not self._ring:
            self._ring = bytearray(RING * KEPT_DIGEST_BYTES)
        at = seq % RING * KEPT_DIGEST_BYTES
        self._ring[at : at + KEPT_DIGEST_BYTES] = digest[:KEPT_DIGEST_BYTES]
        self.watermark, self.last_digest = seq, digest

    def _kept(self, seq: int) -> bytes | None:
        if seq <= self.watermark - RING or not self._ring:
            return None
        at = seq % RING * KEPT_DIGEST_BYTES
        kept = bytes(self._ring[at : at + KEPT_DIGEST_BYTES])
        return kept if any(kept) else None


def pack_ahead(ahead: dict[int, bytes]) -> bytes:
    return b"".join(seq.to_bytes(8, "big") + digest for seq, digest in sorted(ahead.items()))


def unpack_ahead(data: bytes) -> dict[int, bytes]:
    size = 8 + DIGEST_BYTES
    return {
        int.from_bytes(data[at : at + 8], "big"): data[at + 8 : at + size] for at in range(0, len(data), size)
    }
