"""Tokens in flight: send each row to an actor that hosts its expert, gather the outputs, send again what was lost.

A forward is a pure function of its frame, so rows of a lost actor go to another replica; with none left they wait for
a new placement until the deadline. Nothing is dropped and nothing is zero-filled.

Shapes: T tokens, K experts a token, R = T * K rows, D hidden size.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.dispatch.plan import Choose, Share, balance_rows, plan_rows
from moeray.dispatch.view import PlacementView
from moeray.errors import ChannelClosedError, ChannelTimeoutError, MoerayError, PlacementError, WireError
from moeray.metrics import Recorder
from moeray.types import Address, ExpertId
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)

Connect = Callable[[Address], Channel]


@dataclass(frozen=True)
class _Sent:
    frame_id: int
    share: Share
    channel: Channel
    at: float


class Dispatcher:
    """Owned by one step loop: not thread-safe. Everything with a wait has a deadline.

    `deadline_s`: how long one actor may take to answer, and how long rows wait for a replica when none is left.
    """

    def __init__(
        self,
        view: PlacementView,
        connect: Connect,
        recorder: Recorder,
        *,
        deadline_s: float,
        choose: Choose = balance_rows,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._connect = connect
        self._recorder = recorder
        self._deadline_s = deadline_s
        self._choose = choose
        self._clock = clock
        self._channels: dict[str, Channel] = {}
        self._ids = itertools.count(1)
        self.slowest_compute_s = 0.0
        """Compute time of the slowest actor in the last layer, as the actors report it."""

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """Every row's expert output, unweighted: [T, K, D] on x's device, in x's dtype.

        Raises PlacementError when an expert had no replica for `deadline_s` seconds.
        """
        home_TD, home_ids_TK = x_TD.cpu(), ids_TK.cpu()
        out_RD = home_TD.new_empty(home_ids_TK.numel(), x_TD.shape[1])
        waiting_R: Tensor | None = None  # all of them
        self.slowest_compute_s = 0.0
        give_up = self._clock() + self._deadline_s
        while waiting_R is None or len(waiting_R):
            version = self._view.version
            plan = plan_rows(home_ids_TK, self._view.replicas(layer), self._choose, waiting_R)
            lost = self._round(layer, home_TD, plan.shares, out_RD)
            if plan.orphans:
                lost.append(torch.nonzero(torch.isin(home_ids_TK.reshape(-1), torch.tensor(plan.orphans))).flatten())
            if plan.orphans and not self._view.wait_change(version, give_up - self._clock()):
                raise PlacementError(
                    f"expert {plan.orphans[0]} of layer {layer} has had no replica for {self._deadline_s:g} s; "
                    "start another expert actor (`moeray status` shows what is missing)"
                )
            waiting_R = torch.cat(lost) if lost else home_ids_TK.new_empty(0)
        return out_RD.view(*home_ids_TK.shape, -1).to(x_TD.device)

    def _round(self, layer: int, x_TD: Tensor, shares: tuple[Share, ...], out_RD: Tensor) -> list[Tensor]:
        """Send every share, then gather; the row indices of the shares that were lost on the way."""
        sent: list[_Sent] = []
        lost: list[Tensor] = []
        for share in shares:
            try:
                sent.append(self._send(layer, x_TD, share))
            except MoerayError as error:
                lost.append(self._lose(share, error))
        for item in sent:
            try:
                self._receive(item, layer, out_RD)
            except MoerayError as error:
                lost.append(self._lose(item.share, error))
        return lost

    def _send(self, layer: int, x_TD: Tensor, share: Share) -> _Sent:
        channel = self._channel(share.actor_id)
        frame_id = next(self._ids)
        x_UD = x_TD if len(share.tokens_U) == len(x_TD) else x_TD[share.tokens_U]
        meta = {"experts": share.experts, "counts": share.counts}
        at = self._clock()
        channel.send(Frame(Op.FORWARD, frame_id, layer, self._view.epoch, meta, (x_UD, share.token_of_row_R)))
        return _Sent(frame_id, share, channel, at)

    def _receive(self, sent: _Sent, layer: int, out_RD: Tensor) -> None:
        frame = self._answer(sent)
        share = sent.share
        if frame.op is Op.ERROR:
            self._handle_error(frame, share, layer)
        rows_RD = frame.tensors[0] if frame.op is Op.RESULT and len(frame.tensors) == 1 else None
        if rows_RD is None or rows_RD.shape != (len(share.rows_R), out_RD.shape[1]) or rows_RD.dtype != out_RD.dtype:
            raise WireError(f"expert actor {share.actor_id} answered with a frame that does not fit the rows sent")
        out_RD[share.rows_R] = rows_RD
        self.slowest_compute_s = max(self.slowest_compute_s, float(frame.meta.get("compute_s", 0.0)))
        kind = sent.channel.kind
        self._recorder.observe("moeray_dispatch_seconds", self._clock() - sent.at, hop=kind)
        self._recorder.add("moeray_dispatch_rows_total", len(share.rows_R), hop=kind)

    def _answer(self, sent: _Sent) -> Frame:
        """The frame that answers `sent`; answers to earlier frames that came too late are passed over."""
        until = sent.at + self._deadline_s
        while True:
            frame = sent.channel.recv(timeout=max(0.0, until - self._clock()))
            if frame.id == sent.frame_id:
                return frame

    def _handle_error(self, frame: Frame, share: Share, layer: int) -> None:
        if frame.meta.get("kind") == "not_hosted":
            self._view.refuse(share.actor_id, [ExpertId(layer, e) for e in share.experts])
            raise _StaleEpoch(str(frame.meta.get("message")))
        raise WireError(f"expert actor {share.actor_id} failed: {frame.meta.get('message')}")

    def _lose(self, share: Share, error: MoerayError) -> Tensor:
        """After an error with an actor: forget its channel, and give back its rows to be sent again."""
        if not isinstance(error, _StaleEpoch):
            log.warning("expert actor %s is lost: %s", share.actor_id, error)
            self._view.lose(share.actor_id)
            self._recorder.add("moeray_dispatch_retries_total", len(share.rows_R), reason=_reason(error))
            if channel := self._channels.pop(share.actor_id, None):
                channel.close()
        return share.rows_R

    def _channel(self, actor_id: str) -> Channel:
        channel = self._channels.get(actor_id)
        if channel is None or channel.closed:
            channel = self._channels[actor_id] = self._connect(self._view.address(actor_id))
        return channel

    def close(self) -> None:
        """Close every channel."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()


class _StaleEpoch(MoerayError):
    """The actor is well but does not host the expert."""


def _reason(error: MoerayError) -> str:
    if isinstance(error, ChannelClosedError):
        return "closed"
    return "timeout" if isinstance(error, ChannelTimeoutError) else "error"
