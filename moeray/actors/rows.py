"""The serving half of an expert actor: a frame of rows in, a frame of outputs or the reason why not."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import torch

from moeray.actors.tally import Tally
from moeray.errors import MoerayError, PlacementError, WireError
from moeray.metrics import Recorder
from moeray.model.experts import ExpertBank, out_of_memory
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)


class RowServer:
    """Thread-safe. Forwards run one at a time, on the actor's compute threads; nothing else waits for them."""

    def __init__(self, actor_id: str, device: torch.device, recorder: Recorder) -> None:
        self._actor_id = actor_id
        self._device = device
        self._recorder = recorder
        self._bank: ExpertBank | None = None
        self._compute = threading.Lock()
        self._idle = threading.Condition()
        self._in_flight = 0
        self.tally = Tally()

    def serve(self, bank: ExpertBank) -> None:
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

    def answer(self, frame: Frame) -> Frame:
        """The RESULT of a FORWARD, or an ERROR of kind `not_hosted` (with the experts that are not), `out_of_memory`
        or `failed`."""
        with self._idle:
            self._in_flight += 1
        try:
            return self._forward(frame)
        except (MoerayError, RuntimeError, ValueError, MemoryError) as error:
            return Frame(Op.ERROR, frame.id, frame.layer, meta=self._reason(frame, error))
        finally:
            with self._idle:
                self._in_flight -= 1
                self._idle.notify_all()

    def _forward(self, frame: Frame) -> Frame:
        experts, counts = _checked(frame)
        if self._bank is None:
            raise PlacementError("this actor hosts no experts yet")
        held = self._bank.hold(frame.layer, experts)
        x_UD, token_of_row_R = frame.tensors
        arrived = time.perf_counter()
        with self._compute:
            began = time.perf_counter()
            x_RD = x_UD.to(self._device)[token_of_row_R.to(self._device)]
            out_RD = held(x_RD, counts).cpu()
        took, waited = time.perf_counter() - began, began - arrived
        self.tally.add(frame.layer, experts, counts, waited, took)
        self._recorder.add("moeray_expert_rows_total", sum(counts), actor=self._actor_id)
        self._recorder.add("moeray_expert_busy_seconds_total", took, actor=self._actor_id)
        self._recorder.observe("moeray_expert_service_seconds", took)
        meta = {"compute_s": took, "queue_s": waited}
        return Frame(Op.RESULT, frame.id, frame.layer, frame.epoch, meta, (out_RD,))

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


def _checked(frame: Frame) -> tuple[list[int], list[int]]:
    experts, counts = frame.meta.get("experts"), frame.meta.get("counts")
    if not isinstance(experts, list) or not isinstance(counts, list):
        raise WireError("a FORWARD frame names no experts and counts")
    ok = len(frame.tensors) == 2 and len(experts) == len(counts)
    ok = ok and all(type(e) is int and type(c) is int and c > 0 for e, c in zip(experts, counts, strict=True))
    if ok:
        x_UD, index = frame.tensors
        ok = x_UD.dim() == 2 and index.dtype == torch.int64 and index.shape == (sum(counts),)
        ok = ok and (len(index) == 0 or bool(index.min() >= 0 and index.max() < len(x_UD)))
    if not ok:
        raise WireError("a FORWARD frame's experts, counts and row index do not fit its tensors")
    return experts, counts
