"""What was answered: counted for whoever reads the metrics, and learnt from, many layers at a time."""

from __future__ import annotations

from collections.abc import Sequence

from moeray.dispatch.hops import MANY, Hops
from moeray.dispatch.links import Links
from moeray.dispatch.planner import Answered
from moeray.recorder import Recorder


class Answers:
    """Owned by a dispatcher's thread, but for `count`."""

    def __init__(self, links: Links, recorder: Recorder) -> None:
        self._links = links
        self._hops = Hops(recorder)
        self._to_learn: list[tuple[int, list[str], list[Answered]]] = []  # layer, actors, forwards; until it is needed

    def note(
        self, layer: int, row_bytes: int, actors: list[str], kinds: Sequence[str], answered: list[Answered]
    ) -> None:
        """Forwards that some of the actors have answered, over channels of these kinds; `row_bytes`: see `Hops`."""
        self._hops.note(kinds, row_bytes, answered)
        self._to_learn.append((layer, actors, answered))

    def settle(self) -> None:
        """Count and learn, if there is enough."""
        if len(self._to_learn) >= MANY:
            self._hops.record()
            self.learn()

    def learn(self) -> None:
        """How long each actor takes, from what was noted."""
        for layer, actors, answered in self._to_learn:
            for actor, experts, rows, _, took_s in answered:
                self._links.answered(actors[actor], layer, experts, rows, took_s)
        self._to_learn.clear()

    def count(self) -> None:
        """Record all that was answered. Any thread may call it."""
        self._hops.record()
