"""An expert actor: hosts experts' weights and nothing else. Rows in, rows out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from moeray.actors.cores import Cores, claim
from moeray.actors.expert_figures import ExpertFigures
from moeray.actors.expert_load import EXPERT_LOAD, by_expert
from moeray.actors.folders import runtime_dir
from moeray.actors.rows import RowServer
from moeray.actors.spec import ActorReport, ActorSpec
from moeray.actors.system_actor import SystemActor
from moeray.control.reports import ExpertReport, report_tree
from moeray.errors import ChannelClosedError, PlacementError, WireError
from moeray.machine import machine_dir
from moeray.model.experts import ExpertBank
from moeray.model.loading import open_bank, open_model
from moeray.recorder import Reading, Recorder, Snapshot
from moeray.threads import BACKGROUND, apart, in_idle_time, wait_for_a_core
from moeray.types import Address, ExpertId, Lifecycle
from moeray.wire.channel import Channel, Listener
from moeray.wire.device_memory import DeviceMemory
from moeray.wire.device_side import device_side
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)

BRING_IN_S = 0.25
"""An actor that hosts further experts says so after this time, however much of their weights is in memory by then. The
rest follows, while the cores have nothing better to do."""


class ExpertActor(SystemActor):
    """Lifecycle: start (listening, empty) → prepare or host (model open, weights mapped) → drain → stop.

    Control methods are thread-safe. Each peer's channel has a thread of its own, so that the controller is answered
    while a forward computes.

    An actor that hears of no controller for `control.orphan_s` stops itself and then calls `on_stop`.
    """

    KIND = "expert"

    def __init__(
        self, spec: ActorSpec, node_id: str, *, on_stop: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic, memory: DeviceMemory | None = None,
    ) -> None:  # fmt: skip
        """`memory`: see `device_side`."""
        super().__init__(spec, node_id, clock)
        wire = spec.config.wire
        self._side = device_side(self._device, wire, memory)
        self._on_stop = on_stop
        self._recorder = Recorder(kind="expert", group=spec.group, actor=spec.actor_id)
        self._figures = ExpertFigures(self._recorder, self._side)
        self._rows = RowServer(self._device, self._recorder)
        self._loading = threading.Lock()
        self._telling = threading.Lock()  # what is told later is never less
        self._bank: ExpertBank | None = None
        self._loaded = (0, 0)
        folder = runtime_dir(node_id, spec.system)
        self._listener = Listener(spec.identity(node_id), wire, self._serve, folder, self._side)
        self._cores: Cores | None = None
        self._pins = self._device.type == "cpu" and spec.config.experts.pin_threads

    # -- control --------------------------------------------------------------------------------------------------

    def start(self) -> tuple[ActorReport, Address]:
        """Listen, and say where this actor is and how many bytes are free for weights."""
        return self._listen(_free_bytes(self._device), self._orphaned)

    def prepare(self, revision: str | None = None) -> None:
        """Open the model, so that hosting later only maps weights. Ready from then on, also without an expert.

        `revision` pins the hub's commit, so that all nodes read the same files. Raises CheckpointError.
        """
        self._heard()
        with self._loading:
            if self._spec.background:
                apart(lambda: self._open(revision), BACKGROUND)
            else:
                self._open(revision)

    def host(self, experts: Sequence[tuple[int, int]], revision: str | None = None) -> int:
        """Map the weights of `experts` beside those already hosted; stored bytes in all.

        `revision` as for `prepare`. Raises CheckpointError, and PlacementError from an actor that is on its way out.
        """
        self._heard()
        with self._loading:
            bank = self._open(revision)
            if not bank.hosted:
                self._rows.tally.first_at = None
            wanted = [ExpertId(*expert) for expert in experts]
            apart(lambda: bank.load(wanted, lambda done: setattr(self, "_loaded", (done, len(wanted)))))
            self._bring_in(bank, wanted)
            if self._cores is None and self._spec.threads and self._pins:
                self._cores = claim(self._spec.threads, machine_dir() / "cores")
            return bank.nbytes

    def _bring_in(self, bank: ExpertBank, experts: Sequence[ExpertId]) -> None:
        """The pages of their weights, which their first rows would wait for."""
        in_idle_time(lambda: bank.fault_in(experts, lambda: self._state is not Lifecycle.READY), BRING_IN_S)

    def unhost(self, experts: Sequence[tuple[int, int]]) -> int:
        """Forget the weights of `experts`; stored bytes of those left. Rows being computed finish, later ones are told
        that the expert is not hosted."""
        self._heard()
        with self._loading:
            if self._bank is None:
                return 0
            self._bank.forget(ExpertId(*expert) for expert in experts)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # the GPU's other actors can have it
            return self._bank.nbytes

    def _open(self, revision: str | None) -> ExpertBank:
        with self._lifecycle:
            if self._state not in (Lifecycle.STARTING, Lifecycle.READY):
                raise PlacementError(f"expert actor {self._spec.actor_id} is {self._state.value}; host elsewhere")
        if self._bank is None:
            config = self._spec.config
            files = open_model(config.model, revision or config.revision, node=self._node_id)
            self._bank = open_bank(files, config, self._device)
            self._rows.use(self._bank)
            self._revision = files.checkpoint.source.revision
        elif revision not in (None, self._revision):
            raise PlacementError(
                f"expert actor {self._spec.actor_id} holds revision {self._revision} of the model, not {revision}; "
                "start another actor for it"
            )
        with self._lifecycle:
            if self._state is Lifecycle.STARTING:
                self._state = self._state.advance(Lifecycle.READY)
        return self._bank

    def drain(self, timeout: float) -> bool:
        """Finish what is in flight; the placement has already taken new rows elsewhere. False after `timeout` s."""
        self._heard()
        with self._lifecycle:
            if self._state is Lifecycle.READY:
                self._state = self._state.advance(Lifecycle.DRAINING)
        return self._rows.wait_idle(timeout)

    def stop(self) -> None:
        """Close every channel, stop listening, end all threads. Idempotent."""
        with self._lifecycle:
            if self._state is Lifecycle.STOPPED:
                return
            self._state = self._state.advance(Lifecycle.STOPPED)
        self._end_vigil()
        try:
            self._listener.close(timeout=5.0)
        finally:
            if self._cores is not None:
                self._cores.release()
            self._leave_place()

    def _orphaned(self) -> None:
        try:
            self.stop()
        finally:
            self._on_stop()

    # -- channels -------------------------------------------------------------------------------------------------

    def _serve(self, channel: Channel) -> None:
        """One peer's channel, until it closes."""
        wait_for_a_core()
        self._rows.warm_up()
        kept: Cores | None = None
        while True:
            try:
                again = self._rows.answer(channel)
                if self._cores is not kept and self._cores is not None:
                    kept = self._cores
                    kept.keep()
                if again:
                    continue
                frame = channel.recv()
                if frame.op is Op.FORWARD:
                    self._rows.serve(frame, channel)
                else:
                    channel.send(self._answer(frame))
            except ChannelClosedError:
                return
            except WireError as error:
                log.warning("channel from %s closed: %s", channel.peer, error)
                return

    def _answer(self, frame: Frame) -> Frame:
        if frame.op is Op.PING:
            return Frame(Op.PONG, frame.id)
        if frame.op is Op.STATS:
            self._heard()
            return Frame(Op.STATS, frame.id, meta=report_tree(self._report()))
        raise WireError(f"an expert actor takes FORWARD, STATS and PING frames, not {frame.op.name}")

    # -- what it says of itself -----------------------------------------------------------------------------------

    def _report(self) -> ExpertReport:
        with self._telling:
            at, metrics = self._read()
            served = self._rows.tally.report()
        (wait_p50_s, wait_p99_s), (service_p50_s, service_p99_s) = served.waits_s, served.services_s
        return ExpertReport(
            self._spec.actor_id,
            self._incarnation,
            served.rows,
            served.forwards,
            served.busy_s,
            wait_p50_s,
            wait_p99_s,
            service_p50_s,
            service_p99_s,
            self._bank.nbytes if self._bank else 0,
            self._rows.in_flight,
            self._leaving,
            at,
            metrics,
        )

    def describe(self) -> dict[str, Any]:
        bank = self._bank
        return super().describe() | {"experts": [list(expert) for expert in sorted(bank.hosted)] if bank else []}

    def status(self) -> dict[str, Any]:
        bank = self._bank
        return super().status() | {
            "experts": len(bank.hosted) if bank else 0, "loading": self._loaded,
            "weight_bytes": bank.nbytes if bank else 0, "rows_total": sum(self._rows.tally.rows().values()),
            "busy_s": self._rows.tally.busy_s, "first_row_at": self._rows.tally.first_at,
            "queue": self._rows.in_flight,
        }  # fmt: skip

    def load(self) -> list[tuple[int, int, int]]:
        """(layer, expert, rows served so far) of every expert that had any."""
        self._heard()
        return [(*key, count) for key, count in sorted(self._rows.tally.rows().items())]

    def metrics(self) -> Reading:
        """All that this actor counts."""
        self._heard()
        with self._telling:
            at, values = self._read()
            rows = self._rows.tally.rows()
        load = {EXPERT_LOAD: by_expert(rows)} if self._spec.config.metrics.expert_load else {}
        return Reading(self._spec.actor_id, self._incarnation, at, {**values, **load})

    def _read(self) -> tuple[float, Snapshot]:
        bank, totals = self._bank, self._rows.tally.totals()
        self._figures.update(*totals, bank.nbytes if bank else 0, len(bank.hosted) if bank else 0)
        return self._recorder.read()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
