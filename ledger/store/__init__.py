"""ClickHouse: embedded (chDB) or a server. The only place that knows which, and how its errors read."""
