"""An expert actor: hosts experts' weights and nothing else. Rows in, rows out."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import psutil
import torch

from moeray.actors.spec import ActorReport, ActorSpec, remove_runtime_dir, runtime_dir
from moeray.errors import ChannelClosedError, MoerayError, PlacementError, WireError
from moeray.metrics import Recorder, Snapshot
from moeray.model.experts import ExpertBank
from moeray.model.loading import open_model, pick_device
from moeray.types import Address, ExpertId, Lifecycle
from moeray.wire.channel import Channel, Listener
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)


class ExpertActor:
    """Lifecycle: start (listening, empty) → host (weights mapped) → drain → stop. Control methods are thread-safe.

    Each router's channel has a thread of its own; forwards run one at a time, on the actor's compute threads.
    """

    def __init__(self, spec: ActorSpec, node_id: str) -> None:
        self._spec = spec
        self._node_id = node_id
        self._device = pick_device(spec.device)
        self._state = Lifecycle.STARTING
        self._recorder = Recorder()
        self._compute = threading.Lock()
        self._idle = threading.Condition()
        self._in_flight = 0
        self._loading = threading.Lock()
        self._bank: ExpertBank | None = None
        self._loaded = (0, 0)
        self._rows: dict[ExpertId, int] = {}
        wire = spec.config.wire
        self._listener = Listener(spec.identity(node_id), wire, self._serve, runtime_dir(node_id, spec.system))
        self._address: Address | None = None

    def start(self) -> tuple[ActorReport, Address]:
        """Listen, and say where this actor is and how many bytes are free for weights."""
        self._address = self._listener.start()
        if self._device.type == "cuda":
            free = int(torch.cuda.mem_get_info(self._device)[0])
        else:
            free = int(psutil.virtual_memory().available)
        report = ActorReport(self._spec.actor_id, self._node_id, os.getpid(), str(self._device), free)
        return report, self._address

    def host(self, experts: Sequence[tuple[int, int]], revision: str | None = None) -> int:
        """Map the weights of `experts` beside those already hosted; stored bytes in all.

        `revision` pins the hub's commit, so that all nodes read the same files. Raises CheckpointError.
        """
        with self._loading:
            if self._bank is None:
                config = self._spec.config
                files = open_model(config.model, revision or config.revision, node=self._node_id)
                dtype = files.dtype(config.dtype)
                self._bank = ExpertBank(files.family, files.weights, dtype, self._device)
            wanted = [ExpertId(*expert) for expert in experts]
            self._bank.load(wanted, lambda done: setattr(self, "_loaded", (done, len(wanted))))
            if self._state is Lifecycle.STARTING:
                self._state = self._state.advance(Lifecycle.READY)
            self._recorder.set("moeray_expert_weight_bytes", self._bank.nbytes, actor=self._spec.actor_id)
            return self._bank.nbytes

    def _serve(self, channel: Channel) -> None:
        """One router's channel, until it closes."""
        while True:
            try:
                frame = channel.recv()
                channel.send(self._answer(frame))
            except ChannelClosedError:
                return
            except WireError as error:
                log.warning("channel from %s closed: %s", channel.peer, error)
                return

    def _answer(self, frame: Frame) -> Frame:
        if frame.op is Op.PING:
            return Frame(Op.PONG, frame.id)
        if frame.op is not Op.FORWARD:
            raise WireError(f"an expert actor takes FORWARD and PING frames, not {frame.op.name}")
        with self._idle:
            self._in_flight += 1
        try:
            return self._forward(frame)
        except PlacementError as error:
            return Frame(Op.ERROR, frame.id, frame.layer, meta={"kind": "not_hosted", "message": str(error)})
        except (MoerayError, RuntimeError, ValueError) as error:
            log.exception("forward of layer %d failed", frame.layer)
            return Frame(Op.ERROR, frame.id, frame.layer, meta={"kind": "failed", "message": str(error)[:500]})
        finally:
            with self._idle:
                self._in_flight -= 1
                self._idle.notify_all()

    def _forward(self, frame: Frame) -> Frame:
        experts, counts = _checked(frame)
        if self._bank is None:
            raise PlacementError("this actor hosts no experts yet")
        x_UD, token_of_row_R = frame.tensors
        arrived = time.perf_counter()
        with self._compute:
            began = time.perf_counter()
            x_RD = x_UD.to(self._device)[token_of_row_R.to(self._device)]
            out_RD = self._bank.forward(frame.layer, x_RD, experts, counts).cpu()
        took = time.perf_counter() - began
        self._note(frame.layer, experts, counts, took)
        meta = {"compute_s": took, "queue_s": began - arrived}
        return Frame(Op.RESULT, frame.id, frame.layer, frame.epoch, meta, (out_RD,))

    def _note(self, layer: int, experts: Iterable[int], counts: Sequence[int], took: float) -> None:
        actor = self._spec.actor_id
        self._recorder.add("moeray_expert_rows_total", sum(counts), actor=actor)
        self._recorder.add("moeray_expert_busy_seconds_total", took, actor=actor)
        self._recorder.observe("moeray_expert_service_seconds", took)
        with self._idle:
            for expert, count in zip(experts, counts, strict=True):
                key = ExpertId(layer, expert)
                self._rows[key] = self._rows.get(key, 0) + count

    def status(self) -> dict[str, Any]:
        """Plain data for `moeray status`."""
        with self._idle:
            rows, in_flight = sum(self._rows.values()), self._in_flight
        return {
            "actor": self._spec.actor_id,
            "kind": "expert",
            "group": self._spec.group,
            "node": self._node_id,
            "pid": os.getpid(),
            "device": str(self._device),
            "state": self._state.value,
            "experts": len(self._bank.hosted) if self._bank else 0,
            "loading": self._loaded,
            "weight_bytes": self._bank.nbytes if self._bank else 0,
            "rows_total": rows,
            "queue": in_flight,
        }

    def load(self) -> list[tuple[int, int, int]]:
        """(layer, expert, rows served so far) of every expert that had any."""
        with self._idle:
            return [(*key, count) for key, count in sorted(self._rows.items())]

    def metrics(self) -> Snapshot:
        return self._recorder.snapshot()

    def drain(self, timeout: float) -> bool:
        """Finish what is in flight; the placement has already taken new rows elsewhere. False after `timeout` s."""
        if self._state is Lifecycle.READY:
            self._state = self._state.advance(Lifecycle.DRAINING)
        with self._idle:
            return self._idle.wait_for(lambda: self._in_flight == 0, timeout)

    def stop(self) -> None:
        """Close every channel and stop listening. Idempotent."""
        if self._state is not Lifecycle.STOPPED:
            self._state = self._state.advance(Lifecycle.STOPPED)
            self._listener.close(timeout=5.0)
            remove_runtime_dir(self._node_id, self._spec.system)


def _checked(frame: Frame) -> tuple[list[int], list[int]]:
    experts, counts = list(frame.meta.get("experts", ())), list(frame.meta.get("counts", ()))
    ok = len(frame.tensors) == 2 and len(experts) == len(counts) and all(isinstance(c, int) and c > 0 for c in counts)
    if ok:
        x_UD, index = frame.tensors
        ok = x_UD.dim() == 2 and index.dtype == torch.int64 and index.shape == (sum(counts),)
        ok = ok and (len(index) == 0 or bool(index.min() >= 0 and index.max() < len(x_UD)))
    if not ok:
        raise WireError("a FORWARD frame's experts, counts and row index do not fit its tensors")
    return experts, counts
