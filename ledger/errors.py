"""The ledger's exceptions."""


class LedgerError(Exception):
    """Something the ledger cannot do; the message names the fix."""


class LedgerAway(LedgerError):
    """Something it cannot do now and may do later by itself: a disk that is full, a server that is away, a lock that
    somebody holds. Whoever opens the ledger tries again."""
