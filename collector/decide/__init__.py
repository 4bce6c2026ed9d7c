"""Judgements on batches. Pure: values and time come in, decisions go out; no I/O."""
