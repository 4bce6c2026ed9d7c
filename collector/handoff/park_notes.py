"""What the durable log says of a parked batch beside its bytes.

note of PARKED     tenant rows cpu_usage_ns
note of RELEASED   tenant rows cpu_usage_ns offset-of-the-PARKED-record
"""

from __future__ import annotations

from typing import NamedTuple


class ParkNote(NamedTuple):
    tenant: str
    rows: int
    cpu_usage_ns: int
    parked_at: int
    """Offset of the PARKED record; in its own note it is left out, and -1."""


def parked_note(tenant: str, rows: int, cpu_usage_ns: int) -> bytes:
    return b"%s %d %d" % (tenant.encode(), rows, cpu_usage_ns)


def read_note(note: bytes) -> ParkNote:
    tenant, rows, cpu_usage_ns, *parked_at = note.split(b" ")
    return ParkNote(tenant.decode(), int(rows), int(cpu_usage_ns), int(parked_at[0]) if parked_at else -1)
