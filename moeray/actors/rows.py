"""The serving half of an expert actor: a frame of rows in, a frame of outputs or the reason why not."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import torch

from moeray.actors.answering import Answering
from moeray.actors.forward import Forward, compute, settle
from moeray.actors.tally import Tally
from moeray.buffers import KEPT_BYTES
from moeray.errors import ChannelClosedError, ChannelTimeoutError, PlacementError
from moeray.model.experts import ExpertBank, out_of_memory
from moeray.model.kernels import Block, Scratch
from moeray.recorder import Recorder
from moeray.wire.channel import Channel
from moeray.wire.device_rings import DeviceRings
from moeray.wire.device_rows import KEY, brought
from moeray.wire.frame import Frame, Op
from moeray.wire.row_message import Place
from moeray.wire.rows import Given, Result, check_forward

log = logging.getLogger(__name__)

WARM_UP_ROWS = 8


class _Outs(threading.local):
    """Memory for a thread's outputs, kept for its next forward."""

    def __init__(self) -> None:
        self._kept = Scratch(1 << 16)

    def of(self, nbytes: int) -> Place:
        """At least so much."""
        memory = self._kept if self._kept.nbytes >= nbytes else Scratch(nbytes)
        if nbytes <= KEPT_BYTES:
            self._kept = memory
        return Place(memory.memory, memory.address)


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
        self._waiting: list[Forward] = []
        self._counting = threading.Lock()  # guards the number in flight
        self._idle = threading.Condition(self._counting)
        self._in_flight = 0
        self._outs = _Outs()
        self._threads = torch.get_num_threads()
        self._answering = Answering(self._compute, self._tell_idle)
        self._tally = Tally()

    def use(self, bank: ExpertBank) -> None:
        """Compute with the experts of this bank from now on, on as many threads as torch has by now."""
        self._bank, self._threads = bank, torch.get_num_threads()

    def warm_up(self) -> None:
        """Compute some rows for nobody, if an expert is hosted: a thread's first forward takes several times as long as
        those after it. Not while others compute, for whom a peer's first question would wait."""
        found = self._bank.hold_any() if self._bank is not None else None
        if found is None:
            return
        expert, held = found
        x_UD, token_of_row_R = held.zeros(WARM_UP_ROWS), torch.arange(WARM_UP_ROWS)
        meta = {"experts": [expert.expert], "counts": [WARM_UP_ROWS]}
        frame = Frame(Op.FORWARD, layer=expert.layer, meta=meta, tensors=(x_UD, token_of_row_R))
        index = token_of_row_R.numpy().tobytes()
        given = Given(x_UD.data_ptr(), WARM_UP_ROWS, x_UD.shape[1], x_UD.dtype, index, WARM_UP_ROWS)
        if self._compute.acquire(blocking=False):
            try:
                self._compute_all([Forward(frame, given, lambda nbytes: None, held, time.perf_counter())])
            finally:
                self._compute.release()

    @property
    def in_flight(self) -> int:
        """Forwards that wait, compute, or are being sent."""
        return self._in_flight + self._answering.active

    @property
    def tally(self) -> Tally:
        """What was served so far."""
        self._count_answered()
        return self._tally

    def _count_answered(self) -> None:
        for done in self._answering.take_answered():
            self._count(*done)

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is in flight; False after `timeout` seconds. What comes later is served all the same."""
        deadline = time.monotonic() + timeout
        self._answering.close()
        if not self._compute.acquire(timeout=timeout):
            return False
        self._compute.release()
        with self._idle:
            return self._idle.wait_for(lambda: self.in_flight == 0, max(0.0, deadline - time.monotonic()))

    def _tell_idle(self) -> None:
        with self._idle:
            self._idle.notify_all()

    def answer(self, channel: Channel) -> bool:
        """Answer what comes on the channel, for as long as it is as usual; False where something else is to be read."""
        again = self._bank is not None and self._answering.answer(channel, self._bank.tables, self._threads)
        self._count_answered()
        return again

    def serve(self, frame: Frame, channel: Channel) -> None:
        """Send the RESULT of a FORWARD, or an ERROR of kind `not_hosted` (with the experts that are not),
        `out_of_memory` or `failed`. A router waits for it, so counting comes after. Raises what `send` does."""
        with self._counting:
            self._in_flight += 1
        try:
            try:
                with brought(frame, channel) as (whole, rings):
                    forward = self._forward(whole, channel, rings)
                    self._answer(forward, channel)
            except (ChannelClosedError, ChannelTimeoutError):
                raise
            except Exception as error:  # also of outputs that are more than a frame may carry
                channel.send(Frame(Op.ERROR, frame.id, frame.layer, meta=self._reason(frame, error)))
                return
            ended, waited = forward.began + forward.took, forward.began - forward.arrived
            self._count(frame.layer, forward.experts, forward.counts, waited, forward.took, ended)
        finally:
            with self._counting:
                self._in_flight -= 1
                self._idle.notify_all()

    def _answer(self, forward: Forward, channel: Channel) -> None:
        channel.release()  # before the router, which takes this core when it hears the answer, sends more
        frame, placed, given, waited = forward.frame, forward.placed, forward.given, forward.began - forward.arrived
        if forward.rings is not None:
            forward.rings.release()
        meta = {"compute_s": forward.took, "queue_s": waited}
        if forward.on_device is not None:
            there = {KEY: list(forward.on_device)}
            channel.send(Frame(Op.RESULT, frame.id, frame.layer, frame.epoch, meta | there))
        elif placed is None or given is None:
            assert forward.out_RD is not None
            channel.send(Frame(Op.RESULT, frame.id, frame.layer, frame.epoch, meta, (forward.out_RD,)))
        else:
            channel.send_rows(
                Result(
                    frame.id, frame.layer, frame.epoch, forward.took, waited,
                    given.dtype, placed, given.rows, given.width,
                )
            )  # fmt: skip

    def _forward(self, frame: Frame, channel: Channel, rings: DeviceRings | None) -> Forward:
        given = check_forward(frame)
        if self._bank is None:
            raise PlacementError("this actor hosts no experts yet")
        held = self._bank.hold(frame.layer, frame.meta["experts"])
        forward = Forward(frame, given, channel.place_outputs, held, time.perf_counter(), rings=rings)
        self._run(forward)
        if forward.error is not None:
            raise forward.error
        return forward

    def _count(
        self, layer: int, experts: list[int], counts: list[int], waited_s: float, took_s: float, ended: float
    ) -> None:
        self._tally.add(layer, experts, counts, waited_s, took_s, ended)
        self._wait.observe(waited_s)
        self._service.observe(took_s)
        self._batch.observe(sum(counts))

    def _run(self, forward: Forward) -> None:
        """Compute it, with all of its layer that wait by then; or find that another thread has."""
        if self._compute.acquire(blocking=False):
            try:
                self._compute_all([forward])
            finally:
                self._compute.release()
            return
        with self._queued:
            self._waiting.append(forward)
        with self._compute:
            with self._queued:
                if forward not in self._waiting:
                    return
                batch = [other for other in self._waiting if other.fits(forward)]
                self._waiting = [other for other in self._waiting if not other.fits(forward)]
            self._compute_all(batch)

    def _compute_all(self, batch: list[Forward]) -> None:
        began, first = time.perf_counter(), batch[0]
        first.began = began
        try:
            if len(batch) == 1 and self._compute_in_place(first):
                first.took = time.perf_counter() - began
                return
            outs = compute([forward.rows() for forward in batch], self._device)
            for forward, out_RD in zip(batch, outs, strict=True):
                forward.finish(out_RD)
            settle(batch)
        except Exception as error:  # each router is told, also those whose rows have only run along
            for forward in batch:
                forward.error = error
            return
        took, rows = time.perf_counter() - began, sum(len(out_RD) for out_RD in outs)
        for forward, out_RD in zip(batch, outs, strict=True):
            forward.began = began
            forward.took = took * len(out_RD) / max(rows, 1)

    def _compute_in_place(self, forward: Forward) -> bool:
        """From where the rows lie to memory of this thread, if the experts' kernels can."""
        given = forward.given
        if given is None or not given.rows:
            return False
        nbytes = given.rows * given.width * given.dtype.itemsize

        def place() -> int:
            placed = forward.placed = forward.place(nbytes) or self._outs.of(nbytes)
            return placed.address

        x = Block(given.x, given.width, given.dtype)
        return forward.held.compute_at(x, given.token_of_row, forward.counts, place, self._threads)

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
