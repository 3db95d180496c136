"""Forwards that the part in C answers on a channel's end, and those that it leaves as they are."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.actors import answering
from moeray.actors.rows import RowServer
from moeray.errors import ChannelClosedError
from moeray.model.experts import ExpertBank
from moeray.model.kernels import available
from moeray.model.loading import open_model
from moeray.recorder import Recorder
from moeray.types import ExpertId
from moeray.wire.frame import Frame, Limits, Op
from moeray.wire.socket_channel import RING_THRESHOLD
from tests.checkpoints import make_tiny
from tests.wire.support import admitted_pair

pytestmark = pytest.mark.skipif(
    answering.native is None or not available(), reason="the parts in C were not compiled on this machine"
)

LIMITS = Limits(1 << 16, 1 << 24)
SOON = 10.0
WIDTH = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return open_model(str(make_tiny("mixtral", tmp_path_factory.mktemp("answering") / "m")), None, node="here")


class Served:
    """A row server with all experts of layer 0 but the last, and both ends of a router's channel to it."""

    def __init__(self, files, ring_bytes=1 << 20, dtype=torch.bfloat16, soon_full=False) -> None:
        self.server = RowServer(torch.device("cpu"), Recorder(group="experts"))
        self.bank = ExpertBank(files.family, files.weights, dtype, torch.device("cpu"))
        self.bank.load(ExpertId(0, e) for e in range(7))
        self.server.use(self.bank)
        self.router, self.actor = admitted_pair(LIMITS, ring_bytes, soon_full=soon_full)

    def close(self) -> None:
        self.router.close()
        self.actor.close()

    @contextmanager
    def answering(self):
        """As the actor's thread: whatever the part in C leaves is served by Python; `left` has those frames."""
        left: list[Frame] = []

        def run() -> None:
            try:
                while True:
                    if not self.server.answer(self.actor):
                        frame = self.actor.recv()
                        left.append(frame)
                        self.server.serve(frame, self.actor)
            except ChannelClosedError:
                return

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield left
        finally:
            self.router.close()
            thread.join(SOON)
            assert not thread.is_alive()

    def exact(self, frame: Frame) -> torch.Tensor:
        x_UD, index = frame.tensors
        return self.bank.forward(frame.layer, x_UD[index], frame.meta["experts"], frame.meta["counts"])


@pytest.fixture
def serve(files):
    """Makes them, and closes them at the end."""
    made = []

    def make(**kwargs) -> Served:
        made.append(Served(files, **kwargs))
        return made[-1]

    yield make
    for served in made:
        served.close()


@pytest.fixture
def served(serve):
    return serve()


def forward(counts, tokens=4, frame_id=1, experts=None, dtype=torch.bfloat16, width=WIDTH, layer=0):
    generator = torch.Generator().manual_seed(sum(counts))
    index = torch.randint(tokens, (sum(counts),), generator=generator)
    x_UD = torch.randn(tokens, width, generator=generator).to(dtype)
    experts = list(range(len(counts))) if experts is None else experts
    return Frame(Op.FORWARD, frame_id, layer, 9, {"experts": experts, "counts": list(counts)}, (x_UD, index))


def check_result(frame: Frame, result: Frame, exact: torch.Tensor) -> None:
    assert (result.op, result.id, result.layer, result.epoch) == (Op.RESULT, frame.id, frame.layer, frame.epoch)
    assert result.meta["compute_s"] > 0
    assert result.meta["queue_s"] >= 0
    assert torch.equal(result.tensors[0], exact)


@pytest.mark.parametrize("ring_bytes", [0, 1 << 20], ids=["through the socket", "with rings"])
def test_answers_are_those_of_the_bank(serve, ring_bytes):
    served = serve(ring_bytes=ring_bytes)

    @given(st.lists(st.integers(1, 120), min_size=1, max_size=7), st.integers(1, 80))
    @settings(deadline=None, max_examples=60)
    def check(counts, tokens):
        frame = forward(counts, tokens)
        served.router.send(frame)
        check_result(frame, served.router.recv(SOON), served.exact(frame))

    with served.answering() as left:
        check()
    # What is larger than a channel's buffer comes in parts, which Python reads.
    assert all(sum(frame.meta["counts"]) * WIDTH * 2 >= RING_THRESHOLD for frame in left)
    assert not (left and ring_bytes)


def test_what_was_answered_is_counted(served):
    frames = [forward([2, 1], frame_id=1), forward([3], frame_id=2, experts=[1])]
    with served.answering() as left:
        for frame in frames:
            served.router.send(frame)
            served.router.recv(SOON)
        assert served.server.tally.rows() == {ExpertId(0, 0): 2, ExpertId(0, 1): 4}
        assert served.server.tally.totals()[:2] == (6, 2)
    assert left == []
    assert served.server.in_flight == 0
    assert served.server.tally.first_at is not None


def test_a_thousand_in_a_row(served):
    """More than go out in one call, and than are counted at once."""
    frame = forward([2, 1])
    exact = served.exact(frame)
    with served.answering() as left:
        for _ in range(1000):
            served.router.send(frame)
            assert torch.equal(served.router.recv(SOON).tensors[0], exact)
    assert served.server.tally.totals()[:2] == (3000, 1000)
    assert left == []


@pytest.mark.parametrize("tokens", [300, 12_000], ids=["answered in C", "answered by Python"])
def test_a_frames_memory_is_given_back_before_its_answer_is_there(serve, tokens):
    """Whoever has the answer may send at once, and finds the whole ring free."""
    served = serve(ring_bytes=2 << 20)
    frame = forward([tokens], tokens)
    with served.answering() as left:
        for _ in range(30):
            served.router.send(frame)
            assert served.router.recv(SOON).op is Op.RESULT
            ring = served.router._connection.lane.out.contents
            assert ctypes.c_uint64.from_address(ring.progress).value == ring.head > 0
    assert bool(left) == (tokens > 300)


def changed(frame: Frame, **meta) -> Frame:
    return Frame(frame.op, frame.id, frame.layer, frame.epoch, frame.meta | meta, frame.tensors)


LEFT = {
    "a ping": Frame(Op.PING, 3),
    "an expert that is not hosted": forward([1, 2], experts=[0, 7]),
    "an expert that is nowhere": forward([1], experts=[1 << 40]),
    "another layer": forward([1], layer=1),
    "an expert beyond all numbers": forward([1, 2], experts=[(1 << 63) - 1, 3]),
    "an expert named twice": forward([1, 2], experts=[3, 3]),
    "experts in another order": forward([1, 2], experts=[4, 3]),
    "fewer rows than counted": changed(forward([2, 1]), counts=[2, 2]),
    "more rows than counted": changed(forward([2, 1]), counts=[1, 1]),
    "no rows": changed(forward([2]), counts=[0]),
    "a count below none": changed(forward([2, 1]), counts=[4, -1]),
    "counts of more experts": changed(forward([2, 1]), counts=[1, 1, 1]),
    "rows of another width": forward([2, 1], width=WIDTH + 2),
    "a dtype that the kernels do not take": forward([2, 1], dtype=torch.float16),
    "a token that was not sent": Frame(
        Op.FORWARD, 1, 0, 9, {"experts": [0], "counts": [1]},
        (torch.ones(2, WIDTH, dtype=torch.bfloat16), torch.tensor([2])),
    ),
    "a token that was not sent, in the ring": Frame(
        Op.FORWARD, 1, 0, 9, {"experts": [0], "counts": [300]},
        (torch.ones(300, WIDTH, dtype=torch.bfloat16), torch.full((300,), -1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("frame", LEFT.values(), ids=LEFT.keys())
def test_anything_else_is_left_to_be_read(served, frame):
    before, after = forward([300]), forward([2, 1])
    for one in (before, frame, after):
        served.router.send(one)
    assert not served.server.answer(served.actor)
    check_result(before, served.router.recv(SOON), served.exact(before))
    found = served.actor.recv(SOON)
    assert (found.op, found.id, found.layer, found.meta) == (frame.op, frame.id, frame.layer, frame.meta)
    assert all(torch.equal(mine, its) for mine, its in zip(found.tensors, frame.tensors, strict=True))
    with served.answering() as left:
        check_result(after, served.router.recv(SOON), served.exact(after))
    assert left == []


def test_outputs_that_no_frame_carries_are_an_error_and_not_the_channels_end(served):
    rows = LIMITS.max_payload_bytes // (2 * WIDTH) + 1
    after = forward([2, 1])
    with served.answering():
        served.router.send(forward([rows]))
        answer = served.router.recv(SOON)
        assert (answer.op, answer.meta["kind"]) == (Op.ERROR, "failed")
        assert "wire.max_payload_bytes" in answer.meta["message"]
        served.router.send(after)
        check_result(after, served.router.recv(SOON), served.exact(after))
    assert served.server.in_flight == 0


def test_fp32_is_left_to_torch(serve):
    served = serve(dtype=torch.float32)
    frame = forward([2, 1], dtype=torch.float32)
    with served.answering() as left:
        served.router.send(frame)
        assert torch.allclose(served.router.recv(SOON).tensors[0], served.exact(frame))
    assert len(left) == 1


def test_forgotten_experts_are_refused(served):
    with served.answering() as left:
        served.router.send(forward([2, 1]))
        assert served.router.recv(SOON).op is Op.RESULT
        served.bank.forget([ExpertId(0, 1)])
        served.router.send(forward([2, 1]))
        refusal = served.router.recv(SOON)
        assert (refusal.meta["kind"], refusal.meta["experts"]) == ("not_hosted", [1])
        served.router.send(forward([2]))
        assert served.router.recv(SOON).op is Op.RESULT
        assert len(left) == 1
        served.bank.forget(ExpertId(0, e) for e in range(7))
        served.router.send(forward([2]))
        assert served.router.recv(SOON).meta["experts"] == [0]


def test_while_another_computes_a_forward_is_left_to_wait_for_it(served):
    with served.server._compute:
        served.router.send(forward([2, 1]))
        assert not served.server.answer(served.actor)
    with served.answering() as left:
        assert served.router.recv(SOON).op is Op.RESULT
    assert left == []


def test_once_idle_what_comes_is_served_by_python(served):
    assert served.server.wait_idle(SOON)
    with served.answering() as left:
        served.router.send(forward([2, 1]))
        assert served.router.recv(SOON).op is Op.RESULT
        assert len(left) == 1


def test_an_answer_that_has_not_gone_out_yet_is_waited_for(serve, monkeypatch):
    served = serve(ring_bytes=0)
    sending, go, send_rows = threading.Event(), threading.Event(), served.actor.send_rows

    def send_late(result):
        sending.set()
        assert go.wait(SOON)
        send_rows(result)

    monkeypatch.setattr(served.actor, "send_rows", send_late)
    asked = forward([20_000])  # more than is sent without Python
    with served.answering(), ThreadPoolExecutor(1) as pool:
        served.router.send(asked)
        assert sending.wait(SOON)
        assert served.server.in_flight == 1
        assert not served.server.wait_idle(0.0)
        idle = pool.submit(served.server.wait_idle, SOON)
        go.set()
        check_result(asked, served.router.recv(SOON), served.exact(asked))
        assert idle.result(SOON)
    assert served.server.in_flight == 0


def test_whoever_computes_is_waited_for(served):
    with served.server._compute:
        assert not served.server.wait_idle(0.0)


@pytest.mark.parametrize("rows", [40, 300], ids=["through the socket", "in the ring"])
def test_a_router_that_does_not_read_gets_every_answer_in_order_later(serve, rows):
    """The socket fills up, answers go out in part and not at all, and the ring has no room for a while."""
    served = serve(ring_bytes=1 << 17, soon_full=True)
    frames = [forward([rows], frame_id=n, experts=[n % 7]) for n in range(1, 60)]
    sender = threading.Thread(target=lambda: [served.router.send(frame) for frame in frames])
    with served.answering():
        sender.start()
        answers = []
        for frame in frames:
            answers.append(served.router.recv(SOON))
            check_result(frame, answers[-1], served.exact(frame))
        sender.join(SOON)
    assert all(a.id < b.id for a, b in pairwise(answers))


def test_a_channel_that_closes_ends_the_wait(served):
    done = threading.Event()

    def wait() -> None:
        served.server.answer(served.actor)
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    served.router.close()
    assert done.wait(SOON)
    thread.join()
    served.actor.close()
    with pytest.raises(ChannelClosedError):
        served.server.answer(served.actor)


def test_forwards_of_two_routers_at_once(serve):
    first, second = serve(), serve()
    second.server = first.server

    def ask(one: Served, errors: list[BaseException]) -> None:
        try:
            for n in range(200):
                frame = forward([1 + n % 5, 2], frame_id=n)
                one.router.send(frame)
                check_result(frame, one.router.recv(SOON), one.exact(frame))
        except BaseException as error:
            errors.append(error)

    errors: list[BaseException] = []
    with first.answering(), second.answering():
        threads = [threading.Thread(target=ask, args=(one, errors)) for one in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert first.server.tally.totals()[:2] == (2 * sum(3 + n % 5 for n in range(200)), 400)
    assert first.server.in_flight == 0
