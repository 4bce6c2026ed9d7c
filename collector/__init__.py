"""The centre. `pipeline` has the steps in order; `door` lets batches in, `decide` judges them and does no
I/O, `state` keeps the judges' numbers, `handoff` makes accepted batches durable. `server` is the process.
"""

__version__ = "0.1.0"
