"""Tokens in flight: send each row to an actor that hosts its expert, gather the outputs, send again what was lost.

A forward is a pure function of its frame, so rows of a lost actor go to another replica at once; with none left they
wait for a new placement, as long as a request of theirs has time. Nothing is dropped and nothing is zero-filled.

Shapes: T tokens, K experts a token, R = T * K rows, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moeray.dispatch.answers import Answers
from moeray.dispatch.deadline import LEAST_S
from moeray.dispatch.delivery import Delivery, OnLoss
from moeray.dispatch.flight import Flight
from moeray.dispatch.links import Connect, Links
from moeray.dispatch.on_device import OnDevice, carries
from moeray.dispatch.planner import Layer, Planner, native
from moeray.dispatch.view import PlacementView
from moeray.dispatch.work import Work
from moeray.model.dispatched import Sum
from moeray.model.kernels.combine import Combining
from moeray.recorder import Recorder
from moeray.types import Address
from moeray.wire.channel import Channel
from moeray.wire.tensors import CODES

EXPECT_S = 0.1
"""A placement waits for the channels to its new actors so long at most."""


class Dispatcher:
    """Owned by one step loop: not thread-safe. Everything with a wait has a deadline.

    `deadline_s`: how long one actor may take to answer at most. `patience(began)`: until when a layer goes on whose
    rows have no replica, or none that answers, both by the clock; it is asked again and again. Where it is infinite, as
    without it, rows without a replica wait for `deadline_s`, and a layer that no actor answers fails after twice that.
    `on_loss(actor_id, reason)` is called in the thread that dispatches when an actor is given up, before its rows go
    elsewhere; the reason is `closed`, `timeout`, `error` or `out_of_memory`. `on_orphans()` is called there when rows
    begin to wait for a replica. Neither may block. `device`: tokens there stay there, and their outputs, on the way to
    actors that share its memory.
    """

    def __init__(
        self,
        view: PlacementView,
        connect: Connect,
        recorder: Recorder,
        *,
        deadline_s: float,
        patience: Callable[[float], float] = lambda began: math.inf,
        on_loss: OnLoss = lambda actor_id, reason: None,
        on_orphans: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        device: torch.device | None = None,
    ) -> None:
        self._view = view
        self._links = Links(view, connect)
        self._clock = clock
        self._device = device
        self._planner = Planner()
        self._answers = Answers(self._links, recorder)
        self._delivery = Delivery(
            view, self._links, self._planner, self._answers, recorder,
            deadline_s=deadline_s, patience=patience, on_loss=on_loss, on_orphans=on_orphans, clock=clock,
        )  # fmt: skip
        self._deadline_s = deadline_s
        self._out: Tensor | None = None
        self.slowest_compute_s = 0.0
        """Compute time of the slowest actor in the last layer, as the actors report it."""
        self.seconds_total = 0.0
        """Time that all layers so far have waited for their rows."""

    @property
    def orphans(self) -> int:
        """Rows that wait at this moment because their expert has no replica. Any thread may ask."""
        return self._delivery.orphans

    def expect(self, addresses: Mapping[str, Address]) -> None:
        """Dial the actors that are new here, before a placement names them; one that does not answer within `EXPECT_S`
        is dialled by whoever sends it rows. Any thread may call it."""
        self._links.expect(addresses, EXPECT_S)

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """Every row's expert output, unweighted: [T, K, D] on x's device, in x's dtype; on the CPU until the next call.

        Raises NoReplicaError when an expert had no replica that answers for too long, MoerayError when two attempts at
        its rows failed.
        """
        device = x_TD.device
        if self._stay_on_device(device):
            on_device = OnDevice(x_TD.contiguous(), ids_TK.shape[1])
            self._dispatch(layer, on_device.x_TD, _at_home(ids_TK), None, on_device)
            return on_device.outputs()
        x_TD, ids_TK = _at_home(x_TD), _at_home(ids_TK)
        self._dispatch(layer, x_TD, ids_TK, None)
        return self._outputs(x_TD, ids_TK).to(device)

    def combined(self, layer: int, x_TD: Tensor, ids_TK: Tensor, total: Sum) -> None:
        """The same summed up: in C with all else where it can be, the last outputs where they lie."""
        at_home = x_TD.is_cpu and not self._stay_on_device(x_TD.device)
        combining = total.in_c() if at_home and x_TD.dtype is total.out_TD.dtype else None
        if combining is None:
            total.of(self(layer, x_TD, ids_TK))
            return
        x_TD, ids_TK = _at_home(x_TD), _at_home(ids_TK)
        combined_s = self._dispatch(layer, x_TD, ids_TK, combining)
        if combined_s is None:
            total.of(self._outputs(x_TD, ids_TK))
        else:
            total.seconds = combined_s

    def _stay_on_device(self, device: torch.device) -> bool:
        """Whether a layer's tokens that are there go out from there."""
        if device != self._device:
            return False
        self._planner.renew(self._view.now)
        return carries(self._links.open_channels(self._planner.actors).channels, device)

    def _dispatch(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, combining: Combining | None, device: OnDevice | None = None
    ) -> float | None:
        """Have every row's output in `_outputs` (the `device`'s, where there is one), or combined within so many
        seconds."""
        began = self._clock()
        self.slowest_compute_s = 0.0
        self._links.sweep()
        combined_s = None
        try:
            found, channels = (None, []) if device else self._at_once(layer, x_TD, ids_TK, combining)
            if found is None or found.left:
                flight = Flight(layer, self._links, self._deadline_s, self._clock)
                out_TKD = device.out_TKD if device else self._outputs(x_TD, ids_TK)
                work = Work(layer, x_TD, ids_TK, out_TKD, began, flight, device=device)
                self._delivery.see_through(work, found and found.left, channels)
                self.slowest_compute_s = max(self.slowest_compute_s, *work.compute_s.values(), 0.0)
            elif combining is not None:
                combined_s = found.combined_s
            return combined_s
        finally:
            self.seconds_total += self._clock() - began - (combined_s or 0.0)
            self._answers.settle()

    def _memory(self, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """Of the last layer's outputs again: that of many tokens would be fetched from the system page by page."""
        size = ids_TK.numel() * x_TD.shape[1]
        if self._out is None or self._out.numel() < size or self._out.dtype is not x_TD.dtype:
            self._out = x_TD.new_empty(size)
        return self._out

    def _outputs(self, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """[T, K, D] of that memory."""
        shape = *ids_TK.shape, x_TD.shape[1]
        return self._memory(x_TD, ids_TK)[: math.prod(shape)].view(shape)

    def _at_once(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, combining: Combining | None
    ) -> tuple[Layer | None, list[Channel | None]]:
        """Send all rows, and take what comes soon; over these channels. Nearly all layers are done with that, where the
        part in C is there; None, with nothing sent, where it does not do it."""
        self._delivery.check_wanted()
        if native is None or x_TD.dtype not in CODES:
            return None, []
        now, out = self._view.now, self._memory(x_TD, ids_TK)
        self._planner.renew(now)
        actors = self._planner.actors
        links = self._links.open_channels(actors)
        first = self._delivery.take_ids(len(actors))
        within_s = min(LEAST_S, self._deadline_s)
        found = self._planner.layer(now, layer, ids_TK, x_TD, out.data_ptr(), links.lanes, first, within_s, combining)
        if found is not None:
            self.slowest_compute_s = found.slowest_s
            self._answers.note(layer, x_TD.shape[1] * x_TD.itemsize, actors, links.kinds, found.answered)
        return found, links.channels

    def count(self) -> None:
        """Record all that was answered. Any thread may call it."""
        self._answers.count()

    def abandon(self) -> None:
        """Fail the layer that runs, and every later one: nobody waits for them. Any thread may call it."""
        self._delivery.abandon()

    def close(self) -> None:
        """Close every channel."""
        self.count()
        self._links.close()


def _at_home(tensor: Tensor) -> Tensor:
    """On the CPU, in one piece."""
    return tensor if tensor.is_cpu and tensor.is_contiguous() else tensor.cpu().contiguous()
