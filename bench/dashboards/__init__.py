"""The Grafana dashboards, made by `python -m bench.dashboards` into packaging/share/grafana."""
