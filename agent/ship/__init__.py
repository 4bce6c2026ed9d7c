"""Batches -> collector: the durable spool, the shipper that empties it, enrolment and renewal."""
