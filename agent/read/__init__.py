"""Kernel -> readings. The only package that opens /proc and /sys. Knows nothing of tenants or batches."""
