"""What expert groups and routers have in common: a device, and how few and how many of them there may be."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from moeray.tree import require

Device = Literal["auto", "cpu", "cuda"]


class Kind(Protocol):
    """A kind of actors, with how many there are at the start."""

    @property
    def actors(self) -> int: ...

    @property
    def actors_span(self) -> tuple[int, int]: ...


def span(actors: int, low: int | None, high: int | None) -> tuple[int, int]:
    """(fewest, most) actors, where None stands for the number at the start."""
    return actors if low is None else low, actors if high is None else high


def check_amounts(kind: Any, key: str, *names: str) -> None:
    """Raises ConfigError for an amount of these names, or of `resources`, below 0; None is one that is chosen later."""
    amounts = {name: getattr(kind, name) for name in names}
    amounts |= {f"resources.{name}": amount for name, amount in kind.resources.items()}
    for name, amount in amounts.items():
        require(amount is None or amount >= 0, f"{key}.{name}", f"must be 0 or more, got {amount}")


def check_span(kind: Kind, key: str) -> None:
    """Raises ConfigError where the number at the start is not between the fewest and the most."""
    low, high = kind.actors_span
    require(
        1 <= low <= kind.actors <= high,
        f"{key}.actors",
        f"must lie between min_actors ({low}) and max_actors ({high}), got {kind.actors}",
    )
