"""Who speaks to a router: ingresses, which submit requests, and controllers, which ask for reports."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from moeray.actors.observers import Observers
from moeray.actors.outbox import Outbox
from moeray.actors.step_loop import StepLoop
from moeray.errors import ChannelClosedError, WireError
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)


class Callers:
    """`serve` is the listener's handler. STATS and PING are answered at once, whatever the step loop waits for;
    `on_stats` hears of every question for a report."""

    def __init__(self, loop: StepLoop, observers: Observers, on_stats: Callable[[], None]) -> None:
        self._loop = loop
        self._observers = observers
        self._on_stats = on_stats
        self._outboxes: set[Outbox] = set()

    def serve(self, channel: Channel) -> None:
        """One channel, until it closes; then its requests are aborted."""
        outbox = Outbox(channel)
        self._outboxes.add(outbox)
        try:
            while True:
                self._take(channel.recv(), outbox)
        except ChannelClosedError:
            log.debug("channel from %s closed", channel.peer)
        except WireError as error:
            log.warning("channel from %s closed: %s", channel.peer, error)
        finally:
            self._outboxes.discard(outbox)
            self._observers.leave(outbox)
            self._loop.abandon(outbox)
            outbox.close()

    def _take(self, frame: Frame, outbox: Outbox) -> None:
        match frame.op:
            case Op.PING:
                outbox.put(Frame(Op.PONG, frame.id))
            case Op.SUBMIT:
                self._loop.submit(frame, outbox)
            case Op.ABORT:
                self._loop.abort(frame, outbox)
            case Op.STATS:
                self._on_stats()
                self._observers.answer(frame, outbox)
            case _:
                raise WireError(f"a router takes SUBMIT, ABORT, PING and STATS frames, not {frame.op.name}")

    def goodbye(self) -> None:
        """Tell every channel that what it waits for will not come from here."""
        for outbox in self._outboxes.copy():
            outbox.put(Frame(Op.GOODBYE))

    def flush(self, timeout: float) -> None:
        """Wait until all that is on its way out has left, at most `timeout` seconds."""
        until = time.monotonic() + timeout
        marks = []
        for outbox in self._outboxes.copy():
            marks.append(threading.Event())
            outbox.put(marks[-1])
        for mark in marks:
            mark.wait(max(0.0, until - time.monotonic()))
