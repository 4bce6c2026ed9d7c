"""What the ledger reads, as arrivals with the places they were read from.

    arrival.py    what comes in, and what a source of it can do. Pure
    log.py        a collector's durable log, of this host: followed while it is written
    messages.py   from a message of Kafka to an arrival. Pure
    kafka.py      the topics of any number of collectors

A source gives everything at least once, from the place on that it is told: what is booked already comes again, and
it is for the booking to notice. It never skips anything silently: what cannot be read stops it, with the fix, or is in
`lost`.
"""
