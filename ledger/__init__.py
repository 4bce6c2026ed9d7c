"""Batches -> billing: rolls usage up, proves that it is complete, closes periods. Not part of this release."""
