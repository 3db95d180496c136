"""The dispatchers of the two halves of a step, which may be computed at the same time."""

from __future__ import annotations

from collections.abc import Mapping

from moeray.dispatch.dispatcher import Dispatcher
from moeray.types import Address


class Halves:
    """Two dispatchers, each with channels of its own; whole steps are the first one's. All methods are thread-safe."""

    def __init__(self, first: Dispatcher, second: Dispatcher) -> None:
        self.first = first
        self.each = first, second

    @property
    def orphans(self) -> int:
        """See `Dispatcher`."""
        return sum(dispatcher.orphans for dispatcher in self.each)

    @property
    def seconds_total(self) -> float:
        """Of whole steps and of first halves: what the second waits for lies in the same steps."""
        return self.first.seconds_total

    def expect(self, addresses: Mapping[str, Address], *, both: bool) -> None:
        """See `Dispatcher`. `both`: whether halves are computed over these actors, and their channels are wanted."""
        for dispatcher in self.each if both else (self.first,):
            dispatcher.expect(addresses)

    def count(self) -> None:
        """See `Dispatcher`."""
        for dispatcher in self.each:
            dispatcher.count()

    def abandon(self) -> None:
        """See `Dispatcher`."""
        for dispatcher in self.each:
            dispatcher.abandon()

    def close(self) -> None:
        """See `Dispatcher`."""
        for dispatcher in self.each:
            dispatcher.close()
