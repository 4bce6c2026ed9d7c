"""Readings -> usage -> batch bytes. Pure: values and time come as arguments. I/O is only in `labels`."""
