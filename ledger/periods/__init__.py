"""Is a period complete, what keeps it from it, and what a close writes down. Pure but for `keeper`."""
