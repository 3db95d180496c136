"""Entries of the audit log in plain language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_BAD = {"lost", "no_room", "start_failed"}
_PLANS = {
    "first": "Place the experts",
    "repair": "Repair the placement",
    "scale": "Place the experts anew",
    "rebalance": "Balance the experts",
}


def story(entries: Iterable[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """The newest `most` entries, newest first, each as `at` (unix seconds), `event`, a sentence (`text`) and a `tone`,
    bad or plain. That a change was carried out goes without saying; that it was not is told."""
    told = [entry for entry in entries if entry["event"] != "plan_ended" or _went_wrong(entry)]
    return [
        {"at": entry["at"], "event": entry["event"], "text": sentence(entry), "tone": _tone(entry)}
        for entry in told[: -most - 1 : -1]
    ]


def _tone(entry: Mapping[str, Any]) -> str:
    return "bad" if entry["event"] in _BAD or _went_wrong(entry) else "plain"


def _went_wrong(entry: Mapping[str, Any]) -> bool:
    return bool(entry["event"] == "plan_ended" and entry["result"] != "done")


def sentence(entry: Mapping[str, Any]) -> str:
    """What an entry says, as a sentence without its full stop."""
    match entry["event"]:
        case "controller":
            what = "took over the running actors" if entry["adopted"] else "began to serve"
            return f"The controller {what} ({entry['model']})"
        case "restored":
            wanted = ", ".join(f"{group} {count}" for group, count in entry["actors"].items())
            return f"What was wanted before all actors were lost holds: {wanted}{_paused(entry)}"
        case "decision":
            return _decision(entry)
        case "scale":
            return f"Group {entry['group']} was set to {_count(entry['actors'], 'actor')} by hand"
        case "drain":
            return f"{entry['actor']} is to be drained{_within(entry)}, by hand"
        case "leave":
            return f"{entry['actor']} is leaving{_within(entry)}"
        case "rebalance":
            return "A rebalance was asked for by hand"
        case "pause" | "resume":
            return f"Autoscaling was {entry['event']}d by hand"
        case "plan":
            return _plan(entry)
        case "plan_ended":
            return _plan_ended(entry)
        case "start":
            return f"{entry['actor']} is starting"
        case "ready":
            return f"{entry['actor']} is ready"
        case "stopped":
            return f"{entry['actor']} has stopped"
        case "lost":
            return f"{entry['actor']} was lost: {entry['reason']}"
        case "start_failed":
            return f"{entry['actor']} did not start, next try in {entry['retry_s']:g} s: {entry['error']}"
        case "no_room":
            return f"There is no room for the experts: {entry['error']}"
        case "node_draining":
            left = entry["seconds_left"]
            return f"Node {entry['node'][:8]} is being drained{'' if left is None else f', {left:.0f} s are left'}"
    return _other(entry)


def _other(entry: Mapping[str, Any]) -> str:
    """An event that has no sentence of its own is shown as it is."""
    fields = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("at", "event"))
    return f"{entry['event'].replace('_', ' ')}: {fields}" if fields else entry["event"].replace("_", " ")


def _decision(entry: Mapping[str, Any]) -> str:
    """Which numbers change from what to what, and why."""
    before = {name: limits["actors"] for name, limits in entry["inputs"]["groups"].items()}
    wanted = entry["actors"].items()
    changes = [f"{name} from {before[name]} to {count}" for name, count in wanted if count != before[name]]
    routers = len(entry["inputs"]["routers"])
    if entry["routers"] != routers:
        changes.append(f"routers from {routers} to {entry['routers']}")
    if changes:
        what = f"Scale {' and '.join(changes)}"
    elif entry["replicas"]:
        what = f"Give {_count(len(entry['replicas']), 'hot expert')} more replicas"
    else:
        what = "No expert needs more replicas than the others"
    return f"{what}: {'; '.join(entry['reasons'])}" if entry["reasons"] else what


def _plan(entry: Mapping[str, Any]) -> str:
    what = _PLANS.get(entry["kind"], entry["kind"])
    hosts, drops = sum(entry["hosts"].values()), sum(entry["drops"].values())
    parts = [f"{_count(hosts, 'replica')} to load on {_count(len(entry['hosts']), 'actor')}"] if hosts else []
    parts += [f"{_count(drops, 'replica')} to drop"] if drops else []
    return f"{what}: {', '.join(parts)} ({entry['why']})"


def _plan_ended(entry: Mapping[str, Any]) -> str:
    if entry["result"] == "done":
        return f"The new placement is in force (epoch {entry['epoch']})"
    return f"The change to epoch {entry['epoch']} was rolled back: {entry['error']}"


def _paused(entry: Mapping[str, Any]) -> str:
    return ", autoscaling paused" if entry["paused"] else ""


def _within(entry: Mapping[str, Any]) -> str:
    return "" if entry["within_s"] is None else f" within {entry['within_s']:g} s"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
