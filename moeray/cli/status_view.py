"""A system's status as people see it: a table of its actors, and lines on what is wanted and was decided."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

_RATES = {"rows_total": "rows_per_s", "busy_s": "busy", "generation_tokens": "tokens_per_s"}
"""Counters of an actor's row, and what their growth per second is called."""


def with_rates(status: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The status with each actor's rates since the reading `before`; none for an actor that was not there then."""
    known = {(row["actor"], row["pid"]): row for row in before["actors"]} if before else {}
    seconds = status["at"] - before["at"] if before else 0.0
    rows = [row | _rates(row, known.get((row["actor"], row["pid"])), seconds) for row in status["actors"]]
    return {**status, "actors": rows}


def _rates(row: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float) -> dict[str, float]:
    if before is None or seconds <= 0:
        return {}
    both = [name for name in _RATES if name in row and name in before]
    return {_RATES[name]: max(0.0, row[name] - before[name]) / seconds for name in both}


def view(status: Mapping[str, Any]) -> Group:
    """What `moeray status` prints. Rates are those of `with_rates`."""
    title = f"{status['model']}: {_state(status)}, epoch {status['epoch']}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("actor", "device", "node", "pid", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("experts", "rows/s", "busy", "tokens/s", "queue"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in status["actors"]:
        table.add_row(*_cells(row, status["epoch"]))
    return Group(table, *(Text(line, style="yellow") for line in _pending(status)), *map(Text, _standing(status)))


def without_answer(reading: Mapping[str, Any], last: Mapping[str, Any] | None) -> Group:
    """Why there is no status, above the one that was last known."""
    why = Text(f"{_clock(reading['at'])} {reading['error']}", style="bold red")
    if last is None:
        return Group(why)
    age = reading["at"] - last["at"]
    return Group(why, Text(f"as it was {age:.0f} s ago:", style="dim"), view(last))


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _state(status: Mapping[str, Any]) -> str:
    state, detail = status["status"], status["detail"]
    return state if detail in ("", state) else f"{state} ({detail})"


def _cells(row: Mapping[str, Any], epoch: int) -> list[str]:
    is_expert = row["kind"] == "expert"
    behind = "" if row.get("epoch", epoch) == epoch else f" (epoch {row['epoch']})"
    return [
        row["actor"], row["device"], row["node"][:8], str(row["pid"]), row["state"] + behind,
        str(row["experts"]) if is_expert else "",
        f"{row['rows_per_s']:.0f}" if is_expert and "rows_per_s" in row else "",
        f"{row['busy']:.0%}" if "busy" in row else "",
        f"{row['tokens_per_s']:.1f}" if "tokens_per_s" in row else "",
        str(row["queue"]),
    ]  # fmt: skip


def _pending(status: Mapping[str, Any]) -> list[str]:
    """Who has had no process for a while, and what helps."""
    names = ", ".join(row["actor"] for row in status["actors"] if row["state"] == "pending")
    return [f"no process yet for {names}: where `ray status` shows a demand without room, add a node"] if names else []


def _standing(status: Mapping[str, Any]) -> list[str]:
    """What is wanted beside what is there, and the newest decisions."""
    if "wanted" not in status:
        return []
    reserve = status["reserve"]
    sizes = [
        "{} {}/{} ({} to {})".format(
            group, status["ready"][group], count + reserve.get(group, 0), *status["limits"][group]
        )
        for group, count in status["wanted"].items()
    ]
    skew = max(status["skew"].values(), default=1.0)
    lines = [
        f"ready/wanted (limits): {', '.join(sizes)}; {status['replicas']} replicas, "
        f"{status['without_replica']} experts without one; worst layer's max/mean {skew:.2f}; "
        f"autoscaling {'on' if status['autoscaling'] else 'paused'}"
    ]
    for entry in status["decisions"][-5:]:
        what = {key: value for key, value in entry.items() if key not in ("at", "event", "inputs", "node")}
        said = ", ".join(f"{key}={value}" for key, value in what.items())
        lines.append(f"{_clock(entry['at'])} {entry['event']}: {said}")
    return lines
