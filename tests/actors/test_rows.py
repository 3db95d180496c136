"""Forwards of several routers at one actor."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.actors.forward import compute
from moeray.actors.rows import RowServer
from moeray.model.experts import ExpertBank
from moeray.model.kernels import available
from moeray.model.loading import open_model
from moeray.recorder import Recorder
from moeray.types import ExpertId
from moeray.wire import row_message
from moeray.wire.frame import Frame, Limits, Op, decode, encode
from tests.checkpoints import make_tiny

CPU = torch.device("cpu")
KINDS = [(torch.float32, "torch"), (torch.bfloat16, "native")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny("mixtral", tmp_path_factory.mktemp("rows") / "m")


def bank_of(path, dtype, kernel):
    bank = ExpertBank(*opened(path), dtype, CPU, kernel)
    bank.load(ExpertId(layer, e) for layer in range(2) for e in range(8))
    return bank


def opened(path):
    files = open_model(str(path), None, node="rows-test")
    return files.family, files.weights


def frames(dtype, count=3, layer=0):
    """Of different sizes, with experts in common and each with some of its own."""
    generator = torch.Generator().manual_seed(count)
    for n in range(count):
        tokens, experts = 2 + 3 * n, [n, n + 1, 5]
        index = torch.randint(tokens, (7,), generator=generator)
        x_UD = torch.randn(tokens, 64, generator=generator).to(dtype)
        yield Frame(Op.FORWARD, n, layer, meta={"experts": experts, "counts": [2, 4, 1]}, tensors=(x_UD, index))


@pytest.mark.parametrize(("dtype", "kernel"), KINDS)
def test_what_runs_as_one_gives_what_each_gives_alone(path, dtype, kernel):
    bank = bank_of(path, dtype, kernel)
    rows = [(bank.hold(0, f.meta["experts"]), f.meta["experts"], f.meta["counts"], *f.tensors) for f in frames(dtype)]
    together = compute(rows, CPU)
    for row, out_RD in zip(rows, together, strict=True):
        (alone,) = compute([row], CPU)
        if kernel == "native":  # a row's bits do not depend on its neighbours
            assert torch.equal(out_RD, alone)
        assert torch.allclose(out_RD, alone, rtol=1e-4, atol=1e-4)


class Answers:
    """The way back to a router that is this test."""

    def __init__(self, take) -> None:
        self.send = take
        self.send_rows = lambda rows: take(rows.frame())
        self.place_outputs = lambda nbytes: None
        self.release = lambda: None


class Counted:
    """A bank that says how often its experts run, and keeps the first run waiting for `gate`."""

    def __init__(self, bank) -> None:
        self._bank = bank
        self.begun, self.gate = threading.Semaphore(0), threading.Event()

    def hold(self, layer, experts):
        held = self._bank.hold(layer, experts)
        self.begun.release()
        return held


def test_those_of_one_layer_that_wait_together_run_together(path, monkeypatch):
    """A forward of layer 1 keeps the actor busy while three of layer 0 and one of layer 1 arrive."""
    import moeray.actors.rows as rows

    started, go, sizes = threading.Event(), threading.Event(), []

    def slow(batch, device):
        sizes.append(len(batch))
        started.set()
        assert go.wait(20)
        return compute(batch, device)

    monkeypatch.setattr(rows, "compute", slow)
    bank = Counted(bank_of(path, torch.float32, "torch"))
    server = RowServer(CPU, Recorder(group="experts"))
    server.use(bank)
    answers = {}

    def ask(name, frame):
        server.serve(frame, Answers(lambda answer: answers.update({name: answer})))

    threads = [threading.Thread(target=ask, args=("first", next(frames(torch.float32, 1, layer=1))))]
    threads[0].start()
    assert started.wait(20)
    late = [*frames(torch.float32), next(frames(torch.float32, 1, layer=1))]
    threads += [threading.Thread(target=ask, args=(n, frame)) for n, frame in enumerate(late)]
    for thread in threads[1:]:
        thread.start()
    for _ in threads:
        assert bank.begun.acquire(timeout=20)
    while len(server._waiting) < len(late):  # each is in the list a moment after it has its weights
        threading.Event().wait(0.001)
    go.set()
    for thread in threads:
        thread.join(20)
    assert sorted(sizes) == [1, 1, 3]
    assert {name: frame.op for name, frame in answers.items()} == dict.fromkeys(["first", 0, 1, 2, 3], Op.RESULT)
    assert server.in_flight == 0
    assert server.tally.report().forwards == 5
    served = server.tally.rows()
    assert served[ExpertId(0, 5)] == 3
    assert sum(served.values()) == 35


@pytest.mark.parametrize(("dtype", "kernel"), KINDS)
def test_warming_up_counts_for_nothing(path, dtype, kernel):
    server = RowServer(CPU, Recorder(group="experts"))
    server.warm_up()
    server.use(ExpertBank(*opened(path), dtype, CPU, kernel))
    server.warm_up()
    server.use(bank_of(path, dtype, kernel))
    server.warm_up()
    assert (server.tally.totals(), server.tally.first_at, server.in_flight) == ((0, 0, 0.0), None, 0)


def test_warming_up_waits_for_nobody(path):
    server = RowServer(CPU, Recorder(group="experts"))
    server.use(bank_of(path, *KINDS[0]))
    with server._compute:  # as while a forward of seconds computes
        server.warm_up()


@pytest.mark.parametrize("experts", [[1, 1, 5], [5, 5, 5]])
def test_an_expert_that_is_named_twice_is_refused(path, experts):
    server = RowServer(CPU, Recorder(group="experts"))
    server.use(bank_of(path, torch.float32, "torch"))
    frame = next(frames(torch.float32))
    frame.meta["experts"] = experts
    answers = []
    server.serve(frame, Answers(answers.append))
    (answer,) = answers
    assert (answer.op, answer.meta["kind"]) == (Op.ERROR, "failed")


LIMITS = Limits(1 << 20, 1 << 24)
compiled_parts = pytest.mark.skipif(
    row_message.native is None or not available(), reason="the parts in C were not compiled on this machine"
)


def received(frame):
    """The frame as a channel has it: its tensors lie in the channel's memory."""
    return decode(b"".join(encode(frame, LIMITS)), LIMITS)


def answer_to(server, frame):
    answers = []
    server.serve(frame, Answers(answers.append))
    return answers[0]


@st.composite
def requests(draw):
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    tokens, counts = draw(st.integers(1, 40)), draw(st.lists(st.integers(1, 60), max_size=5))
    experts = sorted(draw(st.permutations(range(8)))[: len(counts)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    index = torch.randint(tokens, (sum(counts),), generator=generator)
    x_UD = torch.randn(tokens, 64, generator=generator).to(dtype)
    return Frame(Op.FORWARD, 5, draw(st.integers(0, 1)), 3, {"experts": experts, "counts": counts}, (x_UD, index))


@compiled_parts
def test_from_memory_to_memory_is_as_by_tensors(path):
    server = RowServer(CPU, Recorder(group="experts"))
    server.use(bank_of(path, torch.bfloat16, "native"))

    @given(requests())
    @settings(deadline=None, max_examples=80)
    def check(frame):
        by_memory, by_tensors = answer_to(server, received(frame)), answer_to(server, frame)
        assert (by_memory.op, by_memory.id, by_memory.layer, by_memory.epoch) == (Op.RESULT, 5, frame.layer, 3)
        (found,), (exact,) = by_memory.tensors, by_tensors.tensors
        assert found.dtype is exact.dtype
        assert torch.equal(found, exact)

    check()


@compiled_parts
def test_an_index_that_its_router_changes_later_is_not_looked_at_again(path, monkeypatch):
    """Rows of two routers run as one; the frame of one lies in memory that its router can still write."""
    import moeray.actors.rows as rows

    frame = next(frames(torch.float32, 1))
    mine = received(frame)

    def compute_late(batch, device):
        mine.tensors[1].fill_(1 << 40)
        return compute(batch, device)

    server = RowServer(CPU, Recorder(group="experts"))
    server.use(bank_of(path, torch.float32, "torch"))
    exact = answer_to(server, frame)
    monkeypatch.setattr(rows, "compute", compute_late)
    (found,) = answer_to(server, mine).tensors
    assert torch.equal(found, exact.tensors[0])


def test_whatever_goes_wrong_every_router_of_a_batch_is_told(path, monkeypatch):
    import moeray.actors.rows as rows

    def fail(batch, device):
        raise IndexError("rows that nobody has checked")

    monkeypatch.setattr(rows, "compute", fail)
    server = RowServer(CPU, Recorder(group="experts"))
    server.use(bank_of(path, torch.float32, "torch"))
    answers = [answer_to(server, frame) for frame in frames(torch.float32)]
    assert [(a.op, a.meta["kind"]) for a in answers] == [(Op.ERROR, "failed")] * 3
    assert server.in_flight == 0


@compiled_parts
@pytest.mark.parametrize("width", [0, 63, 65, 128])
def test_rows_of_another_width_are_refused_unread(path, width):
    server = RowServer(CPU, Recorder(group="experts"))
    server.use(bank_of(path, torch.bfloat16, "native"))
    meta = {"experts": [0], "counts": [1]}
    tensors = (torch.ones(1, width, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64))
    for frame in (
        Frame(Op.FORWARD, 1, 0, meta=meta, tensors=tensors),
        received(Frame(Op.FORWARD, 1, 0, meta=meta, tensors=tensors)),
    ):
        answer = answer_to(server, frame)
        assert (answer.op, answer.meta["kind"]) == (Op.ERROR, "failed")


@compiled_parts
def test_counts_that_are_not_those_of_the_rows_are_refused(path):
    held = bank_of(path, torch.bfloat16, "native").hold(0, [1, 2])
    x_RD = torch.ones(4, 64, dtype=torch.bfloat16)
    for counts in ([1, 2], [2, 3], [5, -1], [(1 << 63) - 1, 5]):
        with pytest.raises(ValueError, match="sum"):
            held(x_RD, counts)
