"""One channel to a router with its two threads: one reads, one writes, and silence does not go unnoticed."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from moeray.errors import ChannelClosedError, ChannelTimeoutError, WireError
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)

BEAT_S = 0.5


class Link:
    """While `busy`, a router of which nothing was heard for a beat is sent a PING, and one that is silent for
    `silence_s` counts as hung. Silence is counted in beats that were really waited for, so that a pause of this process
    (a suspended machine) is not taken for one of the router's.

    `on_frame(frame)`, `on_unsent(frame, error)` for a frame that is not fit to be sent, and last of all
    `on_end(reason)` come from the link's threads.
    """

    def __init__(
        self,
        channel: Channel,
        silence_s: float,
        on_frame: Callable[[Frame], None],
        on_unsent: Callable[[Frame, WireError], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.busy = False
        self._channel = channel
        self._silence_s = silence_s
        self._on_frame = on_frame
        self._on_unsent = on_unsent
        self._on_end = on_end
        self._out: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"read-{channel.peer}", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"write-{channel.peer}", daemon=True)

    def start(self) -> None:
        """Raises RuntimeError, with the channel closed, where no thread can be had."""
        try:
            self._writer.start()
            self._reader.start()
        except RuntimeError:
            self._channel.close()
            self._out.put(None)
            raise

    def put(self, frame: Frame) -> None:
        """Send a frame when its turn comes; on a link that has ended it goes nowhere."""
        self._out.put(frame)

    def _read(self) -> None:
        reason = "is gone"
        try:
            self._receive()
            reason = "is draining"
        except ChannelTimeoutError:
            reason = f"has not answered for {self._silence_s:g} s"
        except ChannelClosedError as error:
            log.debug("the channel to %s ended: %s", self._channel.peer, error)
        except WireError as error:
            log.warning("the channel to %s broke: %s", self._channel.peer, error)
        finally:
            self._channel.close()
            self._out.put(None)
            self._on_end(reason)

    def _receive(self) -> None:
        """Hand frames on until the router says goodbye. Raises ChannelTimeoutError for a hung router, WireError."""
        beat = min(BEAT_S, self._silence_s / 2)
        silent = 0.0
        while True:
            try:
                frame = self._channel.recv(beat)
            except ChannelTimeoutError:
                silent = silent + beat if self.busy else 0.0
                if silent >= self._silence_s:
                    raise
                if self.busy:
                    self._out.put(Frame(Op.PING))
                continue
            silent = 0.0
            if frame.op is Op.GOODBYE:
                return
            if frame.op is not Op.PONG:
                self._on_frame(frame)

    def _write(self) -> None:
        while (frame := self._out.get()) is not None:
            try:
                self._channel.send(frame)
            except (ChannelClosedError, ChannelTimeoutError):
                self._channel.close()
                return
            except WireError as error:
                self._on_unsent(frame, error)

    def close(self) -> None:
        """End the channel and join both threads; not for the event loop's thread."""
        self._channel.close()
        self._out.put(None)
        self._reader.join(5.0)
        self._writer.join(5.0)
