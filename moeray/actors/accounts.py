"""All that a system has counted: what its actors and endpoints tell, and the controller's own. Owned by its loop."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import Future, as_completed
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any

from moeray.actors.controller_metrics import CONTROLLER, ControllerMetrics
from moeray.actors.expert_load import EXPERT_LOAD, by_expert, by_layer
from moeray.actors.hosting import ActorHandle
from moeray.actors.roster import Roster
from moeray.control.ledger import Books, Ledger
from moeray.control.reports import ExpertReport, Report
from moeray.recorder import Reading, Snapshot
from moeray.settings.metrics import MetricsConfig
from moeray.types import ExpertId

log = logging.getLogger(__name__)

REMEMBER_S = 0.5


Statement = tuple[list[Snapshot], Books, list[ActorHandle]]
"""What `merge` adds up to the system's series, the books behind it, and the actors that are to keep them."""


class Accounts:
    """`experts`: layer -> number of experts; all of them have their series from the start."""

    def __init__(
        self, config: MetricsConfig, roster: Roster, own: ControllerMetrics, experts: Mapping[int, int],
        books: Books | None,
    ) -> None:  # fmt: skip
        self._roster = roster
        self._own = own
        self._ledger = Ledger(books)
        self._lived_until: float | None = None
        self._load = config.expert_load
        self._summed = sum(experts.values()) > config.max_expert_series
        if self._load and self._summed:
            log.warning(
                "the model has %d experts, more than metrics.max_expert_series (%d): their load is counted by layer",
                sum(experts.values()), config.max_expert_series,
            )  # fmt: skip
        known = {ExpertId(layer, expert): 0 for layer, count in experts.items() for expert in range(count)}
        self._zero = self._bounded({EXPERT_LOAD: by_expert(known)} if self._load else {})

    def take(self, reading: Reading) -> None:
        """A reading of an actor that is gone would be counted twice, so it is left."""
        if reading.guest or self._roster.get(reading.source):
            values = self._bounded(reading.values)
            self._ledger.take(replace(reading, values=values), time.monotonic())

    def report(self, report: Report) -> None:
        """An actor's report, with the load of its experts."""
        values = dict(report.metrics)
        if self._load and isinstance(report, ExpertReport):
            values[EXPERT_LOAD] = by_expert(report.rows)
        self.take(Reading(report.actor_id, report.incarnation, report.at, values))

    def _bounded(self, values: Snapshot) -> Snapshot:
        if not self._summed or EXPERT_LOAD not in values:
            return values
        return {**values, EXPERT_LOAD: by_layer(values[EXPERT_LOAD])}

    def tick(self, now: float) -> None:
        """Actors have lived on, those that are gone are closed, and what the controller counts is told."""
        since, self._lived_until = self._lived_until or now, now
        for group, count in Counter(actor.group for actor in self._roster if actor.report).items():
            self._own.lived(group, count * (now - since))
        self._ledger.take(self._own.reading(), now)
        self._ledger.settle({CONTROLLER, *(actor.actor_id for actor in self._roster)}, now)

    def counted(self) -> list[Snapshot]:
        """What `merge` adds up to all that was told by now. The snapshots stay as they are."""
        return self._ledger.parts()

    def statement(self, told: Collection[Reading], standing: Mapping[str, Any], hosting: Collection[str]) -> Statement:
        """All up to now. `told`: the newest readings; `standing` as the controller tells it; `hosting`: the actors that
        the placement names."""
        for reading in told:
            self.take(reading)
        self._own.stand(standing, self._roster, hosting)
        self.tick(time.monotonic())
        keepers = [actor.handle for actor in self._roster.keepers() if actor.handle]
        return [self._zero, *self._ledger.parts()], self._ledger.books(time.time()), keepers


def remember(books: Books, keepers: Collection[ActorHandle]) -> None:
    """Give the books to these actors, and wait a moment until one of them has them: then nothing falls that is served
    from now on, should the controller die."""
    futures: list[Future[Any]] = [keeper.call("remember", books) for keeper in keepers]
    try:
        for future in as_completed(futures, REMEMBER_S):
            if future.exception() is None:
                return
    except FutureTimeoutError:
        log.debug("no actor has answered within %g s", REMEMBER_S)
    if keepers:
        log.warning("no actor keeps what was counted; counters would begin anew if the controller died now")
