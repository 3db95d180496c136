"""What the controller is told to do by hand, with the checks that the policies' wishes go through as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from moeray.actors.audit import Audit
from moeray.actors.autoscaler import Autoscaler
from moeray.actors.controller_metrics import ControllerMetrics
from moeray.actors.loop import Loop
from moeray.actors.readiness import Readiness
from moeray.actors.standing import dry_run
from moeray.actors.system_keeper import SystemKeeper
from moeray.errors import NotReadyError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

COMMANDS = frozenset({"plan", "scale", "drain", "rebalance", "pause", "refuse"})
KEEP_S = 2.0
"""An order is answered when an actor has it for the next controller, or after this time."""


class Commands:
    """Any thread may call; the controller's loop does it. Each raises NotReadyError while there is no system to tell:
    `keeping` gives None then."""

    def __init__(
        self, loop: Loop, autoscaler: Autoscaler, audit: Audit, metrics: ControllerMetrics, readiness: Readiness,
        keeping: Callable[[], SystemKeeper | None],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._autoscaler = autoscaler
        self._audit = audit
        self._metrics = metrics
        self._readiness = readiness
        self._keeping = keeping

    def plan(self) -> dict[str, Any]:
        """What would be done now and why; nothing is changed."""
        return self._ask(lambda keeper: dry_run(self._autoscaler, keeper.places))

    def scale(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Set the numbers of groups' actors (`router` for the routers). Raises ConfigError, and changes nothing, where
        one is beyond its group's limits."""

        def run(keeper: SystemKeeper) -> dict[str, int]:
            before = self._autoscaler.wanted()
            self._autoscaler.scale(sizes)
            self._metrics.decided(before, self._autoscaler.wanted())
            for group, count in sizes.items():
                self._audit.write("scale", group=group, actors=count, by="hand")
            keeper.follow()
            return self._autoscaler.wanted()

        return self._order(run)

    def drain(self, actor_ids: Sequence[str], within_s: float | None = None, nodes: Collection[str] = ()) -> list[str]:
        """Empty actors, and whoever runs on these nodes, and stop them, within `within_s` seconds where given; others
        are started in their place. Returns who leaves. Raises MoerayError, and changes nothing, where one is not there.
        """

        def run(keeper: SystemKeeper) -> list[str]:
            told = keeper.fleet.departures.tell(actor_ids, within_s, nodes)
            for actor_id in told:
                self._audit.write("drain", actor=actor_id, within_s=within_s, by="hand")
            keeper.follow()
            return told

        return self._order(run)

    def rebalance(self) -> bool:
        """Balance the placement by the load of now; False where nothing is to be moved, or a change is under way."""

        def run(keeper: SystemKeeper) -> bool:
            if keeper.places.change is not None:
                return False
            self._audit.write("rebalance", by="hand")
            keeper.replan(force=True)
            return keeper.places.change is not None

        return self._ask(run)

    def pause(self, paused: bool) -> None:
        """Stop or resume scaling by policy. Repair and manual commands go on."""

        def run(keeper: SystemKeeper) -> None:
            self._autoscaler.paused = paused
            self._audit.write("pause" if paused else "resume", by="hand")

        self._order(run)

    def refuse(self, error: str) -> None:
        """An endpoint was given a config that nobody can take: it is written down, and shown with the decisions."""
        self._ask(lambda keeper: self._audit.write("config_refused", error=error))

    def _ask(self, question: Callable[[SystemKeeper], _T]) -> _T:
        keeper = self._keeping()
        if keeper is None or not self._readiness.decided or self._readiness.error is not None:
            raise NotReadyError(f"the system is {self._readiness.phase}; try again when it is ready")
        return self._loop.ask(lambda: question(keeper))

    def _order(self, order: Callable[[SystemKeeper], _T]) -> _T:
        """As `_ask`, for what the next controller is to know as well: an actor keeps it by the time of the answer."""

        def run(keeper: SystemKeeper) -> tuple[_T, SystemKeeper]:
            answer = order(keeper)
            keeper.hand_orders()
            return answer, keeper

        answer, keeper = self._ask(run)
        if not keeper.handover.kept.wait(KEEP_S):
            log.warning("no actor keeps the order yet; it would be forgotten if the controller died now")
        return answer
