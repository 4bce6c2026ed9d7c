"""Arrivals -> the table `batches`: what to do with each (pure), and how its bytes become a row (pure)."""
