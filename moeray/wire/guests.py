"""Who is served: the channels and threads of one listener, bounded, and closed and joined at its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic

from moeray.errors import ChannelClosedError
from moeray.wire.base import Channel

# Peers that have not proven themselves yet; more are turned away unheard.
MAX_UNAUTHENTICATED = 64

_log = logging.getLogger(__name__)


class Guests:
    """Runs `handler` on each channel in a thread of its own, for at most `max_channels` at once."""

    def __init__(self, handler: Callable[[Channel], None], max_channels: int) -> None:
        self._handler = handler
        self._max_channels = max_channels
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._greeted: set[Channel] = set()  # those of peers that have not proven themselves yet
        self._threads: set[threading.Thread] = set()
        self._unauthenticated = 0
        self._closing = False

    def enter(self) -> bool:
        """Count one more unproven peer; False where there are too many or the listener closes. Pair with `leave`."""
        with self._lock:
            if self._closing or self._unauthenticated >= MAX_UNAUTHENTICATED:
                return False
            self._unauthenticated += 1
            return True

    def leave(self, channel: Channel) -> None:
        """The peer has proven itself or is gone."""
        with self._lock:
            self._unauthenticated -= 1
            self._greeted.discard(channel)

    def full(self) -> bool:
        """True where another channel would be refused."""
        return self._closing or len(self._channels) >= self._max_channels

    def spawn(self, name: str, target: Callable[[], None], channel: Channel) -> bool:
        """Run `target`, which greets whoever is on the channel, in a thread; `close` ends both. False where the
        listener closes, or no thread can be had."""

        def run() -> None:
            try:
                target()
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            if self._closing:
                return False
            self._threads.add(thread)
            self._greeted.add(channel)
        try:
            thread.start()
        except RuntimeError as error:
            _log.error("a peer is turned away: %s", error)
            with self._lock:
                self._threads.discard(thread)
            return False
        return True

    def serve(self, channel: Channel) -> None:
        """Run the handler on the channel in this thread, then close the channel."""
        try:
            with self._lock:
                if self.full():
                    return
                self._channels.add(channel)
            threading.current_thread().name = f"wire-{channel.kind}-{channel.peer}"
            self._handler(channel)
        except ChannelClosedError as error:
            _log.debug("a channel ended: %s", error)
        except Exception:
            # One peer's failure must not end the service of the others, but it is never silent.
            _log.exception("the handler of the channel to %s failed; the channel is closed", channel.peer)
        finally:
            channel.close()
            with self._lock:
                self._channels.discard(channel)

    def close(self, deadline: float) -> list[str]:
        """Close all channels, join all threads; the names of threads that still run at the deadline."""
        with self._lock:
            self._closing = True
            channels, threads = [*self._channels, *self._greeted], list(self._threads)
        for channel in channels:
            channel.close()
        for thread in threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(max(0.0, deadline - monotonic()))
        return [thread.name for thread in threads if thread.is_alive() and thread is not threading.current_thread()]
