"""The audit log in plain language."""

import pytest

from moeray.actors.decisions import sentence, story

INPUTS = {"groups": {"cheap": {"actors": 2}, "fast": {"actors": 1}}, "routers": [{}]}


def decision(**fields):
    wish = {"actors": {"cheap": 2, "fast": 1}, "routers": 1, "replicas": [], "reasons": []}
    return {"event": "decision", "inputs": INPUTS, **wish, **fields}


def plan(**fields):
    return {
        "event": "plan",
        "kind": "scale",
        "why": "because",
        "epoch": 3,
        "moves": 0,
        "hosts": {},
        "drops": {},
        **fields,
    }


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (decision(actors={"cheap": 4, "fast": 1}, reasons=["busy"]), "Scale cheap from 2 to 4: busy"),
        (
            decision(actors={"cheap": 1, "fast": 0}, routers=2, reasons=["a", "b"]),
            "Scale cheap from 2 to 1 and fast from 1 to 0 and routers from 1 to 2: a; b",
        ),
        (decision(replicas=[[0, 1, 2]], reasons=["hot"]), "Give 1 hot expert more replicas: hot"),
        (decision(), "No expert needs more replicas than the others"),
        (plan(hosts={"a": 3, "b": 1}), "Place the experts anew: 4 replicas to load on 2 actors (because)"),
        (
            plan(kind="repair", hosts={"a": 1}, drops={"a": 2}),
            "Repair the placement: 1 replica to load on 1 actor, 2 replicas to drop (because)",
        ),
        (
            {"event": "plan_ended", "kind": "scale", "result": "done", "epoch": 4, "error": None},
            "The new placement is in force (epoch 4)",
        ),
        (
            {"event": "plan_ended", "kind": "scale", "result": "rolled_back", "epoch": 4, "error": "b is gone"},
            "The change to epoch 4 was rolled back: b is gone",
        ),
        ({"event": "lost", "actor": "cheap-1", "reason": "silent", "node": "n"}, "cheap-1 was lost: silent"),
        ({"event": "drain", "actor": "a", "within_s": 90, "by": "hand"}, "a is to be drained within 90 s, by hand"),
        ({"event": "leave", "actor": "a", "within_s": None}, "a is leaving"),
        ({"event": "scale", "group": "cheap", "actors": 1, "by": "hand"}, "Group cheap was set to 1 actor by hand"),
        (
            {"event": "restored", "actors": {"cheap": 3, "router": 1}, "paused": False},
            "What was wanted before all actors were lost holds: cheap 3, router 1",
        ),
        (
            {"event": "restored", "actors": {"cheap": 3}, "paused": True},
            "What was wanted before all actors were lost holds: cheap 3, autoscaling paused",
        ),
        ({"event": "resume", "by": "hand"}, "Autoscaling was resumed by hand"),
        ({"event": "pause", "by": "hand"}, "Autoscaling was paused by hand"),
        (
            {"event": "node_draining", "node": "0123456789", "seconds_left": 89.6},
            "Node 01234567 is being drained, 90 s are left",
        ),
        ({"event": "node_draining", "node": "0123456789", "seconds_left": None}, "Node 01234567 is being drained"),
        ({"event": "something_new", "at": 1.0, "what": 3}, "something new: what 3"),
    ],
)  # fmt: skip
def test_sentences(entry, text):
    assert sentence(entry) == text


def test_the_newest_come_first_and_what_went_well_goes_without_saying():
    entries = [
        {"at": 1, "event": "ready", "actor": "a", "node": "n"},
        {"at": 2, **plan()},
        {"at": 3, "event": "plan_ended", "kind": "scale", "result": "done", "epoch": 3, "error": None},
        {"at": 4, "event": "lost", "actor": "a", "reason": "x", "node": "n"},
        {"at": 5, "event": "plan_ended", "kind": "scale", "result": "rolled_back", "epoch": 4, "error": "x"},
    ]
    shown = story(entries, 3)
    assert [(entry["at"], entry["event"], entry["tone"]) for entry in shown] == [
        (5, "plan_ended", "bad"), (4, "lost", "bad"), (2, "plan", "plain")
    ]  # fmt: skip
    assert [entry["text"] for entry in shown] == [sentence(entries[n]) for n in (4, 3, 1)]
    assert len(story(entries, 9)) == 4
