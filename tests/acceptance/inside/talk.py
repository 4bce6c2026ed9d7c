"""talk.py serve FILE | talk.py call: questions and answers over TCP, and datagrams one way.

Each message is smaller than a packet and answered before the next, so that every skb is one packet. Both ends keep
their sockets open: what the kernel says for a connection that is gone belongs to no socket. Both stay on one CPU: where
two CPUs have the first packets of a connection at once, the kernel shows one of them to its filters twice
(net/ipv4/tcp_ipv4.c, `req_stolen`), and it is counted twice. The server makes FILE when all was said.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

SERVER = ("198.51.100.1", 7000)
QUESTIONS, QUESTION_BYTES, ANSWER_BYTES = 200, 900, 500
DATAGRAMS, DATAGRAM_BYTES = 100, 300
CONNECT_SECONDS = 60


def receive(connection: socket.socket, size: int) -> None:
    while size:
        size -= len(connection.recv(size))


def serve(done: Path) -> None:
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    # Before the network is there: to a port that nobody listens on, the kernel answers by itself.
    datagrams.bind(("", SERVER[1]))
    with socket.create_server(("", SERVER[1])) as listening:
        connection, _ = listening.accept()
        for _ in range(QUESTIONS):
            receive(connection, QUESTION_BYTES)
            connection.sendall(bytes(ANSWER_BYTES))
        for _ in range(DATAGRAMS):
            datagrams.recv(DATAGRAM_BYTES)
        done.touch()
        time.sleep(86_400)


def connected() -> socket.socket:
    """The network of a container is there some time after its start."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection(SERVER)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def call() -> None:
    connection = connected()
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(QUESTIONS):
        connection.sendall(bytes(QUESTION_BYTES))
        receive(connection, ANSWER_BYTES)
    for _ in range(DATAGRAMS):
        datagrams.sendto(bytes(DATAGRAM_BYTES), SERVER)
    time.sleep(86_400)


if __name__ == "__main__":
    os.sched_setaffinity(0, {0})
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]))
    else:
        call()
