"""Grafana dashboards as code, over the table of metrics. Pure: nothing here talks to a system."""
