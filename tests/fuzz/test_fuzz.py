"""What fuzzing found stays found: the kept corpus holds, a short search goes on from it, and the targets can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import pytest

from collector.decide import validate
from collector.resend import files
from tests.fuzz.delivery import delivery
from tests.fuzz.files import delimited, json_lines
from tests.fuzz.likeness import likeness
from tests.fuzz.mutator import other_batch
from tests.fuzz.seeds import CORPUS, bodies, delivery_of, json_of
from wire.delimited import Delimited, delimit
from wire.delimited import delimited as read_delimited
from wire.limits import MAX_BATCH_BYTES
from wire.v1 import usage_pb2 as pb

TARGETS: dict[str, Callable[[bytes], None]] = {
    "delivery": delivery,
    "likeness": likeness,
    "delimited": delimited,
    "json": json_lines,
}
SHORT_RUNS = {"delivery": 1_000, "likeness": 2_000, "delimited": 2_000, "json": 500}
MOST_KEPT_BYTES = 1 << 20


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_that_is_kept_is_judged_by_the_contract(target: str) -> None:
    kept = sorted((CORPUS / target).iterdir())
    assert kept
    assert sum(file.stat().st_size for file in kept) <= MOST_KEPT_BYTES
    for file in kept:
        try:
            TARGETS[target](file.read_bytes())
        except Exception as error:
            error.add_note(f"by {file}")
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_a_short_search_from_the_kept_corpus_finds_nothing(target: str, tmp_path: Path) -> None:
    if find_spec("atheris") is None and not os.environ.get("CI"):
        pytest.skip("atheris has no wheel for this machine and Python")
    # The same search every time: what is new is for the long runs.
    words = [sys.executable, "-m", "tests.fuzz", target, "--runs", str(SHORT_RUNS[target]), "--seed", "1"]
    # To getrusage(2) a process has been as large as the one that it was before exec, which to libFuzzer is its own size.
    # So a shell forks it, not pytest.
    words = ["sh", "-c", '"$@"; exit $?', "sh", *words]
    done = subprocess.run([*words, "--work", tmp_path / target], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4_000:]
    assert f"Done {SHORT_RUNS[target]} runs" in done.stderr


def test_a_packed_table_of_no_bytes_is_changed_like_any_other() -> None:
    empty = b"\xaa\x01\x00"  # containers_zlib, nothing
    changed = {other_batch(empty, 100, seed, lambda data, _: data + b"x", bodies(0)) for seed in range(300)}
    assert len(changed) > 10


def spoiled(change: Callable[[pb.UsageBatch], object]) -> bytes:
    """A Delivery of a batch and one like it, in which something is wrong."""
    first, second, *_ = bodies(0)
    batch = pb.UsageBatch.FromString(second)
    change(batch)
    return delivery_of([first, batch.SerializeToString(deterministic=True)])


def test_a_validator_that_overlooks_something_does_not_pass_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    short = spoiled(lambda batch: batch.pids_peak.extend((1, 1)))
    delivery(short)
    monkeypatch.setattr(validate, "columns_in_order", lambda *_: True)
    with pytest.raises(AssertionError, match="pids_peak"):
        delivery(short)


def test_a_refusal_that_names_the_wrong_field_does_not_pass_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    late = spoiled(lambda batch: setattr(batch, "cpus", 0))
    delivery(late)
    refusal = validate.Refusal(validate.Reason.REASON_OUT_OF_BOUNDS, "boot_id: no")
    monkeypatch.setattr(validate, "_header", lambda *_: refusal)
    with pytest.raises(AssertionError, match="boot_id"):
        delivery(late)


def test_an_importer_that_skips_a_batch_does_not_pass_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_but_the_last(source: BinaryIO) -> Iterator[Delimited]:
        yield from list(read_delimited(source))[:-1]

    stream = bodies(0)
    monkeypatch.setattr(files, "delimited", all_but_the_last)
    with pytest.raises(AssertionError):
        delimited(b"".join(map(delimit, stream)))
    json_lines(json_of(stream))
    monkeypatch.setattr(files, "digest", lambda _: bytes(32))
    with pytest.raises(AssertionError):
        json_lines(json_of(stream))


MOST_BYTES_A_BYTE = 100
"""What judging a batch may take in memory for each of its bytes: an empty message or text in a list is the dearest."""
DEAR = """
import resource
import zlib
from collector.decide.validate import Bounds, Validator
from tests.fuzz.delivery import AGENT, NOW_UNIX_NS
from tests.fuzz.likeness import likeness
from tests.fuzz.mutator import other_batch
from tests.fuzz.seeds import bodies
from wire.limits import MAX_BATCH_BYTES
from wire.v1 import usage_pb2 as pb

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

good = bodies(1)[0]
room = MAX_BATCH_BYTES - len(good) - 16
table = pb.UsageBatch(containers=pb.ContainerTable(name=[""] * (room // 2)))
columns = pb.UsageBatch(cpu_usage_ns=[1] * room)
cheap = [pb.UsageBatch(gaps=[pb.Gap()]), pb.UsageBatch(openings=[pb.Opening()]), pb.UsageBatch(device_row=[1])]
packer = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)  # to an eighth: no more than it may open to
plain = pb.ContainerTable(name=[""] * (MAX_BATCH_BYTES // 2)).SerializeToString()
packed = pb.UsageBatch(containers_zlib=packer.compress(plain) + packer.flush())
extras = [table.SerializeToString(), columns.SerializeToString(), packed.SerializeToString()]
extras += [(one := message.SerializeToString()) * (room // len(one)) for message in cheap]
extras += [b"\\xfb\\x07\\xfc\\x07" * (room // 4), b"\\xf8\\x07\\x01" * (room // 3)]  # groups and numbers nobody knows
validator = Validator(Bounds())
validator.check(good, AGENT, 7, 1, None, NOW_UNIX_NS)
before = peak()
for extra in extras:
    assert len(good + extra) <= MAX_BATCH_BYTES
    validator.check(good + extra, AGENT, 7, 1, None, NOW_UNIX_NS)
print(peak() - before)
"""


def test_a_batch_made_to_be_dear_takes_memory_in_proportion_to_its_size() -> None:
    done = subprocess.run([sys.executable, "-c", DEAR], capture_output=True, text=True, check=True)
    assert 0 <= int(done.stdout) < MOST_BYTES_A_BYTE * MAX_BATCH_BYTES
