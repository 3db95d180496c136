"""What simulated actors count and report."""

import numpy as np

from moeray.control.placement import Placement
from moeray.control.tally import Tallies
from moeray.types import ExpertId


def placed(replicas):
    """A layer of two experts: expert -> its actors."""
    return Placement(0, {ExpertId(0, expert): tuple(actors) for expert, actors in replicas.items()})


def rows_of(tallies):
    return {report.actor_id: {e.expert: n for e, n in report.rows.items()} for report in tallies.reports(1.0, 0)}


def count(tallies, *rows, actors):
    tallies.count(np.array(rows), np.full(actors, 0.5), np.full(actors, 2.0))


def test_replicas_share_the_rows_of_an_expert_and_none_is_lost():
    tallies = Tallies(1, 2)
    tallies.host("ab", placed({0: "ab", 1: "b"}))
    count(tallies, 7, 3, actors=2)
    assert rows_of(tallies) == {"a": {0: 4}, "b": {0: 3, 1: 3}}


def test_counts_of_what_stays_go_on_and_the_others_begin_at_0():
    tallies = Tallies(1, 2)
    tallies.host("ab", placed({0: "a", 1: "b"}))
    count(tallies, 5, 6, actors=2)
    tallies.host("cb", placed({0: "bc", 1: "b"}))
    count(tallies, 2, 1, actors=2)
    assert rows_of(tallies) == {"c": {0: 1}, "b": {0: 1, 1: 7}}
    tallies.host("bc", placed({0: "c", 1: "b"}))
    tallies.host("bc", placed({0: "bc", 1: "b"}))
    assert rows_of(tallies) == {"b": {0: 0, 1: 7}, "c": {0: 1}}


def test_a_report_tells_the_service_time_since_the_last_one():
    tallies = Tallies(1, 2)
    tallies.host("a", placed({0: "a", 1: "a"}))
    count(tallies, 1, 1, actors=1)
    (first,) = tallies.reports(1.0, 0)
    assert (first.busy_s, first.forwards, first.service_p50_s) == (0.5, 2, 0.25)
    (idle,) = tallies.reports(1.0, 0)
    assert (idle.busy_s, idle.service_p50_s) == (0.5, 0.0)
