"""Acceptance: the agent and the collector on a kernel and a systemd of their own, in throw-away machines."""
