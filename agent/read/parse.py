"""Kernel text -> integers. Pure. What is missing, empty or garbled is None, never 0; one odd line costs itself only.

Formats: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/*.rst, accounting/psi.rst in the kernel tree.
"""

from __future__ import annotations

import os
import re

from agent.meter.model import DeviceCounters

_MAX_COUNTER = (1 << 64) - 1
_UNLIMITED = 1 << 62
"""The kernel keeps "no limit" as the largest page-aligned long (PAGE_COUNTER_MAX * page size), and v1 prints it."""

_IO_KEYS = (b"rbytes", b"wbytes", b"rios", b"wios")

# Read at every interval of every cgroup: one pass of a regular expression costs a third of splitting lines.
_KEYED = re.compile(rb"^(\S+) +([0-9]{1,20})[ \t\r]*$", re.MULTILINE)
_PRESSURE = re.compile(rb"^(some|full) .*\btotal=([0-9]{1,20})[ \t\r]*$", re.MULTILINE)
_CPU_STAT_AS_PRINTED = re.compile(
    rb"usage_usec ([0-9]{1,16})\nuser_usec ([0-9]{1,16})\nsystem_usec ([0-9]{1,16})\n"
    rb"(?:(?!nr_periods)[a-z_.]+ [0-9]+\n)*"
    rb"(?:nr_periods ([0-9]{1,16})\nnr_throttled ([0-9]{1,16})\nthrottled_usec ([0-9]{1,16})\n)?"
)
_PRESSURE_AS_PRINTED = re.compile(
    rb"some [a-z0-9. =]*total=([0-9]{1,19})\nfull [a-z0-9. =]*total=([0-9]{1,19})\n\Z"
)

PartialDevice = tuple[int | None, int | None, int | None, int | None]


def number(text: bytes | None) -> int | None:
    """A file that holds one unsigned number. "max" and anything else is None."""
    if text is None:
        return None
    text = text.strip()
    if not text.isdigit():
        return None
    value = int(text) if len(text) <= 20 else _MAX_COUNTER + 1
    return value if value <= _MAX_COUNTER else None


def limit(text: bytes | None) -> int | None:
    """A memory limit; None where there is no limit."""
    return limit_of(number(text))


def limit_of(value: int | None) -> int | None:
    """A memory limit in bytes; None where it is none."""
    return None if value is None or value >= _UNLIMITED else value


def keyed(text: bytes | None) -> dict[bytes, int]:
    """ "key value" lines. A line that is not that is left out; of two equal keys the first counts."""
    if not text:
        return {}
    return {
        key: value for key, digits in reversed(_KEYED.findall(text)) if (value := int(digits)) <= _MAX_COUNTER
    }


def cpu_stat(text: bytes | None) -> tuple[int | None, ...]:
    """usage, user and system ns, periods, throttled periods, throttled ns of a v2 cpu.stat."""
    usual = _CPU_STAT_AS_PRINTED.match(text) if text else None
    if usual is not None and text is not None:
        usage, user, system, periods, throttled, throttled_us = usual.groups()
        if periods is not None:
            return (
                int(usage) * 1_000,
                int(user) * 1_000,
                int(system) * 1_000,
                int(periods),
                int(throttled),
                int(throttled_us) * 1_000,
            )
        if b"nr_" not in text and b"throttled" not in text:
            return int(usage) * 1_000, int(user) * 1_000, int(system) * 1_000, None, None, None
    stat = keyed(text)
    return (
        microseconds(stat.get(b"usage_usec")),
        microseconds(stat.get(b"user_usec")),
        microseconds(stat.get(b"system_usec")),
        stat.get(b"nr_periods"),
        stat.get(b"nr_throttled"),
        microseconds(stat.get(b"throttled_usec")),
    )


def field(text: bytes | None, key: bytes) -> int | None:
    """One key of a long "key value" file (memory.stat) without parsing the rest."""
    if text is None:
        return None
    start = 0 if text.startswith(key + b" ") else text.find(b"\n" + key + b" ") + 1
    if start == 0 and not text.startswith(key + b" "):
        return None
    end = text.find(b"\n", start)
    return number(text[start + len(key) + 1 : end if end >= 0 else None])


def pressure(text: bytes | None) -> tuple[int | None, int | None]:
    """(some, full) stall nanoseconds of a *.pressure file."""
    if not text:
        return None, None
    usual = _PRESSURE_AS_PRINTED.match(text)
    if usual is not None:
        return int(usual[1]) * 1_000, int(usual[2]) * 1_000
    totals = {
        key: value * 1_000
        for key, digits in reversed(_PRESSURE.findall(text))
        if (value := int(digits)) <= _MAX_COUNTER
    }
    return totals.get(b"some"), totals.get(b"full")


def io_v2(text: bytes | None) -> dict[str, PartialDevice] | None:
    """io.stat by device "major:minor". None for a missing or an empty file."""
    if not text or not text.strip():
        return None
    out: dict[str, PartialDevice] = {}
    for line in text.split(b"\n"):
        words = line.split()
        if not words or not _is_device(words[0]):
            continue
        pairs = dict(word.split(b"=", 1) for word in words[1:] if b"=" in word)
        a, b, c, d = (number(pairs.get(key)) for key in _IO_KEYS)
        if (a, b, c, d) != (None, None, None, None):
            out.setdefault(words[0].decode(), (a, b, c, d))
    return out


def io_v1(service_bytes: bytes | None, serviced: bytes | None) -> dict[str, PartialDevice] | None:
    """blkio.throttle.io_service_bytes_recursive and io_serviced_recursive: "8:0 Read 4096" lines."""
    if not (service_bytes and service_bytes.strip()) and not (serviced and serviced.strip()):
        return None
    found: dict[str, list[int | None]] = {}
    for base, text in ((0, service_bytes), (2, serviced)):
        for line in (text or b"").split(b"\n"):
            words = line.split()
            if len(words) != 3 or not _is_device(words[0]):
                continue
            slot = {b"Read": 0, b"Write": 1}.get(words[1])
            value = number(words[2])
            if slot is not None and value is not None:
                device = found.setdefault(words[0].decode(), [None, None, None, None])
                if device[base + slot] is None:
                    device[base + slot] = value
    return {device: (v[0], v[1], v[2], v[3]) for device, v in found.items()}


def whole_devices(io: dict[str, PartialDevice] | None) -> dict[str, DeviceCounters] | None:
    """For metering: the devices all four of whose counters are known."""
    if io is None:
        return None
    return {
        device: (a, b, c, d)
        for device, (a, b, c, d) in io.items()
        if a is not None and b is not None and c is not None and d is not None
    }


def _is_device(word: bytes) -> bool:
    major, colon, minor = word.partition(b":")
    return bool(colon) and major.isdigit() and minor.isdigit() and len(word) <= 21


def ticks(value: int | None) -> int | None:
    """USER_HZ clock ticks (cpuacct.stat) -> ns."""
    return None if value is None else value * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def microseconds(value: int | None) -> int | None:
    """µs -> ns."""
    return None if value is None else value * 1_000
