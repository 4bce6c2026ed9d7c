"""What `./dev bench collector` and `ledger` compare ours with, each as a process of its own.

bare_producer.py   confluent-kafka alone, with the collector's settings: what no collector that publishes can do without
otel.py            an OpenTelemetry Collector with OTLP in and Kafka out, built from otelcol/
plain_insert.py    ClickHouse alone, reading batches from a file by its own protobuf reader
otlp.proto         as much of OTLP as that takes
"""
