"""One actor under watch: its reports as they come, and its loss the moment that its channel breaks or it falls silent.

Independent of Ray, which takes 15 s to notice a lost node and never notices a stopped process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from enum import StrEnum
from time import monotonic

from moeray.control.reports import Report, report_from
from moeray.errors import ChannelClosedError, ChannelTimeoutError, MoerayError, WireError
from moeray.settings.control import ControlConfig
from moeray.types import Address
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)

PROBE_S = 1.0
"""How long an actor that somebody suspects has for its answer."""
_SLICE_S = 0.25


class Loss(StrEnum):
    """Why an actor was lost. `ERROR`: it speaks, and says what no actor would."""

    CLOSED = "closed"
    SILENT = "silent"
    OUT_OF_MEMORY = "out_of_memory"
    UNACKNOWLEDGED = "unacknowledged"
    ERROR = "error"


class Watcher:
    """Owns a channel to the actor and the thread that reads it. `on_lost(actor, why, detail)` is called once at most.

    `settings` may be replaced while it runs.
    """

    def __init__(
        self,
        address: Address,
        connect: Callable[[Address], Channel],
        settings: ControlConfig,
        on_report: Callable[[str, Report], None],
        on_lost: Callable[[str, Loss, str], None],
    ) -> None:
        self._address = address
        self._connect = connect
        self.settings = settings
        self._on_report = on_report
        self._on_lost = on_lost
        self._limit_s = settings.silence_s
        self._asked: float | None = None
        self._probe = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{address.actor_id}", daemon=True)
        self._thread.start()

    def probe(self) -> None:
        """Somebody suspects the actor: ask it now, and give it `PROBE_S` to answer."""
        self._probe.set()

    def close(self) -> None:
        """Stop watching; the thread ends within moments."""
        self._closing.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            channel = self._connect(self._address)
            try:
                self._watch(channel)
            finally:
                channel.close()
        except MoerayError as error:  # also of TLS files that are being exchanged
            if not self._closing.is_set():
                self._on_lost(self._address.actor_id, _loss(error), str(error))
        except Exception as error:  # such as for want of memory: an actor that nobody watches is replaced as well
            log.exception("the watch of %s failed", self._address.actor_id)
            self._on_lost(self._address.actor_id, Loss.ERROR, repr(error))

    def _watch(self, channel: Channel) -> None:
        next_poll = monotonic()
        while not self._closing.is_set():
            now = monotonic()
            if self._probe.is_set():
                self._probe.clear()
                next_poll = now
                if self._limit_s > PROBE_S:  # a suspicion that is repeated gives no more time
                    self._limit_s = PROBE_S
                    if self._asked is not None:
                        self._asked = now  # it has so long from now on, whatever it was asked before
            if now >= next_poll and self._asked is None:
                self._asked, next_poll = now, now + self.settings.report_s
                channel.send(Frame(Op.STATS, 1))
            self._hear(channel, min(_SLICE_S, max(0.0, next_poll - now) or _SLICE_S))

    def _hear(self, channel: Channel, timeout: float) -> None:
        """Take one frame, if one comes. Raises WireError for silence beyond the limit, and for what is no report."""
        try:
            frame = channel.recv(timeout)
        except ChannelTimeoutError:
            if self._asked is not None and monotonic() - self._asked > self._limit_s:
                raise ChannelTimeoutError(f"silent for {self._limit_s:g} s") from None
            return
        if frame.op is Op.GOODBYE:  # a router that drains tells everybody: its end comes later
            return
        if frame.op is not Op.STATS:
            raise WireError(f"answered with a {frame.op.name} frame instead of a report")
        if frame.id:
            self._asked, self._limit_s = None, self.settings.silence_s
        try:
            report = report_from(frame.meta)
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"sent a report that cannot be read ({error!r})") from error
        self._on_report(self._address.actor_id, report)


def _loss(error: MoerayError) -> Loss:
    if isinstance(error, ChannelTimeoutError):
        return Loss.SILENT
    return Loss.CLOSED if isinstance(error, ChannelClosedError) else Loss.ERROR
