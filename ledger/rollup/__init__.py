"""Rows of usage -> sums: by minute, by hour and unit, over any span. One piece of SQL divides rows at boundaries for all."""
