"""The daemon on every host. The folders are the flow: `read` (kernel -> readings), `meter` (readings ->
batches), `ship` (batches -> collector). `loop` is the cadence that drives them, `cli` the door for people.
"""

__version__ = "0.1.0"
