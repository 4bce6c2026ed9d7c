"""Where accepted batches become durable."""
