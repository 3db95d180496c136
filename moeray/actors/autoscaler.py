"""From reports to the numbers that are wanted: windows, policies, hysteresis. Owned by the controller's loop."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from moeray.actors.orders import Orders
from moeray.actors.roster import ROUTER, Roster
from moeray.config import Config
from moeray.control.deciding import decide, load_policies
from moeray.control.fleet import Phase
from moeray.control.load import LoadBook
from moeray.control.placement import Placement
from moeray.control.policy import ExpertActorView, GroupLimits, PolicyInput, RouterView, Wish
from moeray.control.reports import Report
from moeray.control.reserve import Busiest
from moeray.control.router_load import RouterLoad
from moeray.control.update import kinds_of, wanted_after
from moeray.control.votes import settle
from moeray.errors import ConfigError, PolicyError
from moeray.types import ExpertId


class Autoscaler:
    """Implements the placement's `LoadSource`. `wish` is what is wanted now; it changes by `decide` and `scale`."""

    def __init__(
        self, config: Config, roster: Roster, failed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`failed` is told what each policy that does not work says, once; the others decide without it."""
        self._config = config
        self._failed = failed
        self._failures: set[str] = set()
        self._roster = roster
        self._clock = clock
        self._policies = load_policies(config.control.policies)
        self._book = LoadBook(config.control.window_s)
        self._busiest = Busiest()
        self._history: deque[Wish] = deque(maxlen=config.control.shrink_votes)
        self._kinds = kinds_of(config)
        self.paused = not config.control.autoscale
        groups = {group.name: group.actors for group in config.experts.resolved()}
        self.wish = Wish(groups, config.router.actors)

    def configure(self, config: Config) -> None:
        """Hold a newer config: its limits and policies from now on. Raises ConfigError, and changes nothing, for a
        policy that cannot be loaded."""
        policies = load_policies(config.control.policies)
        wanted = wanted_after(self.wanted(), self._config, config)
        if config.control.autoscale != self._config.control.autoscale:
            self.paused = not config.control.autoscale
        self._failures.clear()
        self._policies, self._kinds, self._config = policies, kinds_of(config), config
        self._book.window_s = config.control.window_s
        self._history = deque(maxlen=config.control.shrink_votes)
        routers = wanted.pop(ROUTER)
        self.wish = replace(self.wish, actors=wanted, routers=routers)

    def adopt(self, placement: Placement, orders: Orders | None) -> None:
        """Go on from what an earlier controller had scaled to. Where nobody has kept its orders that is the actors that
        serve, and hot experts' replicas."""
        if orders is not None:
            self.paused = orders.paused
        kept = orders.wish if orders is not None else self._found(placement)
        groups = {name: self._within(name, kept.actors.get(name, count)) for name, count in self.wish.actors.items()}
        self.wish = replace(kept, actors=groups, routers=self._within(ROUTER, kept.routers or 0))

    def _found(self, placement: Placement) -> Wish:
        """As if all that serves were wanted, and no more."""
        named = set(placement.actors())
        groups = {name: sum(a.group == name and a.actor_id in named for a in self._roster) for name in self.wish.actors}
        base = self._config.experts.replicas
        hot = {expert: len(held) for expert, held in placement.replicas.items() if len(held) > base}
        return Wish(groups, len(self._roster.routers(Phase.READY)), hot)

    def _within(self, name: str, count: int) -> int:
        low, high = self._kinds[name].actors_span
        return min(max(count, low), high)

    def fold(self, report: Report) -> None:
        """Take one report."""
        self._book.fold(report, self._clock())

    def forget(self, actor_id: str) -> None:
        self._book.forget(actor_id)

    # -- LoadSource -----------------------------------------------------------------------------------------------

    def load(self) -> Mapping[ExpertId, float]:
        return self._book.expert_rates(self._clock())

    def rates(self) -> Mapping[str, float]:
        return self._book.service_rates()

    def skews(self) -> Mapping[int, float]:
        """Layer -> max/mean of what its actors really served."""
        return self._book.skew_observed()

    # -- for people ------------------------------------------------------------------------------------------------

    def recent(self) -> tuple[Mapping[ExpertId, float], Mapping[str, float]]:
        """Rows per second of the last seconds, by expert and by actor."""
        return self._book.recent()

    def busy(self) -> Mapping[str, float]:
        """The part of the last window that each expert actor computed, 0 to 1."""
        return self._book.busy(self._clock())

    # -- deciding -------------------------------------------------------------------------------------------------

    def seen(self, placement: Placement) -> PolicyInput:
        """What the policies look at, at this moment."""
        now = self._clock()
        busy, rates, waits = self._book.busy(now), self._book.service_rates(), self._book.queue_waits(now)
        named = set(placement.actors())
        experts = tuple(
            ExpertActorView(
                a.actor_id, a.group, a.node_id, busy.get(a.actor_id, 0.0), rates.get(a.actor_id, 0.0),
                waits.get(a.actor_id, 0.0),
            )
            for a in self._roster.experts(Phase.READY)
            if a.actor_id in named
        )  # fmt: skip
        loads = self._book.routers(now)
        routers = tuple(
            RouterView(a.actor_id, a.node_id, loads.get(a.actor_id, RouterLoad()))
            for a in self._roster.routers(Phase.READY)
        )
        limits = {name: self._limits(name) for name in self._kinds}
        router_limits = limits.pop(ROUTER)
        return PolicyInput(
            time.time(), self._book.idle_s(now), self.load(), self._book.peak(now), experts, routers, placement,
            limits, router_limits, self._config.experts.replicas, self._config.control,
            self._busiest.within(self._config.control.reserve_s, now), self._book.load_s(now),
        )  # fmt: skip

    def _limits(self, name: str) -> GroupLimits:
        kind = self._kinds[name]
        low, high = kind.actors_span
        wanted = self.wish.routers if name == ROUTER else self.wish.actors[name]
        assert wanted is not None
        return GroupLimits(wanted, low, high, kind.price_per_hour, self._device(name))

    def _device(self, name: str) -> str:
        """What the group's actors run on, by what most of them say: `auto` is no device, and groups of one device are
        a tier. As it is configured while none has said so."""
        found = Counter(a.report.device for a in self._roster if a.group == name and a.report)
        return found.most_common(1)[0][0] if found else self._kinds[name].device

    def decide(self, placement: Placement) -> tuple[Wish, PolicyInput] | None:
        """Let the policies decide; the new wish and what it rests on, or None where nothing changes or it is paused."""
        seen = self.seen(placement)
        self._busiest.note(seen.experts, self._clock())
        self._history.append(decide(self._policies, seen, self._on_failed))
        if self.paused:
            return None
        settled = settle(self.wish, list(self._history), self._config.control.shrink_votes)
        if replace(settled, reasons=()) == replace(self.wish, reasons=()):
            return None
        self.wish = settled
        return settled, seen

    def _on_failed(self, error: PolicyError) -> None:
        message = str(error)
        if message not in self._failures:
            self._failures.add(message)
            self._failed(message)

    def preview(self, placement: Placement) -> tuple[Wish, PolicyInput]:
        """What the policies would want at this moment, before hysteresis. Changes nothing. Raises PolicyError."""
        seen = self.seen(placement)
        return decide(self._policies, seen), seen

    def scale(self, sizes: Mapping[str, int]) -> None:
        """Set groups' numbers by hand; the policies go on from them. Raises ConfigError, and changes nothing, where one
        is beyond its limits."""
        for group, count in sizes.items():
            self._check_size(group, count)
        wanted = {**self.wanted(), **sizes}
        self._history.clear()
        routers = wanted.pop(ROUTER)
        self.wish = replace(self.wish, actors=wanted, routers=routers)

    def _check_size(self, group: str, count: int) -> None:
        if group not in self._kinds:
            raise ConfigError(f"there is no group {group!r}; the groups are {', '.join(self._kinds)}")
        low, high = self._kinds[group].actors_span
        if not low <= count <= high:
            raise ConfigError(
                f"{group}={count} is outside {low} to {high}; raise max_actors (or lower min_actors) of the group"
            )

    def wanted(self) -> dict[str, int]:
        """Actors of each group, the routers' group included."""
        assert self.wish.routers is not None
        return {**self.wish.actors, ROUTER: self.wish.routers}


def summary(seen: PolicyInput) -> dict[str, object]:
    """A policy's input as the audit log keeps it: all of it but the load of each expert, of which the heaviest."""
    heaviest = sorted(seen.load.items(), key=lambda item: -item[1])[:8]
    return {
        "idle_s": round(seen.idle_s, 1),
        "rows_per_s": round(sum(seen.load.values()), 1),
        "hottest": [[*expert, round(rate, 1)] for expert, rate in heaviest],
        "experts": [asdict(view) for view in seen.experts],
        "routers": [asdict(view) for view in seen.routers],
        "groups": {name: asdict(limits) for name, limits in seen.groups.items()},
        "epoch": seen.placement.epoch,
    }


def wish_tree(wish: Wish) -> dict[str, object]:
    """A wish as plain data."""
    return {
        "actors": dict(wish.actors),
        "routers": wish.routers,
        "replicas": [[*expert, count] for expert, count in sorted(wish.replicas.items())],
        "reasons": list(wish.reasons),
    }
