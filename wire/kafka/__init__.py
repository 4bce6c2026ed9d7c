"""Kafka as its writers and its readers agree on it. Only who is set up for Kafka imports this.

topics.py    names and sizes; pure
client.py    librdkafka: how brokers are reached, errors with their fix
"""
