"""The serving half of an expert actor: a frame of rows in, a frame of outputs or the reason why not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeray.actors.tally import Tally
from moeray.errors import MoerayError, PlacementError, WireError
from moeray.model.experts import ExpertBank, HeldExperts, out_of_memory
from moeray.recorder import Recorder
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Forward:
    """One frame's rows; `out_RD` or `error` is what came of it. Times are of time.perf_counter."""

    layer: int
    experts: list[int]
    counts: list[int]
    held: HeldExperts
    x_UD: Tensor
    token_of_row_R: Tensor
    arrived: float
    began: float = 0.0
    took: float = 0.0
    out_RD: Tensor | None = None
    error: Exception | None = None

    def fits(self, other: _Forward) -> bool:
        """Whether both can run as one."""
        mine, its = self.x_UD, other.x_UD
        return self.layer == other.layer and mine.dtype is its.dtype and mine.shape[1] == its.shape[1]


class RowServer:
    """Thread-safe. Forwards run one at a time, on the actor's compute threads; nothing else waits for them.

    Those of one layer that wait at the same time (of several routers) run as one, so that weights are read once.
    """

    def __init__(self, device: torch.device, recorder: Recorder) -> None:
        self._device = device
        self._wait = recorder.histogram("moeray_expert_queue_wait_seconds")
        self._service = recorder.histogram("moeray_expert_service_seconds")
        self._batch = recorder.histogram("moeray_expert_batch_rows")
        self._bank: ExpertBank | None = None
        self._compute = threading.Lock()
        self._queued = threading.Lock()  # guards the list
        self._waiting: list[_Forward] = []
        self._idle = threading.Condition()
        self._in_flight = 0
        self.tally = Tally()

    def use(self, bank: ExpertBank) -> None:
        """Compute with the experts of this bank from now on."""
        self._bank = bank

    @property
    def in_flight(self) -> int:
        """Forwards that wait or compute."""
        return self._in_flight

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is in flight; False after `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: self._in_flight == 0, timeout)

    def serve(self, frame: Frame, send: Callable[[Frame], None]) -> None:
        """Send the RESULT of a FORWARD, or an ERROR of kind `not_hosted` (with the experts that are not),
        `out_of_memory` or `failed`. A router waits for it, so counting comes after. Raises what `send` does."""
        with self._idle:
            self._in_flight += 1
        try:
            try:
                forward = self._forward(frame)
            except (MoerayError, RuntimeError, ValueError, MemoryError) as error:
                send(Frame(Op.ERROR, frame.id, frame.layer, meta=self._reason(frame, error)))
                return
            assert forward.out_RD is not None
            meta = {"compute_s": forward.took, "queue_s": forward.began - forward.arrived}
            send(Frame(Op.RESULT, frame.id, frame.layer, frame.epoch, meta, (forward.out_RD,)))
            self._count(forward)
        finally:
            with self._idle:
                self._in_flight -= 1
                self._idle.notify_all()

    def _forward(self, frame: Frame) -> _Forward:
        experts, counts = _checked(frame)
        if self._bank is None:
            raise PlacementError("this actor hosts no experts yet")
        held = self._bank.hold(frame.layer, experts)
        x_UD, token_of_row_R = frame.tensors
        forward = _Forward(frame.layer, experts, counts, held, x_UD, token_of_row_R, time.perf_counter())
        self._run(forward)
        if forward.error is not None:
            raise forward.error
        return forward

    def _count(self, forward: _Forward) -> None:
        waited = forward.began - forward.arrived
        self.tally.add(forward.layer, forward.experts, forward.counts, waited, forward.took)
        self._wait.observe(waited)
        self._service.observe(forward.took)
        self._batch.observe(sum(forward.counts))

    def _run(self, forward: _Forward) -> None:
        """Compute it, with all of its layer that wait by then; or find that another thread has."""
        with self._queued:
            self._waiting.append(forward)
        with self._compute:
            with self._queued:
                if forward not in self._waiting:
                    return
                batch = [other for other in self._waiting if other.fits(forward)]
                self._waiting = [other for other in self._waiting if not other.fits(forward)]
            self._compute_all(batch)

    def _compute_all(self, batch: list[_Forward]) -> None:
        began = time.perf_counter()
        try:
            outs = compute([(f.held, f.experts, f.counts, f.x_UD, f.token_of_row_R) for f in batch], self._device)
        except (MoerayError, RuntimeError, ValueError, MemoryError) as error:
            for forward in batch:
                forward.error = error
            return
        took, rows = time.perf_counter() - began, sum(len(out_RD) for out_RD in outs)
        for forward, out_RD in zip(batch, outs, strict=True):
            forward.out_RD, forward.began = out_RD, began
            forward.took = took * len(out_RD) / max(rows, 1)

    def _reason(self, frame: Frame, error: Exception) -> dict[str, Any]:
        message = str(error)[:500]
        if isinstance(error, PlacementError):
            experts = frame.meta["experts"]
            missing = self._bank.missing(frame.layer, experts) if self._bank else experts
            return {"kind": "not_hosted", "message": message, "experts": missing}
        if out_of_memory(error):
            log.error("no memory for a forward of layer %d: %s", frame.layer, message)
            return {"kind": "out_of_memory", "message": message}
        log.error("forward of layer %d failed", frame.layer, exc_info=error)
        return {"kind": "failed", "message": message}


Rows = tuple[HeldExperts, list[int], list[int], Tensor, Tensor]
"""Experts, their numbers, rows of each, tokens [U, D] and each row's token [R], of one frame."""


def compute(frames: list[Rows], device: torch.device) -> list[Tensor]:
    """The outputs of each frame's rows on the CPU, [R, D]; the frames are of one layer and each expert runs once."""
    inputs = [x_UD.to(device)[token_of_row_R.to(device)] for _, _, _, x_UD, token_of_row_R in frames]
    held, _, counts, _, _ = frames[0]
    if len(frames) == 1:
        return [held(inputs[0], counts).cpu()]
    expert_R = torch.cat([torch.tensor(e).repeat_interleave(torch.tensor(c)) for _, e, c, _, _ in frames])
    order = expert_R.argsort(stable=True)
    _, merged = torch.unique_consecutive(expert_R[order], return_counts=True)
    every = held.with_those_of(other for other, _, _, _, _ in frames[1:])
    sorted_RD = every(torch.cat(inputs)[order.to(device)], merged.tolist()).cpu()
    out_RD = torch.empty_like(sorted_RD)
    out_RD[order] = sorted_RD
    return list(torch.split(out_RD, [len(x_RD) for x_RD in inputs]))


def _checked(frame: Frame) -> tuple[list[int], list[int]]:
    experts, counts = frame.meta.get("experts"), frame.meta.get("counts")
    if not isinstance(experts, list) or not isinstance(counts, list):
        raise WireError("a FORWARD frame names no experts and counts")
    ok = len(frame.tensors) == 2 and len(experts) == len(counts)
    ok = ok and all(type(e) is int and type(c) is int and c > 0 for e, c in zip(experts, counts, strict=True))
    ok = ok and len(set(experts)) == len(experts)
    if ok:
        x_UD, index = frame.tensors
        ok = x_UD.dim() == 2 and index.dtype == torch.int64 and index.shape == (sum(counts),)
        ok = ok and (len(index) == 0 or bool(index.min() >= 0 and index.max() < len(x_UD)))
    if not ok:
        raise WireError("a FORWARD frame's experts, counts and row index do not fit its tensors")
    return experts, counts
