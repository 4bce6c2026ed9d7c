"""What `./dev bench collector` compares the collector with, each as a process of its own.

bare_producer.py   confluent-kafka alone, with the collector's settings: what no collector that publishes can do without
otel.py            an OpenTelemetry Collector with OTLP in and Kafka out, built from otelcol/
otlp.proto         as much of OTLP as that takes
"""
