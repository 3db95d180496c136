"""Tokens in flight: send each row to an actor that hosts its expert, gather the outputs, send again what was lost.

A forward is a pure function of its frame, so rows of a lost actor go to another replica at once; with none left they
wait for a new placement until the deadline. Nothing is dropped and nothing is zero-filled.

Shapes: T tokens, K experts a token, R = T * K rows, D hidden size.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
from torch import Tensor

from moeray.dispatch.deadline import LEAST_S
from moeray.dispatch.flight import Flight, Sent
from moeray.dispatch.hops import MANY, Hops
from moeray.dispatch.links import Connect, Links, UnknownActorError
from moeray.dispatch.pieces import AHEAD, cut, rows_of_a_piece
from moeray.dispatch.plan import Ints, Plan, Share
from moeray.dispatch.planner import Answered, Layer, Left, Planner, native
from moeray.dispatch.view import PlacementView, Usable
from moeray.dispatch.work import Work
from moeray.errors import (
    ChannelClosedError,
    ChannelTimeoutError,
    MoerayError,
    PlacementError,
    WireError,
)
from moeray.model.dispatched import Sum
from moeray.model.kernels.combine import Combining
from moeray.recorder import Recorder
from moeray.types import Address, ExpertId
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame, Op
from moeray.wire.rows import Forward, put_rows
from moeray.wire.tensors import CODES

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Rows that wait in vain for so long try the replicas that were given up once more."""
EXPECT_S = 0.1
"""A placement waits for the channels to its new actors so long at most."""

RETRIES = ("closed", "timeout", "error", "out_of_memory", "failed")
"""Why rows are sent again."""

OnLoss = Callable[[str, str], None]


class Dispatcher:
    """Owned by one step loop: not thread-safe. Everything with a wait has a deadline.

    `deadline_s`: how long one actor may take to answer at most, and how long rows wait for a replica when none is left;
    a layer that actors take and never answer fails after twice that.
    `on_loss(actor_id, reason)` is called in the thread that dispatches when an actor is given up, before its rows go
    elsewhere; the reason is `closed`, `timeout`, `error` or `out_of_memory`. `on_orphans()` is called there when rows
    begin to wait for a replica. Neither may block.
    """

    def __init__(
        self,
        view: PlacementView,
        connect: Connect,
        recorder: Recorder,
        *,
        deadline_s: float,
        on_loss: OnLoss = lambda actor_id, reason: None,
        on_orphans: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._links = Links(view, connect)
        self._hops = Hops(recorder)
        self._retries = {why: recorder.counter("moeray_dispatch_retries_total", reason=why) for why in RETRIES}
        self._deadline_s = deadline_s
        self._on_loss = on_loss
        self._on_orphans = on_orphans
        self._clock = clock
        self._planner = Planner()
        self._to_learn: list[tuple[int, list[str], list[Answered]]] = []  # layer, actors, forwards; until it is needed
        self._next_id = 1
        self._out: Tensor | None = None
        self._orphans = 0
        self._abandoned = False
        self.slowest_compute_s = 0.0
        """Compute time of the slowest actor in the last layer, as the actors report it."""
        self.seconds_total = 0.0
        """Time that all layers so far have waited for their rows."""

    @property
    def orphans(self) -> int:
        """Rows that wait at this moment because their expert has no replica. Any thread may ask."""
        return self._orphans

    def expect(self, addresses: Mapping[str, Address]) -> None:
        """Dial the actors that are new here, before a placement names them; one that does not answer within `EXPECT_S`
        is dialled by whoever sends it rows. Any thread may call it."""
        self._links.expect(addresses, EXPECT_S)

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """Every row's expert output, unweighted: [T, K, D] on x's device, in x's dtype; on the CPU until the next call.

        Raises PlacementError when an expert had no replica that answers, MoerayError when two attempts at its rows
        failed.
        """
        x_TD, ids_TK, device = _at_home(x_TD), _at_home(ids_TK), x_TD.device
        self._dispatch(layer, x_TD, ids_TK, None)
        return self._outputs(x_TD, ids_TK).to(device)

    def combined(self, layer: int, x_TD: Tensor, ids_TK: Tensor, total: Sum) -> None:
        """The same summed up: in C with all else where it can be, the last outputs where they lie."""
        combining = total.in_c() if x_TD.is_cpu and x_TD.dtype is total.out_TD.dtype else None
        if combining is None:
            total.of(self(layer, x_TD, ids_TK))
            return
        x_TD, ids_TK = _at_home(x_TD), _at_home(ids_TK)
        combined_s = self._dispatch(layer, x_TD, ids_TK, combining)
        if combined_s is None:
            total.of(self._outputs(x_TD, ids_TK))
        else:
            total.seconds = combined_s

    def _dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, combining: Combining | None) -> float | None:
        """Have every row's output in `_outputs`, or combined within so many seconds."""
        began = self._clock()
        self.slowest_compute_s = 0.0
        self._links.sweep()
        combined_s = None
        try:
            found, channels = self._at_once(layer, x_TD, ids_TK, combining)
            if found is None or found.left:
                self._see_through(layer, x_TD, ids_TK, began, found, channels)
            elif combining is not None:
                combined_s = found.combined_s
            return combined_s
        finally:
            self.seconds_total += self._clock() - began - (combined_s or 0.0)
            if len(self._to_learn) >= MANY:
                self._hops.record()
                self._learn()

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
        self._check_wanted()
        if native is None or x_TD.dtype not in CODES:
            return None, []
        now, out = self._view.now, self._memory(x_TD, ids_TK)
        self._planner.renew(now)
        actors = self._planner.actors
        links = self._links.open_channels(actors)
        first, self._next_id = self._next_id, self._next_id + len(actors)
        within_s = min(LEAST_S, self._deadline_s)
        found = self._planner.layer(now, layer, ids_TK, x_TD, out.data_ptr(), links.lanes, first, within_s, combining)
        if found is not None:
            self.slowest_compute_s = found.slowest_s
            self._note(layer, x_TD, actors, links.kinds, found.answered)
        return found, links.channels

    def _see_through(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, began: float, found: Layer | None,
        channels: list[Channel | None],
    ) -> None:  # fmt: skip
        """What was not done at once, until every row is answered."""
        flight = Flight(layer, self._links, self._deadline_s, self._clock)
        work = Work(layer, x_TD, ids_TK, self._outputs(x_TD, ids_TK), began, flight)
        try:
            if found is None:
                self._send_rows(work, None)
            else:
                self._go_on(work, found.left, channels)
            while flight.sent or work.waiting:
                if work.waiting and self._view.now.version > work.version:
                    self._send_rows(work, work.take_waiting())
                elif flight.sent:
                    self._gather(work)
                else:
                    self._await_replicas(work)
            assert not work.backlog, "an actor with rows left has some in flight"
        finally:
            self._orphans = 0

    def _go_on(self, work: Work, left: list[Left], channels: list[Channel | None]) -> None:
        """With the shares that the part in C has sent, and then those that it has not: to be dialled first, on channels
        of another kind, or large."""
        self._learn()
        for actor, share, frame_id, in_part in left:
            channel = channels[actor]
            if frame_id and channel is not None:
                sent = work.flight.dated(frame_id, share, channel, work.began)
                work.flight.add(sent)
                if in_part:
                    channel.send_timeout_s = sent.allowed
                    with suppress(WireError):  # whoever waits for the answer is told the same
                        channel.flush()
        for rows_R in self._send_shares(work, [share for _, share, frame_id, _ in left if not frame_id]):
            self._send_rows(work, rows_R)

    # -- sending --------------------------------------------------------------------------------------------------

    def _send_rows(self, work: Work, rows_R: Ints | None) -> None:
        """Plan and send the rows (None: all of them), again for those whose actor turns out to be gone."""
        self._check_wanted()
        self._learn()
        todo = [rows_R]
        while todo:
            now = self._view.now
            plan = self._plan(work, now, todo.pop())
            if plan.orphans:
                work.wait(plan, now.version, self._clock())
            todo.extend(self._send_shares(work, plan.shares))
        if not work.waiting:
            work.waited_from = 0.0
        before, self._orphans = self._orphans, work.rows_waiting
        if self._orphans and not before:
            self._on_orphans()

    def _plan(self, work: Work, now: Usable, rows_R: Ints | None) -> Plan:
        if rows_R is None:
            return self._planner.plan(now, work.layer, work.ids_TK)
        return self._planner.plan_again(now, work.replicas(now), work.ids_TK.numpy(), rows_R)

    def _send_shares(self, work: Work, shares: list[Share]) -> list[Ints]:
        """Send each as soon as there is a channel to its actor, or begin with it. The rows of those whose actor is
        gone."""
        left, gone = {share.actor_id: share for share in shares}, []
        for actor in self._links.dialled(left):
            most_rows = rows_of_a_piece(work.row_bytes, self._links.room(actor))
            work.backlog.add(actor, cut(left[actor], most_rows) if most_rows else [left[actor]])
            gone += self._send_more(work, actor)
        return gone

    def _send_more(self, work: Work, actor_id: str) -> list[Ints]:
        """As many pieces as the actor may have at a time. The rows of all that is left for it, where it is gone."""
        while work.backlog and work.flight.count[actor_id] < AHEAD:
            now = self._view.now
            piece = work.backlog.take(actor_id, work.replicas(now), now.rates, work.flight.rows)
            if piece is None:
                break
            if lost := self._send(work, piece):
                return [share.rows_R for share in (*lost, *work.backlog.drop(actor_id))]
        return []

    def _send(self, work: Work, share: Share) -> list[Share]:
        """What is to be planned anew, as the actor is gone: this, and what it had in flight. Raises WireError for a
        frame that no channel would carry."""
        channel = None
        try:
            channel = self._links.channel(share.actor_id)
            work.flight.add(self._forward(work, share, channel))
        except UnknownActorError:
            return [share]
        except WireError as error:
            if channel is not None and not channel.closed and not isinstance(error, ChannelTimeoutError):
                raise
            lost = [share]
            if channel is not None:
                lost += [sent.share for sent in work.flight.take_all(channel)]
            self._lose(share.actor_id, _reason(error), str(error))
            self._retries[_reason(error)].add(sum(part.size for part in lost))
            return lost
        return []

    def _forward(self, work: Work, share: Share, channel: Channel) -> Sent:
        frame_id, self._next_id = self._next_id, self._next_id + 1
        sent = work.flight.dated(frame_id, share, channel, self._clock())
        channel.send_timeout_s = sent.allowed
        channel.send_rows(
            Forward(
                frame_id, work.layer, self._view.now.epoch, share.experts, share.counts,
                work.x_TD, share.tokens, share.token_of_row,
            )
        )  # fmt: skip
        return sent

    # -- gathering ------------------------------------------------------------------------------------------------

    def _gather(self, work: Work) -> None:
        """Take the answer that comes first, else that of the actor whose deadline ends first, and send again what did
        not come back."""
        self._check_wanted()
        sent, compute_s = work.flight.first(work.out_TKD)
        if compute_s is not None:
            self._took(work, sent, compute_s)
        else:
            self._receive(work, sent)
        for rows_R in self._send_more(work, sent.share.actor_id):
            self._send_rows(work, rows_R)

    def _receive(self, work: Work, sent: Sent) -> None:
        """Its answer, whatever it is."""
        share = sent.share
        try:
            self._links.check(share.actor_id)
            frame = work.flight.answer(sent)
            if frame.op is not Op.ERROR:
                self._take(work, sent, frame)
                return
        except WireError as error:
            self._give_up(work, sent, _reason(error), str(error))
            return
        kind, message = frame.meta.get("kind"), str(frame.meta.get("message"))
        if kind == "out_of_memory":
            self._give_up(work, sent, "out_of_memory", message)
            return
        if kind == "not_hosted":
            named = frame.meta.get("experts")
            missing = [e for e in share.experts if isinstance(named, list) and e in named] or share.experts
            self._view.refuse(share.actor_id, [ExpertId(work.layer, expert) for expert in missing])
        else:
            log.warning("expert actor %s failed at layer %d: %s", share.actor_id, work.layer, message)
            work.fail(share, message)
            self._retries["failed"].add(share.size)
        again = (share, *work.backlog.drop(share.actor_id))  # what it was to get may want the same experts
        self._send_rows(work, np.concatenate([part.rows_R for part in again]))

    def _take(self, work: Work, sent: Sent, frame: Frame) -> None:
        """Put the outputs where they belong. Raises WireError for a frame that does not answer the rows sent."""
        share, compute_s = sent.share, frame.meta.get("compute_s", 0.0)
        if not isinstance(compute_s, float):
            raise WireError(f"expert actor {share.actor_id} answered with compute_s {compute_s!r}, which is no time")
        if frame.op is not Op.RESULT or not put_rows(frame.tensors, share.rows, work.out_TKD):
            raise WireError(f"expert actor {share.actor_id} answered with a frame that does not fit the rows sent")
        self._took(work, sent, compute_s)

    def _took(self, work: Work, sent: Sent, compute_s: float) -> None:
        share, took_s = sent.share, work.answered(sent, compute_s, self._clock())
        self.slowest_compute_s = max(self.slowest_compute_s, work.compute_s[share.actor_id])
        done = (0, share.experts, share.size, len(share.tokens) // 8, took_s)
        self._note(work.layer, work.x_TD, [share.actor_id], [sent.channel.kind], [done])

    def _note(
        self, layer: int, x_TD: Tensor, actors: list[str], kinds: Sequence[str], answered: list[Answered]
    ) -> None:
        """Forwards that some of the actors have answered, over channels of these kinds."""
        self._hops.note(kinds, x_TD.shape[1] * x_TD.itemsize, answered)
        self._to_learn.append((layer, actors, answered))

    def _learn(self) -> None:
        """How long each actor takes, from what was noted."""
        for layer, actors, answered in self._to_learn:
            for actor, experts, rows, _, took_s in answered:
                self._links.answered(actors[actor], layer, experts, rows, took_s)
        self._to_learn.clear()

    def count(self) -> None:
        """Record all that was answered. Any thread may call it."""
        self._hops.record()

    # -- what went wrong ------------------------------------------------------------------------------------------

    def _give_up(self, work: Work, sent: Sent, reason: str, message: str) -> None:
        """Lose the actor (unless it was, or has moved, since), and send elsewhere what it has or was to get."""
        lost = [item.share for item in (sent, *work.flight.take_all(sent.channel))]
        rows_R = np.concatenate([share.rows_R for share in (*lost, *work.backlog.drop(sent.share.actor_id))])
        if self._links.holds(sent.share.actor_id, sent.channel):
            self._lose(sent.share.actor_id, reason, message)
        self._retries[reason].add(rows_R.size)
        if self._clock() >= work.began + 2 * self._deadline_s:
            raise PlacementError(
                f"no actor answered for expert {sent.share.experts[0]} of layer {work.layer} within "
                f"{2 * self._deadline_s:g} s (last {sent.share.actor_id}: {message}); raise wire.deadline_s"
            )
        self._send_rows(work, rows_R)

    def _lose(self, actor_id: str, reason: str, message: str) -> None:
        log.warning("expert actor %s is lost (%s): %s", actor_id, reason, message)
        if reason == "timeout":
            self._links.late(actor_id)
        self._links.drop(actor_id)
        if self._view.lose(actor_id):
            self._on_loss(actor_id, reason)

    def _await_replicas(self, work: Work) -> None:
        """Wait for a placement that serves the waiting rows, then send them. Raises PlacementError at the deadline."""
        left = work.waited_from + self._deadline_s - self._clock()
        if left <= 0:
            raise PlacementError(
                f"expert {min(work.orphans)} of layer {work.layer} has had no replica for {self._deadline_s:g} s; "
                "start another expert actor (`moeray status` shows what is missing)"
            )
        if not self._view.wait_change(work.version, min(left, RETRY_S)) and left > RETRY_S:
            self._view.retry([ExpertId(work.layer, expert) for expert in work.orphans])
        self._send_rows(work, work.take_waiting())

    def _check_wanted(self) -> None:
        if self._abandoned:
            raise MoerayError("the router is being stopped, and waits for no more rows")

    def abandon(self) -> None:
        """Fail the layer that runs, and every later one: nobody waits for them. Any thread may call it."""
        self._abandoned = True
        self._links.cut_all()
        self._view.wake()

    def close(self) -> None:
        """Close every channel."""
        self.count()
        self._links.close()


def _at_home(tensor: Tensor) -> Tensor:
    """On the CPU, in one piece."""
    return tensor if tensor.is_cpu and tensor.is_contiguous() else tensor.cpu().contiguous()


def _reason(error: MoerayError) -> str:
    if isinstance(error, ChannelClosedError):
        return "closed"
    return "timeout" if isinstance(error, ChannelTimeoutError) else "error"
