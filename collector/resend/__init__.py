"""Batches that a person brings to a running collector: read from files or a log, sent over its control socket.

batches.py      what is sent: a batch, its identity, where it was found
files.py        files of batches -> batches; names what is none
log_range.py    a stretch of a log -> batches
kafka_range.py  what the topics hold -> batches
sender.py       batches -> answers, in groups, until each has one
progress.py     the bar, on a terminal
bookmark.py     how far a file was imported, beside it
"""
