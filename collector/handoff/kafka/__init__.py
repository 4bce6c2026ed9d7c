"""The log's records on their way to Kafka (docs/decisions/0020).

messages.py    record -> topic, key, headers; the value is the batch's bytes. Pure
client.py      librdkafka: the settings that exactness needs, and errors with their fix
topics.py      topics are made, or checked, before anything is published
cursor.py      how far the log is confirmed, across restarts
reader.py     the way back: what the topics hold, in the order in which it arrived
publisher.py   the one thread that reads the log and publishes it
"""
