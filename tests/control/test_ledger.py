"""What a system has counted never falls, whoever dies, and is counted once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moeray.control.ledger import LINGER_S, MOST_GUESTS, Books, Ledger, lasting, lingering, merge, newer
from moeray.metrics import METRICS
from moeray.recorder import Reading

TOKENS, ROWS, RUNNING = "moeray_step_seconds", "moeray_expert_rows_total", "moeray_kv_cache_usage_ratio"
MOVED = "moeray_requests_moved_total"
SIZE = len(METRICS[TOKENS].buckets) + 2


def observed(count: float) -> list[float]:
    return [count, *[0.0] * (SIZE - 2), count / 2]


def reading(source: str, count: float, at: float = 1.0, incarnation: str = "1", guest: bool = False) -> Reading:
    """A counter, a histogram, a counter by actor and a gauge, all of them `count`."""
    values = {
        MOVED: {(): count},
        TOKENS: {(): observed(count)},
        ROWS: {("experts", source): count},
        RUNNING: {("m", source): count},
    }
    return Reading(source, incarnation, at, values, guest)


def total(ledger: Ledger) -> tuple[float, list[float]]:
    merged = merge(ledger.parts())
    return merged.get(MOVED, {}).get((), 0.0), merged.get(TOKENS, {}).get((), [0.0] * SIZE)


@pytest.mark.parametrize(
    ("readings", "count"),
    [
        ([], 0),
        ([reading("a", 3)], 3),
        ([reading("a", 3), reading("b", 4)], 7),
        ([reading("a", 3), reading("a", 5, at=2.0)], 5),
        ([reading("a", 5, at=2.0), reading("a", 3)], 5),  # one that was overtaken
        ([reading("a", 5), reading("a", 2, at=0.5, incarnation="2")], 7),  # it starts again, and so does its clock
    ],
)
def test_readings_add_up(readings, count):
    ledger = Ledger()
    for each in readings:
        ledger.take(each, 0.0)
    assert total(ledger) == (count, observed(count))


def test_a_metric_that_a_reading_does_not_name_stays():
    ledger = Ledger()
    ledger.take(reading("a", 3), 0.0)
    ledger.take(Reading("a", "1", 2.0, {ROWS: {("experts", "a"): 9}}), 0.0)
    assert total(ledger)[0] == 3
    assert merge(ledger.parts())[ROWS] == {("experts", "a"): 9}


def test_of_a_source_that_ended_counts_stay_and_gauges_go_and_its_own_series_linger():
    ledger = Ledger()
    ledger.take(reading("a", 3), 0.0)
    ledger.take(reading("b", 4), 0.0)
    ledger.settle({"b"}, 100.0)
    merged = merge(ledger.parts())
    assert total(ledger) == (7, observed(7))
    assert merged[RUNNING] == {("m", "b"): 4}
    assert merged[ROWS] == {("experts", "a"): 3, ("experts", "b"): 4}
    ledger.settle({"b"}, 99.9 + LINGER_S)
    assert merge(ledger.parts())[ROWS] == {("experts", "a"): 3, ("experts", "b"): 4}
    ledger.settle({"b"}, 100.0 + LINGER_S)
    assert merge(ledger.parts())[ROWS] == {("experts", "b"): 4}
    assert total(ledger) == (7, observed(7))


def test_guests_stay_until_there_are_too_many():
    ledger = Ledger()
    for number in range(MOST_GUESTS):
        ledger.take(reading(f"g{number}", 1, guest=True), 0.0)
    ledger.settle((), 1.0)
    ledger.take(reading("g0", 2, at=2.0, guest=True), 2.0)  # it speaks again, so g1 is the one silent for longest
    ledger.take(reading("new", 1, guest=True), 3.0)
    ledger.settle((), 3.0)
    ledger.take(reading("g0", 3, at=3.0, guest=True), 4.0)
    assert total(ledger)[0] == MOST_GUESTS + 3
    assert len(ledger.books(0.0).readings) == MOST_GUESTS


def test_books_hold_what_actors_do_not_tell_again():
    ledger = Ledger()
    ledger.take(reading("a", 3), 0.0)
    ledger.take(reading("gone", 4), 0.0)
    ledger.settle({"a"}, 0.0)
    books = ledger.books(5.0)
    assert books == Books(
        5.0, lasting(reading("", 4).values), (Reading("a", "1", 1.0, lasting(reading("", 3).values)),)
    )
    assert ledger.books(5.0).at > books.at
    assert Ledger(books).books(1.0).at > books.at


@pytest.mark.parametrize(
    ("one", "other", "expected"), [(None, None, None), (1, None, 1), (None, 2, 2), (1, 2, 2), (2, 1, 2)]
)
def test_the_newer_of_two_copies(one, other, expected):
    def copy(at: float | None) -> Books | None:
        return None if at is None else Books(at)

    assert newer(copy(one), copy(other)) == copy(expected)


def test_every_metric_either_lasts_or_lingers_or_is_a_gauge():
    everything = {name: {(): 1.0} for name in METRICS}
    lasts, stays = lasting(everything), lingering(everything)
    assert not lasts.keys() & stays.keys()
    assert {name for name in METRICS if name not in {**lasts, **stays}} == {
        n for n, s in METRICS.items() if s.kind == "gauge"
    }
    assert all("actor" in METRICS[name].labels for name in stays)


SERIES = st.dictionaries(st.sampled_from([("a",), ("b",), ("c",)]), st.integers(0, 9))
SNAPSHOTS = st.fixed_dictionaries({}, optional={"moeray_dispatch_rows_total": SERIES, "moeray_plans_total": SERIES})


@given(st.lists(SNAPSHOTS, max_size=4), st.permutations(range(4)))
def test_merging_is_a_sum_in_any_order(snapshots, order):
    merged = merge(snapshots)
    again = merge([merge(snapshots[i : i + 1]) for i in order if i < len(snapshots)])
    assert again == merged
    for name in merged:
        keys = {key for snapshot in snapshots for key in snapshot.get(name, {})}
        assert merged[name] == {key: sum(s.get(name, {}).get(key, 0) for s in snapshots) for key in keys}


class System(RuleBasedStateMachine):
    """Actors (`a` starts again under its name, `b` and `c` under new ones) and endpoints (`x`, `y`) count, are read,
    die and start again; the controller serves, dies, and goes on from its books."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.books = Ledger(), Books()
        self.starts = dict.fromkeys("abcxy", 0)
        self.counts = dict.fromkeys("abcxy", 0)
        self.read: dict[tuple[str, int], int] = {}
        """What the ledger is to have: the last reading of every start of every source."""
        self.kept: dict[tuple[str, int], int] = {}
        self.served = 0.0
        self.clock = 0.0

    def total(self) -> float:
        return float(merge(self.ledger.parts()).get(MOVED, {}).get((), 0))

    def source(self, name: str) -> str:
        return name if name == "a" else f"{name}{self.starts[name]}"

    @rule(name=st.sampled_from("abcxy"), by=st.integers(1, 5))
    def count(self, name, by):
        self.counts[name] += by

    @rule(name=st.sampled_from("abcxy"))
    def read_one(self, name):
        self.clock += 1
        start, count = self.starts[name], self.counts[name]
        told = Reading(self.source(name), str(start), self.clock, {MOVED: {(): count}}, guest=name in "xy")
        self.ledger.take(told, self.clock)
        self.read[name, start] = count

    @rule(name=st.sampled_from("abcxy"))
    def die(self, name):
        self.starts[name] += 1
        self.counts[name] = 0

    @rule()
    def settle(self):
        self.ledger.settle({self.source(name) for name in "abc"}, self.clock)

    @rule()
    def serve(self):
        self.served = self.total()
        self.books, self.kept = self.ledger.books(0.0), dict(self.read)

    @rule()
    def the_controller_dies(self):
        self.ledger, self.read = Ledger(self.books), dict(self.kept)
        self.settle()

    @invariant()
    def what_was_read_is_counted_once_and_what_was_served_never_falls(self):
        assert self.total() == sum(self.read.values())
        assert self.total() >= self.served


System.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSystem = System.TestCase
