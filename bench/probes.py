"""`./dev bench probes`: what the kernel probes cost, on this kernel, as it measures its programs itself.

ns_per_skb               run time of the network programs per skb, less that of an empty program on the same skbs: UDP
                         and TCP over a veth pair, three networks listed
us_per_birth_and_death   run time of the three lifecycle programs per cgroup that is made and removed
snapshot_us_per_cgroup   CPU time of one walk and its decoding in Python, per cgroup, at 1,000 cgroups; median
switch_overhead_percent  a pipe ping-pong's time with the probes against without, rounds alternating; medians.
                         `switch_ns_without` and `switch_ns_with` are [5 %, median, 95 %] of the rounds
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agent.read.probes.pins import ProbeSet as Adopted
from agent.read.probes.pins import adopt
from bench import bpf_programs
from bench.cgroups import Cgroup, slice_of_our_own, v2_root
from bench.netns import THERE4, namespace
from bench.probe_set import loaded

CGROUPS = 1_000
LIFECYCLE = ("link_on_mkdir", "link_on_rmdir", "link_on_release")

_SINK = """
import socket, sys
address, port = sys.argv[1], int(sys.argv[2])
listening = socket.create_server((address, port))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind((address, port))
print("up", flush=True)
connection, _ = listening.accept()
while connection.recv(1 << 16):
    pass
"""

_SOURCE = """
import socket, sys
there = (sys.argv[1], 7000)
stream = socket.create_connection(there)
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(int(sys.argv[2])):
    datagrams.sendto(b"x" * 100, there)
stream.sendall(b"y" * 20_000_000)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench probes", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: noisier")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rounds = 20 if args.quick else 100
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as directory:
        result: dict[str, Any] = {
            "ns_per_skb": round(ns_per_skb(Path(directory), 2_000 * rounds), 1),
            "us_per_birth_and_death": round(us_per_birth_and_death(Path(directory), 50 * rounds), 2),
            "snapshot_us_per_cgroup": round(snapshot_us_per_cgroup(Path(directory), rounds), 2),
            **switches(Path(directory), rounds),
        }
    print(json.dumps(result))
    if not args.json:
        print(f"on {platform.release()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    return 0


def ns_per_skb(directory: Path, datagrams: int) -> float:
    """Of both directions together."""
    root = v2_root()
    assert root is not None
    networks = directory / "networks"
    networks.write_text("198.51.100.0/25\n10.0.0.0/8\n2001:db8::/32\n")
    with contextlib.ExitStack() as stack:
        probes = stack.enter_context(loaded(directory, "--networks", str(networks)))
        ours = stack.enter_context(slice_of_our_own("weighbridge-bench"))
        space = stack.enter_context(namespace())
        counting = [
            stack.enter_context(bpf_programs.program_of(probes.pins / name))
            for name in ("link_on_ingress", "link_on_egress")
        ]
        empty = [
            stack.enter_context(bpf_programs.empty_on_cgroup(root, direction))
            for direction in (bpf_programs.INGRESS, bpf_programs.EGRESS)
        ]
        stack.enter_context(bpf_programs.statistics())
        before = [bpf_programs.run_time(program) for program in (*counting, *empty)]
        _traffic(ours, space.command([sys.executable, "-c", _SINK, THERE4, "7000"]), datagrams)
        after = [bpf_programs.run_time(program) for program in (*counting, *empty)]
    spent = [b.since(a) for a, b in zip(before, after, strict=True)]
    assert min(s.runs for s in spent) >= 1_000, spent
    ours_ns, empty_ns = (
        sum(s.nanoseconds for s in part) / sum(s.runs for s in part) for part in (spent[:2], spent[2:])
    )
    return ours_ns - empty_ns


def _traffic(ours: Cgroup, sink: list[str], datagrams: int) -> None:
    cgroup = ours.child("docker-" + "a" * 64 + ".scope")
    server = subprocess.Popen(sink, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        sender = cgroup.run([sys.executable, "-c", _SOURCE, THERE4, str(datagrams)])
        if sender.wait(timeout=300):
            raise RuntimeError("the sender failed")
        server.wait(timeout=60)
    finally:
        server.kill()
        server.wait()


def us_per_birth_and_death(directory: Path, lives: int) -> float:
    with (
        loaded(directory) as probes,
        slice_of_our_own("weighbridge-bench") as ours,
        contextlib.ExitStack() as stack,
    ):
        programs = [stack.enter_context(bpf_programs.program_of(probes.pins / name)) for name in LIFECYCLE]
        stack.enter_context(bpf_programs.statistics())
        before = [bpf_programs.run_time(program) for program in programs]
        for number in range(lives):
            path = ours.path / f"docker-{number:064x}.scope"
            path.mkdir()
            path.rmdir()
        deadline = time.monotonic() + 60
        while True:
            spent = [bpf_programs.run_time(p).since(a) for p, a in zip(programs, before, strict=True)]
            # The release comes later, from a kernel worker.
            if min(s.runs for s in spent) >= lives:
                break
            assert time.monotonic() < deadline, spent
            time.sleep(0.05)
    return sum(s.nanoseconds / s.runs for s in spent) / 1_000


def snapshot_us_per_cgroup(directory: Path, rounds: int) -> float:
    with loaded(directory) as probes, slice_of_our_own("weighbridge-bench") as ours:
        for number in range(CGROUPS):
            ours.child(f"docker-{number:064x}.scope")
        found = adopt(probes.directory)
        assert isinstance(found, Adopted), found
        took = []
        for _ in range(rounds):
            begun = time.thread_time()
            rows = found.rows()
            took.append(time.thread_time() - begun)
            assert rows is not None
            assert len(rows) > CGROUPS
        found.close()
    return statistics.median(took) / CGROUPS * 1e6


def switches(directory: Path, rounds: int) -> dict[str, Any]:
    """Nanoseconds per context switch, with and without the probes, in alternating rounds."""
    without, with_probes = [], []
    for _ in range(max(4, rounds // 10)):
        without += [_ping_pong_ns() for _ in range(5)]
        with loaded(directory):
            with_probes += [_ping_pong_ns() for _ in range(5)]
    spread = {
        name: [round(q) for q in (deciles[0], statistics.median(values), deciles[-1])]
        for name, values in (("switch_ns_without", without), ("switch_ns_with", with_probes))
        if (deciles := statistics.quantiles(values, n=20))
    }
    overhead = statistics.median(with_probes) / statistics.median(without) - 1
    return {"switch_overhead_percent": round(100 * overhead, 2), **spread}


def _ping_pong_ns(turns: int = 5_000) -> float:
    """Two processes on one CPU hand a byte to and fro: two switches a turn."""
    there, back = os.pipe(), os.pipe()
    cpu = min(os.sched_getaffinity(0))
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {cpu})
        os.close(there[1])
        os.close(back[0])
        while os.read(there[0], 1):
            os.write(back[1], b"x")
        os._exit(0)
    affinity = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
        begun = time.perf_counter_ns()
        for _ in range(turns):
            os.write(there[1], b"x")
            os.read(back[0], 1)
        took = time.perf_counter_ns() - begun
    finally:
        os.sched_setaffinity(0, affinity)
        for fd in (*there, *back):
            os.close(fd)
        os.waitpid(pid, 0)
    return took / turns / 2


if __name__ == "__main__":
    sys.exit(main())
