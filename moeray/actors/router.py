"""A router actor: the trunk, the KV cache and the step loop; tokens leave on the ingresses' channels."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import psutil

from moeray.actors.callers import Callers
from moeray.actors.cores import part
from moeray.actors.engine_figures import EngineFigures, status_of, with_stats
from moeray.actors.folders import runtime_dir
from moeray.actors.memory import Memory
from moeray.actors.observers import Losses, Observers
from moeray.actors.request_figures import RequestFigures
from moeray.actors.spec import ActorReport, ActorSpec
from moeray.actors.step_loop import StepLoop
from moeray.actors.system_actor import SystemActor
from moeray.config import Config
from moeray.control.objectives import Objectives
from moeray.control.placement import Placement
from moeray.control.reports import RouterReport, report_tree
from moeray.dispatch.dispatcher import Dispatcher
from moeray.dispatch.halves import Halves
from moeray.dispatch.view import PlacementView
from moeray.engine.engine import Engine
from moeray.engine.explain import Explainer
from moeray.engine.overlap import may_overlap, overlapped
from moeray.engine.trunk_runner import TrunkRunner
from moeray.errors import MoerayError, WireError
from moeray.model.loading import eos_token_ids, open_model
from moeray.model.trunk import Trunk
from moeray.recorder import Reading, Recorder, Snapshot
from moeray.threads import all_cores, apart
from moeray.types import Address, Lifecycle
from moeray.wire.channel import Channel, Listener, connect
from moeray.wire.device_memory import DeviceMemory
from moeray.wire.device_side import device_side

log = logging.getLogger(__name__)

FLUSH_S = 2.0


def _nothing() -> None:
    """Nobody wants to know that the actor has stopped itself."""


class RouterActor(SystemActor):
    """Lifecycle: start (listening) → load_trunk (trunk in memory, step loop running) → drain → stop.

    The step loop's thread owns the engine, the trunk and the dispatchers, and lends them to the thread of a step's
    second half. Control methods are thread-safe. An actor that stops itself, because its step loop died or no
    controller was heard of for `control.orphan_s`, calls `on_stop` then.
    """

    KIND = "router"

    def __init__(
        self, spec: ActorSpec, node_id: str, *, on_stop: Callable[[], None] = _nothing,
        clock: Callable[[], float] = time.monotonic, memory: DeviceMemory | None = None,
    ) -> None:  # fmt: skip
        """`memory`: see `device_side`."""
        super().__init__(spec, node_id, clock)
        self._side = device_side(self._device, spec.config.wire, memory)
        self._on_stop = on_stop
        self._recorder = Recorder(
            model_name=spec.config.served_model_name, kind="router", group=spec.group, actor=spec.actor_id
        )
        self._memory = Memory(self._recorder, self._side)
        self._engine_figures = EngineFigures(self._recorder)
        self._requests = RequestFigures(self._recorder, Objectives.of(spec.config.control))
        self._identity = spec.identity(node_id)
        self._loop = StepLoop(spec.actor_id, self._recorder, self._requests, self._stop_itself, self._take_cores)
        self._loop.keep_to(self._requests.objectives)
        self._observers = Observers(self._report)
        self._callers = Callers(self._loop, self._observers, self._heard)
        folder = runtime_dir(node_id, spec.system)
        self._listener = Listener(self._identity, spec.config.wire, self._callers.serve, folder)
        self._view = PlacementView()
        self._publishing = threading.Lock()
        self._published: tuple[Mapping[str, Any], dict[str, Address]] = (Placement().to_tree(), {})
        self._dispatchers: Halves | None = None
        self._overlaps = False
        self._facts: dict[str, Any] = {}

    @property
    def epoch(self) -> int:
        """Of the placement that it holds; 0 before there is one."""
        return self._view.epoch

    # -- control --------------------------------------------------------------------------------------------------

    def start(self) -> tuple[ActorReport, Address]:
        """Listen, and say where this actor is."""
        return self._listen(int(psutil.virtual_memory().available), self._stop_itself)

    def load_trunk(self, revision: str | None = None) -> dict[str, Any]:
        """Load the trunk, allocate the KV cache, start the step loop.

        `revision` pins the hub's commit. Raises CheckpointError, UnsupportedModelError, and MoerayError in a router
        that was stopped meanwhile.
        """
        self._heard()
        return apart(lambda: self._load_trunk(revision))  # the step loop is what computes here

    def _load_trunk(self, revision: str | None) -> dict[str, Any]:
        config = self._spec.config
        files = open_model(config.model, revision or config.revision, node=self._node_id)
        dtype = files.dtype(config.dtype)
        trunk = Trunk.load(files.checkpoint, files.family, files.weights, dtype, self._device, config.engine)
        self._dispatchers = Halves(self._dispatcher(), self._dispatcher())
        combined = self._recorder.histogram("moeray_combine_seconds").observe
        whole = TrunkRunner(trunk, config.engine, self._dispatchers.first.combined, eos_token_ids(files), combined)
        runner = overlapped(whole, self._dispatchers.each, config.engine.overlap, lambda: self._overlaps)
        self._revision = files.checkpoint.source.revision
        self._facts = {
            "max_context": runner.max_context,
            "vocab_size": runner.vocab_size,
            "kv_blocks": runner.num_blocks,
        }
        with self._lifecycle:
            if self._state is Lifecycle.STOPPED:
                raise MoerayError(f"router {self._spec.actor_id} was stopped while it loaded; start another")
            self._state = self._state.advance(Lifecycle.READY)
            explain = Explainer(whole, self._dispatchers.first, files)
            self._loop.start(Engine(config.engine, runner, explain=explain))
        return self._facts

    def _take_cores(self) -> None:
        if self._device.type == "cpu" and self._spec.config.router.pin_threads:
            part(self._spec.threads or all_cores())

    def _dispatcher(self) -> Dispatcher:
        return Dispatcher(
            self._view,
            self._connect,
            self._recorder,
            deadline_s=self._spec.config.wire.deadline_s,
            patience=self._loop.patience,
            on_loss=self._observers.lose,
            on_orphans=self._observers.push,
            device=self._side.memory.device if self._side is not None else None,
        )

    def _connect(self, address: Address, seconds: float) -> Channel:
        return connect(address, self._identity, self._spec.config.wire, timeout=seconds, side=self._side)

    def publish(
        self,
        placement: Mapping[str, Any],
        addresses: Mapping[str, Address],
        rates: Mapping[str, float] | None = None,
        lost: Sequence[str] = (),
    ) -> int:
        """Take a placement (plain data) and where its actors listen; the epoch now held is the acknowledgement.

        `rates`: rows per second of each actor, where known; `lost`: actors that are dead. Those that are new here are
        dialled first, so that no step waits for that.
        """
        self._heard()
        nodes = {address.node_id for address in addresses.values()}
        self._overlaps = may_overlap(self._spec.config.engine.overlap, self._device, self._node_id, nodes)
        if self._dispatchers:
            self._dispatchers.expect(addresses, both=self._overlaps)
        with self._publishing:  # two controllers may, for a moment
            if self._view.publish(Placement.from_tree(placement), addresses, rates=rates, lost=lost):
                before = self._published[1]
                self._published = placement, dict(addresses)
                self._observers.forget([actor for actor in before if addresses.get(actor) != before[actor]])
        return self._view.epoch

    def restore(self, actor_id: str) -> None:
        """An expert actor that this router had given up is alive, at the same address: use it again."""
        self._heard()
        self._observers.forget([actor_id])
        self._view.restore(actor_id)

    def configure(self, config: Config, since: float) -> None:
        super().configure(config, since)
        self._loop.keep_to(Objectives.of(config.control))

    def describe(self) -> dict[str, Any]:
        placement, addresses = self._published
        return super().describe() | {
            "epoch": self._view.epoch, "facts": self._facts, "placement": placement,
            "addresses": {actor: asdict(where) for actor, where in addresses.items()},
        }  # fmt: skip

    def drain(self, timeout: float, migrate: bool = False) -> bool:
        """Take no new request, and finish those that run; True when they have all ended here.

        What is left after `timeout` seconds (with `migrate`, at once) is handed over: every channel is told GOODBYE,
        and the ingresses go on elsewhere. To be stopped afterwards.
        """
        self._heard()
        with self._lifecycle:
            if self._state is Lifecycle.READY:
                self._state = self._state.advance(Lifecycle.DRAINING)
        self._loop.refuse()
        idle = not migrate and self._loop.wait_idle(timeout)
        if not idle:
            self._callers.goodbye()
            self._loop.abort_all()
        self._callers.flush(FLUSH_S)
        return idle

    def leave(self) -> None:
        super().leave()
        self._observers.push()

    def stop(self) -> None:
        """End the step loop and every channel. Idempotent."""
        self._stop()

    def _stop(self) -> bool:
        """False where another call has stopped it or is about to."""
        with self._lifecycle:
            if self._state is Lifecycle.STOPPED:
                return False
            self._state = self._state.advance(Lifecycle.STOPPED)
        self._end_vigil()
        try:
            self._listener.close(timeout=5.0)
        finally:
            if self._dispatchers:
                self._dispatchers.abandon()  # with its channels the router's requests have gone: the step is for nobody
            self._loop.stop(timeout=30.0)
            self._leave_place()
            if self._dispatchers:
                self._dispatchers.close()
        return True

    def _stop_itself(self) -> None:
        try:
            stopped = self._stop()
        except WireError as error:
            log.error("%s", error)
            stopped = True
        if stopped:
            self._on_stop()

    # -- what it is doing -----------------------------------------------------------------------------------------

    def _report(self, lost: Losses) -> dict[str, Any]:
        at, metrics = self._read()
        report = RouterReport(
            self._spec.actor_id,
            self._incarnation,
            epoch=self._view.epoch,
            expert_s=self._dispatchers.seconds_total if self._dispatchers else 0.0,
            requests=self._requests.ended,
            late=self._requests.late,
            orphans=self._dispatchers.orphans if self._dispatchers else 0,
            lost=lost,
            leaving=self._leaving,
            at=at,
            metrics=metrics,
        )
        return report_tree(with_stats(report, self._loop.stats()))

    def status(self) -> dict[str, Any]:
        return super().status() | {"epoch": self._view.epoch} | status_of(self._loop.stats())

    def metrics(self) -> Reading:
        """All that this router counts."""
        self._heard()
        return Reading(self._spec.actor_id, self._incarnation, *self._read())

    def _read(self) -> tuple[float, Snapshot]:
        if self._dispatchers:
            self._dispatchers.count()
        self._memory.update()
        self._engine_figures.update(self._loop.stats())
        return self._recorder.read()
