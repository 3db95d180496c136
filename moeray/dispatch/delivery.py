"""Rows that were not answered at once: planned anew, sent, gathered, and sent again when they are lost.

Shapes: T tokens, K experts a token, R = T * K rows, D hidden size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from moeray.dispatch.answers import Answers
from moeray.dispatch.flight import Sent
from moeray.dispatch.links import Links, UnknownActorError
from moeray.dispatch.pieces import AHEAD, cut, rows_of_a_piece
from moeray.dispatch.plan import Ints, Plan, Share
from moeray.dispatch.planner import Left, Planner
from moeray.dispatch.view import PlacementView, Usable
from moeray.dispatch.work import Work
from moeray.errors import (
    ChannelClosedError,
    ChannelTimeoutError,
    MoerayError,
    NoReplicaError,
    WireError,
)
from moeray.recorder import Recorder
from moeray.types import ExpertId
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame, Op
from moeray.wire.rows import Forward

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Rows that wait in vain for so long try the replicas that were given up once more."""

RETRIES = ("closed", "timeout", "error", "out_of_memory", "failed")
"""Why rows are sent again."""

OnLoss = Callable[[str, str], None]


class Delivery:
    """A dispatcher's part: see there for the arguments. `orphans`: rows that wait at this moment because their expert
    has no replica."""

    def __init__(
        self, view: PlacementView, links: Links, planner: Planner, answers: Answers, recorder: Recorder, *,
        deadline_s: float, patience: Callable[[float], float], on_loss: OnLoss, on_orphans: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._view = view
        self._links = links
        self._planner = planner
        self._answers = answers
        self._retries = {why: recorder.counter("moeray_dispatch_retries_total", reason=why) for why in RETRIES}
        self._deadline_s = deadline_s
        self._patience = patience
        self._on_loss = on_loss
        self._on_orphans = on_orphans
        self._clock = clock
        self._next_id = 1
        self._abandoned = False
        self.orphans = 0

    def take_ids(self, count: int) -> int:
        """The first of so many ids for frames, which follow one another."""
        first, self._next_id = self._next_id, self._next_id + count
        return first

    def see_through(self, work: Work, left: list[Left] | None, channels: list[Channel | None]) -> None:
        """Until every row is answered. `left`: the shares that are not, some of them sent over these channels; None
        where nothing was sent. Raises NoReplicaError, MoerayError (see `Dispatcher`)."""
        flight = work.flight
        try:
            if left is None:
                self._send_rows(work, None)
            else:
                self._go_on(work, left, channels)
            while flight.sent or work.waiting:
                if work.waiting and self._view.now.version > work.version:
                    self._send_rows(work, work.take_waiting())
                elif flight.sent:
                    self._gather(work)
                else:
                    self._await_replicas(work)
            assert not work.backlog, "an actor with rows left has some in flight"
        finally:
            self.orphans = 0

    def _go_on(self, work: Work, left: list[Left], channels: list[Channel | None]) -> None:
        """With the shares that the part in C has sent, and then those that it has not: to be dialled first, on channels
        of another kind, or large."""
        self._answers.learn()
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
        self._answers.learn()
        todo = [rows_R]
        while todo:
            self.check_wanted()
            now = self._view.now
            plan = self._plan(work, now, todo.pop())
            if plan.orphans:
                work.wait(plan, now.version, self._clock())
            todo.extend(self._send_shares(work, plan.shares))
        if not work.waiting:
            work.waited_from = 0.0
        before, self.orphans = self.orphans, work.rows_waiting
        if self.orphans and not before:
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
            share = left[actor]
            of_a_piece = rows_of_a_piece(work.row_bytes, self._links.room(actor)) or share.size
            of_a_frame = self._links.most_rows(actor, work.row_bytes) or share.size
            work.backlog.add(actor, cut(share, min(of_a_piece, of_a_frame)))
            gone += self._send_more(work, actor)
        return gone

    def _send_more(self, work: Work, actor_id: str) -> list[Ints]:
        """As many pieces as the actor may have at a time. The rows of all that is left for it, where it is gone.

        Two where they fit its channel with their outputs. Else an actor that answers and a router that sends might each
        wait for the other to read.
        """
        most = AHEAD if rows_of_a_piece(work.row_bytes, self._links.room(actor_id)) else 1
        while work.backlog and work.flight.count[actor_id] < most:
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
        frame_id = self.take_ids(1)
        sent = work.flight.dated(frame_id, share, channel, self._clock())
        channel.send_timeout_s = sent.allowed
        epoch = self._view.now.epoch
        if work.device is not None and work.device.send(channel, frame_id, work.layer, epoch, share):
            return sent._replace(hop="device")
        channel.send_rows(
            Forward(
                frame_id, work.layer, epoch, share.experts, share.counts,
                work.home_x_TD, share.tokens, share.token_of_row,
            )
        )  # fmt: skip
        return sent

    # -- gathering ------------------------------------------------------------------------------------------------

    def _gather(self, work: Work) -> None:
        """Take the answer that comes first, else that of the actor whose deadline ends first, and send again what did
        not come back."""
        self.check_wanted()
        sent, compute_s = work.flight.first(work.out_TKD if work.device is None else None)
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
            self._check_time(work, share, message)
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
        if frame.op is not Op.RESULT or not work.take(sent, frame):
            raise WireError(f"expert actor {share.actor_id} answered with a frame that does not fit the rows sent")
        self._took(work, sent, compute_s)

    def _took(self, work: Work, sent: Sent, compute_s: float) -> None:
        share, took_s = sent.share, work.answered(sent, compute_s, self._clock())
        done = (0, share.experts, share.size, len(share.tokens) // 8, took_s)
        self._answers.note(work.layer, work.row_bytes, [share.actor_id], [sent.hop], [done])

    # -- what went wrong ------------------------------------------------------------------------------------------

    def _give_up(self, work: Work, sent: Sent, reason: str, message: str) -> None:
        """Lose the actor (unless it was, or has moved, since), and send elsewhere what it has or was to get."""
        lost = [item.share for item in (sent, *work.flight.take_all(sent.channel))]
        rows_R = np.concatenate([share.rows_R for share in (*lost, *work.backlog.drop(sent.share.actor_id))])
        if self._links.holds(sent.share.actor_id, sent.channel):
            self._lose(sent.share.actor_id, reason, message)
        self._retries[reason].add(rows_R.size)
        self._check_time(work, sent.share, message)
        self._send_rows(work, rows_R)

    def _check_time(self, work: Work, share: Share, message: str) -> None:
        """Raises NoReplicaError where rows have been sent again for too long, the last time these to this actor."""
        until = self._until(work, work.began + 2 * self._deadline_s)
        if self._clock() >= until:
            raise NoReplicaError(
                f"no actor answered for expert {share.experts[0]} of layer {work.layer} within "
                f"{until - work.began:.3g} s (last {share.actor_id}: {message}); raise wire.deadline_s",
                since=work.began,
            )

    def _until(self, work: Work, without: float) -> float:
        """Until when its requests are patient; what is given where that is without end."""
        until = self._patience(work.began)
        return without if until == math.inf else until

    def _lose(self, actor_id: str, reason: str, message: str) -> None:
        log.warning("expert actor %s is lost (%s): %s", actor_id, reason, message)
        if reason == "timeout":
            self._links.late(actor_id)
        self._links.drop(actor_id)
        if self._view.lose(actor_id):
            self._on_loss(actor_id, reason)

    def _await_replicas(self, work: Work) -> None:
        """Wait for a placement that serves the waiting rows, then send them. Raises NoReplicaError."""
        until = self._until(work, work.waited_from + self._deadline_s)
        left = until - self._clock()
        if left <= 0:
            raise NoReplicaError(
                f"expert {min(work.orphans)} of layer {work.layer} has had no replica for "
                f"{until - work.waited_from:.3g} s; start another expert actor (`moeray status` shows what is missing)",
                since=work.began,
            )
        if not self._view.wait_change(work.version, min(left, RETRY_S)) and left > RETRY_S:
            self._view.retry([ExpertId(work.layer, expert) for expert in work.orphans])
        self._send_rows(work, work.take_waiting())

    def check_wanted(self) -> None:
        if self._abandoned:
            raise MoerayError("the router is being stopped, and waits for no more rows")

    def abandon(self) -> None:
        """Fail the layer that runs, and every later one. Any thread may call it."""
        self._abandoned = True
        self._links.cut_all()
        self._view.wake()


def _reason(error: MoerayError) -> str:
    if isinstance(error, ChannelClosedError):
        return "closed"
    return "timeout" if isinstance(error, ChannelTimeoutError) else "error"
