"""What people and Prometheus see of a system: asks every actor, and adds up what they say."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from moeray.actors.hosting import call
from moeray.actors.roster import Actor
from moeray.config import Config
from moeray.control.fleet import Phase
from moeray.errors import MoerayError
from moeray.recorder import Reading
from moeray.types import ExpertId

log = logging.getLogger(__name__)

ANSWER_S = 5.0
READ_S = 0.5
"""How long a scrape waits for actors: of one that hangs, its last report holds."""


class Overview:
    """Any thread may ask; what it asks the actors has one deadline for all of them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._rates = _Rates()

    def rows(self, actors: Mapping[str, Actor]) -> list[dict[str, Any]]:
        """One row an actor, with its phase as the controller sees it."""
        answers = _gather(actors, "status")
        rows = []
        for actor_id, actor in actors.items():
            row = answers[actor_id] or _silent(actor, time.monotonic())
            row["rows_per_s"] = self._rates.rate(actor_id, row.get("rows_total"))
            if actor.phase is Phase.LEAVING:
                row["state"] = "draining"
            elif actor.phase is Phase.READY and not actor.is_router and not row["experts"]:
                row["state"] = "warm"
            rows.append(row)
        return rows

    def phase(self, actors: Mapping[str, Actor]) -> str | None:
        """How far the loading of experts is, while it goes on."""
        experts = {name: a for name, a in actors.items() if not a.is_router and a.phase is Phase.READY}
        rows = [row["loading"] for row in _gather(experts, "status").values() if row]
        done, total = sum(row[0] for row in rows), sum(row[1] for row in rows)
        return f"loading experts {done}/{total}" if total else None

    def load(self, actors: Mapping[str, Actor], known: Iterable[ExpertId]) -> list[tuple[int, int, int]]:
        """(layer, expert, rows served so far), over all replicas."""
        totals = dict.fromkeys(known, 0)
        experts = {name: actor for name, actor in actors.items() if not actor.is_router}
        for rows in _gather(experts, "load").values():
            for layer, expert, count in rows or ():
                totals[ExpertId(layer, expert)] = totals.get(ExpertId(layer, expert), 0) + count
        return [(*expert, count) for expert, count in sorted(totals.items())]

    def readings(self, actors: Mapping[str, Actor]) -> list[Reading]:
        """What those who answer at once have counted up to now."""
        return [reading for reading in _gather(actors, "metrics", READ_S).values() if reading is not None]


def _gather(actors: Mapping[str, Actor], method: str, answer_s: float = ANSWER_S) -> dict[str, Any]:
    """Ask every actor at once; None for those that are not there yet, do not answer in time or are gone."""
    futures = {name: call(actor.handle, method) for name, actor in actors.items() if actor.handle and actor.report}
    until = time.monotonic() + answer_s
    answers: dict[str, Any] = dict.fromkeys(actors)
    for actor_id, future in futures.items():
        try:
            answers[actor_id] = future.result(timeout=max(0.0, until - time.monotonic()))
        except (MoerayError, FutureTimeoutError) as error:
            log.warning("actor %s did not answer %s: %s", actor_id, method, error)
    return answers


def _silent(actor: Actor, now: float) -> dict[str, Any]:
    """The row of an actor that says nothing: it waits for room, is being started, or does not answer."""
    report = actor.report
    state = "silent" if report else "pending" if actor.is_pending(now) else "starting"
    return {
        "actor": actor.actor_id, "kind": "router" if actor.is_router else "expert", "group": actor.group,
        "node": report.node_id if report else "", "pid": report.pid if report else 0,
        "device": report.device if report else "", "state": state, "experts": 0, "queue": 0,
    }  # fmt: skip


class _Rates:
    """Per second, from two readings of a counter."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def rate(self, key: str, total: float | None) -> float:
        if total is None:
            return 0.0
        now = self._clock()
        with self._lock:
            before, count = self._last.get(key, (now, total))
            self._last[key] = (now, total)
        return (total - count) / (now - before) if now > before else 0.0
