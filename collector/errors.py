"""The collector's base exception."""


class CollectorError(Exception):
    """Something a person has to put right; the message names the fix."""
