"""What openings say that no batch carried: usage that is recovered after an agent lost its state. Pure.

An agent whose spool was lost, restored from an older copy, or whose clock was set back begins an epoch, and the first row
of every incarnation in it brings an opening: the kernel's counters at the start of that row. What the counters rose by
since an earlier opening and what was booked in between should be one number. Where it is not, the difference is recovered
usage: positive where batches are missing, negative where an older copy of a spool billed the same time again.

    facts.py       what is known (openings, what is booked, how spans begin), and what comes out
    recovered.py   the difference, per incarnation and measure
    queries.py     the facts out of ClickHouse

Nothing here is ever stored and added to: it is computed anew from the books, so a batch that comes after all lowers it.
"""
