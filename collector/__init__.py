"""The centre. `pipeline` has the steps in order; `door` lets batches in, `decide` judges them and does no
I/O, `state` keeps the judges' numbers, `handoff` makes accepted batches durable, `resend` brings a running collector
what a person has in files or logs. `audit` writes administrative acts down. `server` is the process.
"""

__version__ = "0.1.0"
