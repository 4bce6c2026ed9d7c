"""Programs of the tests that run in a machine, each by itself."""
