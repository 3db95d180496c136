"""Frames on their way to one ingress, sent by a thread of their own: a slow reader never stalls the step loop."""

from __future__ import annotations

import logging
import queue
import threading

from moeray.errors import ChannelClosedError, WireError
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame

log = logging.getLogger(__name__)

MAX_FRAMES = 4096


class Outbox:
    """A bounded queue in front of a channel. A reader that falls `MAX_FRAMES` behind loses its channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._frames: queue.Queue[Frame | threading.Event | None] = queue.Queue(MAX_FRAMES)
        self._thread = threading.Thread(target=self._run, name=f"outbox-{channel.peer}", daemon=True)
        self._thread.start()

    def put(self, frame: Frame | threading.Event) -> None:
        """Send a frame when its turn comes; an event instead of one is set when all before it has left."""
        try:
            self._frames.put_nowait(frame)
        except queue.Full:
            log.warning("%s reads too slowly (%d frames behind); its channel is closed", self._channel.peer, MAX_FRAMES)
            self._channel.close()

    def _run(self) -> None:
        while (frame := self._frames.get()) is not None:
            if isinstance(frame, threading.Event):
                frame.set()
                continue
            try:
                self._channel.send(frame)
            except ChannelClosedError:
                return
            except WireError as error:
                log.warning("sending to %s failed: %s", self._channel.peer, error)
                self._channel.close()
                return

    def close(self) -> None:
        """Close the channel and end the thread. What was not yet sent is not sent."""
        self._channel.close()
        while True:
            try:
                self._frames.put_nowait(None)
                break
            except queue.Full:
                self._frames.get_nowait()
        self._thread.join(timeout=5.0)
