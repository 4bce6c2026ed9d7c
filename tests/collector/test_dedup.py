"""Deduplication: a contiguous watermark, a window ahead, digests behind."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from collector.decide.dedup import RING, Seen, StreamState, pack_ahead, unpack_ahead
from wire.identity import digest
from wire.limits import WINDOW


def of(seq: int, version: int = 0) -> bytes:
    return digest(f"{seq}/{version}".encode())


def test_in_order_delivery_moves_the_watermark() -> None:
    state = StreamState()
    for seq in range(1, 1_000):
        assert state.judge(seq, of(seq)) is Seen.NEW
        state.mark(seq, of(seq))
    assert state.watermark == 999
    assert state.digest_of(999) == of(999)
    assert not state.ahead


def test_the_window_is_at_least_what_an_agent_may_have_in_flight() -> None:
    state = StreamState()
    assert state.judge(WINDOW, of(WINDOW)) is Seen.NEW
    assert state.judge(WINDOW + 1, of(WINDOW + 1)) is Seen.OUT_OF_WINDOW


def test_the_same_identity_with_other_content_is_a_conflict_not_a_duplicate() -> None:
    state = StreamState()
    for seq in (1, 2, 3, 5):
        state.mark(seq, of(seq))
    for seq in (1, 2, 3, 5):
        assert state.judge(seq, of(seq)) is Seen.DUPLICATE
        assert state.judge(seq, of(seq, 1)) is Seen.CONFLICT


def test_behind_the_kept_digests_a_repeat_is_a_duplicate_by_its_number() -> None:
    state = StreamState()
    for seq in range(1, RING + 10):
        state.mark(seq, of(seq))
    assert state.judge(1, of(1, 1)) is Seen.DUPLICATE
    assert state.judge(10, of(10, 1)) is Seen.CONFLICT


def test_a_judgement_leaves_no_mark() -> None:
    state = StreamState()
    state.judge(1, of(1))
    assert state.judge(1, of(1, 1)) is Seen.NEW
    assert not state.dirty


def test_what_is_on_its_way_to_the_disk_is_known_by_its_digest_until_the_disk_refuses_it() -> None:
    state = StreamState()
    state.claim(1, of(1))
    state.claim(3, of(3))
    assert state.judge(1, of(1)) is Seen.DUPLICATE
    assert state.judge(3, of(3, 1)) is Seen.CONFLICT
    assert state.digest_of(1) == of(1)
    state.release(1)
    state.mark(3, of(3))
    assert not state.claims
    assert state.judge(1, of(1, 1)) is Seen.NEW
    assert state.judge(3, of(3)) is Seen.DUPLICATE
    assert (state.watermark, state.ahead) == (0, {3: of(3)})


def test_a_stream_taken_up_midway_goes_on_there_and_forgets_what_it_cannot_know() -> None:
    state = StreamState()
    state.mark(1, of(1))
    state.mark(7, of(7))
    state.adopt(7)
    assert state.watermark == 7
    assert state.judge(5, of(5, 3)) is Seen.DUPLICATE
    assert state.judge(8, of(8)) is Seen.NEW
    state.adopt(3)
    assert state.watermark == 7


@given(st.integers(0, 3 * WINDOW), st.integers(1, WINDOW))
@example(5, WINDOW)
def test_a_log_that_begins_with_any_batch_of_the_window_says_no_more_than_was_known(
    watermark: int, ahead: int
) -> None:
    read = StreamState()
    read.recall(watermark + ahead, of(watermark + ahead))
    for seq in range(watermark + 1, watermark + WINDOW + 1):
        assert read.judge(seq, of(seq)) is (Seen.DUPLICATE if seq == watermark + ahead else Seen.NEW) or (
            seq > read.watermark + WINDOW
        )


@given(st.permutations(list(range(1, 60))))
def test_any_order_of_delivery_ends_in_the_same_state(order: list[int]) -> None:
    state = StreamState()
    for seq in order:
        assert state.judge(seq, of(seq)) is Seen.NEW
        state.mark(seq, of(seq))
        assert state.judge(seq, of(seq)) is Seen.DUPLICATE
    assert (state.watermark, state.ahead, state.last_digest) == (59, {}, of(59))


@given(st.dictionaries(st.integers(1, 2**62), st.binary(min_size=32, max_size=32), max_size=20))
def test_the_window_is_stored_as_it_is(ahead: dict[int, bytes]) -> None:
    assert unpack_ahead(pack_ahead(ahead)) == ahead


class DedupMachine(RuleBasedStateMachine):
    """Against a model that remembers everything; the state is saved and loaded at any point."""

    def __init__(self) -> None:
        super().__init__()
        self.state = StreamState()
        self.known: dict[int, bytes] = {}
        self.log: list[tuple[int, bytes]] = []
        """What was marked and adopted (without a digest), in order."""
        self.adopted = 0

    @rule(ahead=st.integers(-80, WINDOW + 20), version=st.integers(0, 1), durable=st.booleans())
    def deliver(self, ahead: int, version: int, durable: bool) -> None:
        seq = max(1, self.state.watermark + ahead)
        seen = self.state.judge(seq, of(seq, version))
        before = self.known.get(seq)
        if before is not None:
            if before == of(seq, version):
                assert seen is Seen.DUPLICATE
            else:
                assert seen is Seen.CONFLICT or seq <= self.state.watermark - RING or seq < self.adopted
        elif seq < self.adopted:
            assert seen is Seen.DUPLICATE
        elif seq > self.state.watermark + WINDOW:
            assert seen is Seen.OUT_OF_WINDOW
        else:
            assert seen is Seen.NEW
            if durable:
                self.state.mark(seq, of(seq, version))
                self.known[seq] = of(seq, version)
                self.log.append((seq, of(seq, version)))

    @rule(beyond=st.integers(200, 2_000))
    def deliver_many(self, beyond: int) -> None:
        for seq in range(self.state.watermark + 1, self.state.watermark + beyond):
            if self.state.judge(seq, of(seq)) is Seen.NEW:
                self.deliver(seq - self.state.watermark, 0, True)

    @rule(beyond=st.integers(1, 400))
    def adopt(self, beyond: int) -> None:
        self.adopted = max(self.adopted, self.state.watermark + beyond)
        self.state.adopt(self.adopted)
        self.log.append((self.adopted, b""))

    @rule(kept=st.floats(0, 1))
    def read_a_pruned_log(self, kept: float) -> None:
        """Without the checkpoint: nothing is thought to be there that is not, and an agent's word says up to where all is."""
        read = StreamState()
        for seq, its in self.log[round(len(self.log) * (1 - kept)) :]:
            if its:
                read.recall(seq, its)
            else:
                read.adopt(seq)
            assert len(read.ahead) <= WINDOW
        real = self.state
        assert read.watermark <= real.watermark
        read.adopt(real.watermark + 1)
        assert read.watermark == real.watermark
        assert read.ahead.items() <= real.ahead.items()
        if kept == 1:
            assert (read.last_digest, read.ring, read.ahead) == (real.last_digest, real.ring, real.ahead)

    @rule()
    def save_and_load(self) -> None:
        s = self.state
        self.state = StreamState(s.watermark, s.last_digest, s.ring, unpack_ahead(pack_ahead(s.ahead)))

    @invariant()
    def bounded_and_contiguous(self) -> None:
        assert len(self.state.ahead) <= WINDOW
        assert all(seq > self.state.watermark + 1 for seq in self.state.ahead)
        assert len(self.state.ring) <= RING * 16
        for seq in range(max(1, self.adopted), self.state.watermark + 1):
            assert seq in self.known


TestDedupMachine = DedupMachine.TestCase
TestDedupMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
