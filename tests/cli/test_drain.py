"""Whom `moeray drain` empties."""

from __future__ import annotations

import pytest

from moeray.cli.drain import chosen_of
from moeray.errors import MoerayError

STATUS = {
    "status": "ready",
    "detail": "",
    "actors": [{"actor": "experts-0", "node": "a"}, {"actor": "experts-1", "node": "b"}, {"actor": "r", "node": "b"}],
}


@pytest.mark.parametrize(
    ("actors", "nodes", "chosen"),
    [
        (["experts-0"], [], ["experts-0"]),
        ([], ["b"], ["experts-1", "r"]),
        (["r", "experts-0"], ["b"], ["r", "experts-0", "experts-1"]),
        ([], ["c"], []),
    ],
)
def test_those_that_are_named_and_those_of_the_nodes(actors, nodes, chosen):
    assert chosen_of(STATUS, actors, nodes) == chosen


@pytest.mark.parametrize(
    ("status", "actors", "words"),
    [
        (STATUS, ["experts-0", "typo"], "there is no actor 'typo'; the actors are experts-0, experts-1, r"),
        (STATUS | {"status": "loading", "detail": "starting actors"}, [], "the system is loading"),
    ],
)
def test_who_is_not_there_is_told_before_anything_is_done(status, actors, words):
    with pytest.raises(MoerayError, match=words):
        chosen_of(status, actors, ["b"])
