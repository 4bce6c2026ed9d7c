"""What agent, collector and ledger agree on; the only package all three may import.

Here belongs: the generated contract (`v1`), identity and digest, measures, limits, statuses and their
METER codes, TLS credentials, the format of the durable log (`log`), and (`daemon`) what every daemon does alike:
settings, journal, local port.
Here does not belong: any decision about usage, admission or billing.
"""
