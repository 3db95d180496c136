"""Expert actors for dispatch tests: real listeners in this process, which do as the test says.

Expert `e` multiplies a row by e + 1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from moeray.control.placement import Placement
from moeray.dispatch.delivery import OnLoss
from moeray.dispatch.dispatcher import Dispatcher
from moeray.dispatch.view import PlacementView
from moeray.errors import ChannelClosedError
from moeray.model.dispatched import Sum
from moeray.model.kernels import combine
from moeray.recorder import Recorder
from moeray.settings.wire import WireConfig
from moeray.types import Address, ExpertId
from moeray.wire.channel import Channel, Listener, connect
from moeray.wire.frame import Frame, Op
from moeray.wire.identity import Identity

WIRE = WireConfig(shared_memory_bytes=1 << 20, max_payload_bytes=8 << 20)

Behaviour = Callable[["FakeActor", Channel, Frame], Frame | None]
"""What an actor does with a forward; None: it does not answer."""


def identity(actor: str, node: str = "here") -> Identity:
    return Identity(actor, node, "model", b"secret")


def serve(actor: FakeActor, channel: Channel, frame: Frame) -> Frame:
    x_UD, token_of_row_R = frame.tensors
    scale = [e + 1.0 for e, n in zip(frame.meta["experts"], frame.meta["counts"], strict=True) for _ in range(n)]
    out_RD = x_UD[token_of_row_R] * torch.tensor(scale)[:, None]
    return Frame(Op.RESULT, frame.id, frame.layer, meta={"compute_s": 0.0, "queue_s": 0.0}, tensors=(out_RD,))


def hang(actor: FakeActor, channel: Channel, frame: Frame) -> None:
    """Never answer, and go on listening."""


def vanish(actor: FakeActor, channel: Channel, frame: Frame) -> None:
    channel.close()


def misfit(actor: FakeActor, channel: Channel, frame: Frame) -> Frame:
    return Frame(Op.RESULT, frame.id, frame.layer, tensors=(torch.zeros(1, 1),))


def garbage(actor: FakeActor, channel: Channel, frame: Frame) -> None:
    channel._connection.sock.sendall(b"\xff" * 256)  # what no Channel would send


def hold(actor: FakeActor, channel: Channel, frame: Frame) -> Frame:
    """Answer once the test says so."""
    assert actor.release.wait(20)
    return serve(actor, channel, frame)


def refuse(kind: str, **meta: object) -> Behaviour:
    def answer(actor: FakeActor, channel: Channel, frame: Frame) -> Frame:
        return Frame(Op.ERROR, frame.id, frame.layer, meta={"kind": kind, "message": "a poem of woe", **meta})

    return answer


class FakeActor:
    """`script`: behaviours for the forwards to come, in order; when it is empty, the actor serves.

    `received` gets the (experts, counts) of each forward before anything is done with it.
    """

    def __init__(self, actor_id: str, folder: Path, node: str = "here") -> None:
        self.script: list[Behaviour] = []
        self.received: SimpleQueue[dict[int, int]] = SimpleQueue()
        self.forwards = 0
        self.rows = 0
        self.release = threading.Event()
        self.hung_up = threading.Event()
        wire = replace(WIRE, remote="off" if node == "here" else "both")
        self._listener = Listener(identity(actor_id, node), wire, self._run, folder)
        self.address = self._listener.start()

    def _run(self, channel: Channel) -> None:
        with suppress(ChannelClosedError):
            while True:
                frame = channel.recv()
                self.forwards += 1
                self.rows += sum(frame.meta["counts"])
                self.received.put(dict(zip(frame.meta["experts"], frame.meta["counts"], strict=True)))
                behaviour = self.script.pop(0) if self.script else serve
                answer = behaviour(self, channel, frame)
                if answer is not None:
                    channel.send(answer)
        self.hung_up.set()

    def close(self) -> None:
        self.release.set()
        self._listener.close(10.0)


class Stage:
    """A dispatcher, its view and some actors. `losses` has what `on_loss` was told, `dialling` the actors that are
    being dialled, `dialled` those that were; each may take `patience_s` for that. `combines`: outputs are summed up."""

    combines = False

    def __init__(self, folder: Path, names: str = "ab", *, deadline_s: float = 30.0, nodes: str = "here") -> None:
        self.actors = {name: FakeActor(name, folder, nodes) for name in names}
        self.view = PlacementView()
        self.recorder = Recorder()
        self.losses: list[tuple[str, str]] = []
        self.on_loss: OnLoss = lambda *loss: self.losses.append(loss)
        self.on_orphans: Callable[[], None] = lambda: None
        self.dialling: list[str] = []
        self.dialled: list[str] = []
        self.patience_s = 0.0
        self.patience: Callable[[float], float] = lambda began: math.inf
        self.dispatcher = Dispatcher(
            self.view,
            self._connect,
            self.recorder,
            deadline_s=deadline_s,
            patience=lambda began: self.patience(began),
            on_loss=lambda actor_id, reason: self.on_loss(actor_id, reason),
            on_orphans=lambda: self.on_orphans(),
        )

    def _connect(self, address: Address, seconds: float) -> Channel:
        self.dialling.append(address.actor_id)
        try:
            return connect(address, identity("router-0"), WIRE, timeout=max(seconds, self.patience_s))
        finally:
            self.dialled.append(address.actor_id)
            self.dialling.remove(address.actor_id)

    def publish(self, epoch: int, replicas: dict[int, str], *, lost: Iterable[str] = (), known: str = "") -> None:
        """Experts of layer 0 and their replicas; `known`: the actors with an address (default: those that host)."""
        table = {ExpertId(0, expert): tuple(actors) for expert, actors in replicas.items()}
        names = known or "".join(sorted({a for actors in replicas.values() for a in actors}))
        addresses = {name: self.actors[name].address for name in names}
        assert self.view.publish(Placement(epoch, table), addresses, lost=lost)

    def dispatch(self, ids: list[list[int]]) -> None:
        """One layer; every output must be right."""
        ids_TK = torch.tensor(ids)
        x_TD = torch.randn(len(ids), 8)
        if not self.combines:
            assert torch.equal(self.dispatcher(0, x_TD, ids_TK), expected(x_TD, ids_TK))
            return
        total = Sum(torch.rand(ids_TK.shape), torch.full_like(x_TD, torch.nan))
        self.dispatcher.combined(0, x_TD, ids_TK, total)
        assert torch.equal(total.out_TD, combine(expected(x_TD, ids_TK), total.weights_TK))

    def close(self) -> None:
        self.dispatcher.close()
        for actor in self.actors.values():
            actor.close()


def expected(x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    return x_TD[:, None, :] * (ids_TK + 1.0)[:, :, None]


class Background:
    """A dispatch in a thread of its own, whose error is raised by `join`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def join(self, seconds: float = 20.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
