"""Sets of sequence numbers, as spans: what is in one and not in the other. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from ledger.periods.streams import Span


def subtract(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """What of `spans` is in none of `taken`: sorted, disjoint and maximal. Either may overlap itself."""
    gone: dict[tuple[str, int], list[Span]] = defaultdict(list)
    for span in joined(taken):
        gone[span.agent_id, span.epoch].append(span)
    out = []
    at: dict[tuple[str, int], int] = {}
    for span in joined(spans):
        stream = span.agent_id, span.epoch
        others = gone.get(stream, [])
        first = span.first_seq
        index = at.get(stream, 0)
        while index < len(others) and others[index].first_seq <= span.last_seq:
            other = others[index]
            if other.first_seq > first:
                out.append(span._replace(first_seq=first, last_seq=other.first_seq - 1))
            first = max(first, other.last_seq + 1)
            if other.last_seq > span.last_seq:
                break
            index += 1
        at[stream] = index
        if first <= span.last_seq:
            out.append(span._replace(first_seq=first))
    return out


def joined(spans: Iterable[Span]) -> Iterator[Span]:
    """The same sequence numbers as few spans: sorted, with a hole between each and the next of its stream."""
    last: Span | None = None
    for span in sorted(spans):
        if last is not None and last[:2] == span[:2] and span.first_seq <= last.last_seq + 1:
            last = last._replace(last_seq=max(last.last_seq, span.last_seq))
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def common(spans: Iterable[Span]) -> list[Span]:
    """Sequence numbers that are in two or more of `spans`."""
    out = []
    reach: Span | None = None
    for span in sorted(spans):
        if reach is not None and reach[:2] == span[:2] and span.first_seq <= reach.last_seq:
            out.append(span._replace(last_seq=min(span.last_seq, reach.last_seq)))
        if reach is None or reach[:2] != span[:2] or span.last_seq > reach.last_seq:
            reach = span
    return list(joined(out))
