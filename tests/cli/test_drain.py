"""What `moeray drain` looks at before Ray is told that a node goes."""

from __future__ import annotations

import pytest

from moeray.cli.drain import check_told
from moeray.errors import MoerayError

STATUS = {"status": "ready", "detail": "", "actors": [{"actor": "experts-0"}, {"actor": "experts-1"}]}


@pytest.mark.parametrize(
    ("status", "actors", "words"),
    [
        (STATUS, ["experts-0", "typo"], "there is no actor 'typo'; the actors are experts-0, experts-1"),
        (STATUS | {"status": "loading", "detail": "starting actors"}, [], "the system is loading"),
    ],
)
def test_who_is_not_there_is_told_before_anything_is_done(status, actors, words):
    with pytest.raises(MoerayError, match=words):
        check_told(status, actors)


def test_nothing_is_said_of_those_that_are_there():
    check_told(STATUS, ["experts-1"])
