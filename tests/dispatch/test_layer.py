"""A layer in one call of C: what goes out, what is taken, and what is left to Python."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from moeray.dispatch import planner
from moeray.dispatch.plan import plan_rows
from moeray.dispatch.planner import Planner
from moeray.dispatch.view import Usable
from moeray.model.dispatched import Sum
from moeray.model.kernels import combine
from moeray.wire.frame import Frame, Limits, Op
from moeray.wire.socket_channel import RING_THRESHOLD
from tests.wire.support import admitted_pair

pytestmark = pytest.mark.skipif(planner.native is None, reason="the part in C was not compiled on this machine")

LIMITS = Limits(1 << 12, 1 << 22)
SOON = 10.0
NOW = Usable(epoch=9, replicas={3: {0: ("a",), 1: ("b",), 2: ("a",), 3: ("b",)}})
IDS = torch.tensor([[0, 1], [2, 0], [3, 1], [2, 3]])


class Actors:
    """Both actors' ends of a router's channels; expert e multiplies by e + 1."""

    def __init__(self, names="ab", ring_bytes=1 << 20, soon_full=False) -> None:
        self.pairs = {name: admitted_pair(LIMITS, ring_bytes, soon_full=soon_full) for name in names}
        self.threads: list[threading.Thread] = []
        self.frames: dict[str, Frame] = {}

    def lanes(self) -> list[int]:
        return [self.pairs[name][0].lane if name in self.pairs else 0 for name in "ab"]

    def end(self, name: str):
        return self.pairs[name][1]

    def answer(self, name: str, how=None) -> None:
        """In a thread: take the next frame, and send what `how` makes of it and its outputs."""

        def run() -> None:
            frame = self.frames[name] = self.end(name).recv(SOON)
            self.end(name).send(how(frame, outputs(frame)) if how else result(frame, outputs(frame)))

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def close(self) -> None:
        for thread in self.threads:
            thread.join(SOON)
        for pair in self.pairs.values():
            for channel in pair:
                channel.close()


def outputs(frame: Frame) -> torch.Tensor:
    x_UD, token_of_row_R = frame.tensors
    experts, counts = torch.tensor(frame.meta["experts"]), torch.tensor(frame.meta["counts"])
    return x_UD[token_of_row_R] * (experts.repeat_interleave(counts) + 1)[:, None].to(x_UD.dtype)


def result(frame: Frame, out_RD: torch.Tensor, **changed) -> Frame:
    fields = {"id": frame.id, "layer": frame.layer, "epoch": frame.epoch} | changed
    return Frame(Op.RESULT, meta={"compute_s": 0.5 + len(out_RD), "queue_s": 0.0}, tensors=(out_RD,), **fields)


@pytest.fixture
def actors():
    actors = Actors()
    yield actors
    actors.close()


def x_of(width=8, tokens=4):
    return torch.arange(tokens * width, dtype=torch.float32).view(tokens, width)


def run(lanes, x_TD, *, within_s=SOON, ids_TK=IDS, now=NOW, combining=None):
    made = Planner()
    made.renew(now)
    out_TKD = torch.full((*ids_TK.shape, x_TD.shape[1]), -1.0, dtype=x_TD.dtype)
    return made.layer(now, 3, ids_TK, x_TD, out_TKD.data_ptr(), lanes, 7, within_s, combining), out_TKD


def exact(x_TD, ids_TK=IDS):
    return x_TD[:, None, :] * (ids_TK + 1.0)[:, :, None].to(x_TD.dtype)


@pytest.mark.parametrize("width", [1, 8, RING_THRESHOLD // 8], ids=["tiny", "through the socket", "in the ring"])
def test_rows_go_out_and_outputs_to_their_places(actors, width):
    x_TD = x_of(width)
    actors.answer("a")
    actors.answer("b")
    found, out_TKD = run(actors.lanes(), x_TD)
    assert torch.equal(out_TKD, exact(x_TD))
    assert found.left == []
    assert [done[:4] for done in sorted(found.answered)] == [(0, [0, 2], 4, 3), (1, [1, 3], 4, 3)]
    assert all(0 < took_s < SOON for *_, took_s in found.answered)
    assert found.slowest_s == 4.5
    for number, name in enumerate("ab"):
        frame, share = actors.frames[name], plan_rows(IDS.numpy(), NOW.replicas[3]).shares[number]
        assert (frame.op, frame.id, frame.layer, frame.epoch) == (Op.FORWARD, 7 + number, 3, 9)
        assert frame.meta == {"experts": share.experts, "counts": share.counts}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["rows fp32", "rows bf16"])
@pytest.mark.parametrize("width", [1, 8, RING_THRESHOLD // 4], ids=["tiny", "through the socket", "in the ring"])
def test_outputs_are_combined_once_all_are_there(actors, width, dtype, weights):
    x_TD = torch.randn(4, width).to(dtype)
    total = Sum(torch.rand(4, 2).to(weights), torch.full_like(x_TD, torch.nan))
    for _ in range(3):  # the rings' memory is given back each time
        actors.answer("a")
        actors.answer("b")
        found, _ = run(actors.lanes(), x_TD, combining=total.in_c())
        assert found.left == []
        assert found.combined_s > 0.0
        assert torch.equal(total.out_TD, combine(exact(x_TD).to(dtype), total.weights_TK))
        total.out_TD.fill_(torch.nan)


def test_nothing_is_combined_while_something_is_left(actors):
    actors.answer("a")
    x_TD = x_of(RING_THRESHOLD // 8)
    total = Sum(torch.rand(4, 2), torch.full_like(x_TD, -1.0))
    found, out_TKD = run(actors.lanes(), x_TD, within_s=0.2, combining=total.in_c())
    assert [left.share.actor_id for left in found.left] == ["b"]
    assert found.combined_s == 0.0
    assert (total.out_TD == -1).all()
    chosen = (IDS == 0) | (IDS == 2)
    assert torch.equal(out_TKD[chosen], exact(x_TD)[chosen])


def test_what_cannot_be_combined_in_c():
    out_TD = torch.empty(4, 8)
    assert Sum(torch.rand(4, 2), out_TD, norm=torch.nn.Identity()).in_c() is None
    assert Sum(torch.rand(4, 2), out_TD.half()).in_c() is None
    assert Sum(torch.rand(4, 4)[:, ::2], out_TD).in_c() is None


def test_whoever_is_not_on_a_lane_is_left_and_nobody_is_waited_for(actors):
    found, out_TKD = run([actors.lanes()[0], 0], x_of())
    assert found.answered == []
    assert [(left.actor, left.share.actor_id, left.frame_id, left.in_part) for left in found.left] == [
        (0, "a", 7, False), (1, "b", 0, False),
    ]  # fmt: skip
    assert [left.share for left in found.left] == plan_rows(IDS.numpy(), NOW.replicas[3]).shares
    assert actors.end("a").recv(SOON).id == 7
    assert (out_TKD == -1).all()


@pytest.mark.parametrize(("kib", "goes"), [(128, True), (256, False)])
def test_what_takes_long_to_copy_is_left_to_the_channel(actors, kib, goes):
    found, _ = run(actors.lanes(), x_of(kib << 8, tokens=1), ids_TK=torch.tensor([[0]]), within_s=0.0)
    assert [bool(left.frame_id) for left in found.left] == [goes]


def test_nobody_is_waited_for_longer_than_asked(actors):
    actors.answer("a")
    found, out_TKD = run(actors.lanes(), x_of(), within_s=0.2)
    assert [(left.share.actor_id, left.frame_id) for left in found.left] == [("b", 8)]
    assert [done[0] for done in found.answered] == [0]
    chosen = (IDS == 0) | (IDS == 2)
    assert torch.equal(out_TKD[chosen], exact(x_of())[chosen])
    assert (out_TKD[~chosen] == -1).all()


ODD = {
    "an error": lambda frame, out: Frame(Op.ERROR, frame.id, frame.layer, meta={"kind": "failed", "message": "no"}),
    "an answer to an earlier frame": lambda frame, out: result(frame, out, id=frame.id - 2),
    "too few rows": lambda frame, out: result(frame, out[1:]),
    "rows of another width": lambda frame, out: result(frame, torch.cat([out, out], 1)),
    "rows of another dtype": lambda frame, out: result(frame, out.half()),
}


@pytest.mark.parametrize("how", ODD.values(), ids=ODD.keys())
def test_anything_else_is_left_to_be_read(actors, how):
    actors.answer("b", how)
    found, out_TKD = run(actors.lanes(), x_of())
    assert ("b", 8, False) in [(left.share.actor_id, left.frame_id, left.in_part) for left in found.left]
    frame = actors.pairs["b"][0].recv(SOON)
    expected = how(actors.frames["b"], outputs(actors.frames["b"]))
    assert (frame.op, frame.id) == (expected.op, expected.id)
    assert (out_TKD == -1).all()


def test_a_channel_that_ends_is_left(actors):
    actors.end("a").close()
    found, _ = run(actors.lanes(), x_of())
    assert {left.share.actor_id for left in found.left} == {"a", "b"}
    actors.pairs["b"][0].close()
    assert [left.frame_id for left in run(actors.lanes(), x_of())[0].left] == [0, 0]


def test_a_closing_channel_wakes_the_wait(actors):
    timer = threading.Thread(target=lambda: (actors.end("a").recv(SOON), actors.pairs["b"][0].close()))
    timer.start()
    found, _ = run(actors.lanes(), x_of())
    assert {left.share.actor_id for left in found.left} == {"a", "b"}
    timer.join()


def test_a_message_that_the_socket_takes_in_part_is_finished_before_the_next():
    actors = Actors("a", ring_bytes=0, soon_full=True)
    x_TD, ids_TK, sent, found = x_of(2000, tokens=1), torch.tensor([[0]]), [], None
    while not (found and found.left[0].in_part):
        found, _ = run(actors.lanes(), x_TD, ids_TK=ids_TK, within_s=0.0)
        assert found.left[0].frame_id == 7
        sent.append(found.left[0].share)
    found, _ = run(actors.lanes(), x_TD, ids_TK=ids_TK, within_s=0.0)
    assert found.left[0].frame_id == 0, "none goes out while another is not done"
    rest = threading.Thread(target=actors.pairs["a"][0].flush)
    rest.start()
    for _ in sent:
        frame = actors.end("a").recv(SOON)
        assert torch.equal(frame.tensors[0], x_TD)
    rest.join(SOON)
    assert not rest.is_alive()
    actors.close()


def test_what_takes_more_than_this_is_not_begun(actors):
    now = Usable(epoch=9, replicas={3: {0: ("a",), 1: ("b",), 2: (), 3: ("b",)}})
    found, out_TKD = run(actors.lanes(), x_of(), now=now)
    assert found is None
    assert (out_TKD == -1).all()
    assert run(actors.lanes(), torch.empty(0, 8), ids_TK=IDS[:0])[0] is None


def test_a_signal_during_the_wait_is_heeded(actors):
    class Heeded(Exception):
        pass

    def heed(number, frame):
        raise Heeded

    before = signal.signal(signal.SIGUSR1, heed)
    main = threading.main_thread().ident

    def interrupt() -> None:
        actors.end("a").recv(SOON)
        signal.pthread_kill(main, signal.SIGUSR1)

    timer = threading.Thread(target=interrupt)
    try:
        timer.start()
        with pytest.raises(Heeded):
            run(actors.lanes(), x_of())
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
