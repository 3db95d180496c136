import math
from dataclasses import replace

import pytest

from moeray.control.load import LoadBook, skew
from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport, RouterReport
from moeray.control.router_load import LATE_S, STEPS
from moeray.types import ExpertId

A, B = ExpertId(0, 0), ExpertId(0, 1)


def steady(book, seconds, *, rate=100, busy=0.5, actor="a", expert=A, start=0.0, every=1.0):
    """Reports of an actor that serves `rate` rows/s."""
    for i in range(int(seconds / every) + 1):
        t = i * every
        book.fold(ExpertReport(actor, "1", {expert: round(rate * t)}, busy_s=busy * t), start + t)
    return start + seconds


@pytest.mark.parametrize("every", [0.5, 1.0, 0.98])
def test_a_steady_load_reads_as_its_rate(every):
    book = LoadBook(10.0)
    now = steady(book, 49, every=every)
    assert book.expert_rates(now)[A] == pytest.approx(100, rel=0.1)
    assert book.peak(now)[A] == pytest.approx(100, rel=0.02)
    assert book.busy(now)["a"] == pytest.approx(0.5, rel=0.02)
    assert book.service_rates()["a"] == pytest.approx(200, rel=0.01)


@pytest.mark.parametrize(("seconds", "load_s"), [(0, 0.0), (1, 1.0), (5, 4.0), (60, 10.0)])
def test_of_how_many_seconds_a_rate_is_the_mean(seconds, load_s):
    book = LoadBook(10.0)
    assert book.load_s(steady(book, seconds)) == pytest.approx(load_s, rel=0.06)


def test_a_rate_is_right_from_the_second_report_on():
    book = LoadBook(10.0)
    assert book.expert_rates(steady(book, 1))[A] == pytest.approx(100, rel=0.1)


def test_windows_fade_and_the_service_rate_stays():
    book = LoadBook(10.0)
    now = steady(book, 30)
    assert book.expert_rates(now + 20)[A] == pytest.approx(100 * 0.135, rel=0.2)
    assert book.busy(now + 20)["a"] < 0.1
    assert book.peak(now + 20)[A] == pytest.approx(100)
    assert book.peak(now + 61)[A] == 0
    assert book.service_rates()["a"] == pytest.approx(200)


def test_what_experts_serve_at_present_is_the_mean_of_their_actors_last_reports():
    book = LoadBook(10.0)
    counts = [(0, 0), (90, 30), (90, 30), (90, 60), (150, 60), (150, 60), (150, 60)]
    for t, (first, second) in enumerate(counts):
        book.fold(ExpertReport("a", "1", {A: first, B: second}), float(t))
        book.fold(ExpertReport("b", "1", {B: 10 * t}), t + 0.5)
    experts, actors = book.recent()
    assert experts == {A: pytest.approx(60 / 5), B: pytest.approx(30 / 5 + 10)}
    assert actors == {"a": pytest.approx(90 / 5), "b": pytest.approx(10)}
    book.forget("a")
    assert book.recent() == ({A: 0.0, B: pytest.approx(10)}, {"b": pytest.approx(10)})


def test_one_report_is_no_rate():
    book = LoadBook(10.0)
    book.fold(ExpertReport("a", "1", {A: 50}), 1.0)
    assert book.recent() == ({A: 0.0}, {"a": 0.0})


def test_the_peak_is_the_busiest_second():
    book = LoadBook(10.0)
    for t, count in [(0, 0), (1, 10), (2, 510), (3, 520)]:
        book.fold(ExpertReport("a", "1", {A: count}), float(t))
    assert book.peak(3.0)[A] == 500


@pytest.mark.parametrize(
    ("first", "second", "delta"),
    [
        (("1", {A: 50}, 5.0), ("1", {A: 80}, 6.0), 30),
        (("1", {A: 50}, 5.0), ("2", {A: 80}, 0.5), 80),  # a new incarnation that outran the old count
        (("1", {A: 50}, 5.0), ("1", {A: 20}, 5.5), 20),  # the expert was dropped and hosted again
    ],
)
def test_a_restart_counts_from_nothing(first, second, delta):
    book = LoadBook(10.0)
    for t, (incarnation, rows, busy_s) in enumerate([first, second]):
        book.fold(ExpertReport("a", incarnation, rows, busy_s=busy_s), float(t))
    assert book.peak(1.0)[A] == delta
    assert 0 < book.busy(1.0)["a"] <= 1


def test_an_expert_that_leaves_a_report_and_comes_back_is_not_counted_twice():
    book = LoadBook(10.0)
    for t, rows in enumerate([{A: 1000, B: 0}, {B: 5}, {A: 1001, B: 5}]):
        book.fold(ExpertReport("a", "1", rows), float(t))
    assert book.peak(2.0) == {A: 1, B: 5}


def test_one_expert_falling_does_not_restart_the_others():
    book = LoadBook(10.0)
    for t, rows in enumerate([{A: 1000, B: 1000}, {A: 3, B: 1004}]):
        book.fold(ExpertReport("a", "1", rows), float(t))
    assert book.peak(1.0) == {A: 3, B: 4}


def test_replicas_add_up_and_what_a_lost_actor_served_fades():
    book = LoadBook(10.0)
    for t in range(41):
        for actor in ("a", "b"):
            book.fold(ExpertReport(actor, "1", {A: 100 * t}), float(t))
    assert book.expert_rates(40.0)[A] == pytest.approx(200, rel=0.1)
    book.forget("a")
    assert set(book.busy(40.0)) == {"b"}
    assert book.expert_rates(40.0)[A] == pytest.approx(200, rel=0.1)


def test_the_queue_wait_is_the_windows_worst():
    book = LoadBook(10.0)
    for t, wait in [(0, 0.1), (1, 0.9), (2, 0.2), (3, 0.3)]:
        book.fold(ExpertReport("a", "1", queue_wait_p99_s=wait), float(t))
    assert book.queue_waits(3.0) == {"a": 0.9}
    assert book.queue_waits(11.5) == {"a": 0.3}
    assert book.queue_waits(20.0) == {"a": 0.0}


def test_router_means_weigh_the_time_a_state_lasted():
    book = LoadBook(10.0)
    for t in range(5):
        book.fold(RouterReport("r", "1", running=8, waiting=2, kv_usage=0.5), float(t))
    load = book.routers(4.0)["r"]
    assert (load.running, load.waiting, load.kv_usage) == pytest.approx((8, 2, 0.5))
    book.fold(RouterReport("r", "1"), 5.0)
    assert 0 < book.routers(10.0)["r"].running < book.routers(6.0)["r"].running < 8


def test_how_fast_prompts_come_is_told_by_what_was_computed_and_what_waits():
    book = LoadBook(10.0)
    state = RouterReport("r", "1", prefill_tokens=5000, prefill_s=50.0, pending_tokens=300)
    book.fold(state, 0.0)
    assert book.routers(0.0)["r"].prompt_rate == 0.0  # what was before is of no known time
    for second in range(1, 301):  # 200 come in each, of which 150 are computed
        done = {"prefill_tokens": 5000 + 150 * second, "prefill_s": 50.0 + second}
        state = replace(state, pending_tokens=300 + 50 * second, **done)
        book.fold(state, float(second))
    assert book.routers(300.0)["r"].prompt_rate == pytest.approx(200.0, rel=0.03)
    for second in range(301, 420):
        book.fold(state, float(second))
    assert book.routers(419.0)["r"].prompt_rate < 10
    book.fold(RouterReport("r", "2", prefill_tokens=100, prefill_s=1.0, pending_tokens=20), 420.0)  # started again
    assert book.routers(420.0)["r"].prompt_rate < 15


def test_prompts_that_are_found_in_the_cache_or_given_up_are_no_rush():
    book = LoadBook(10.0)
    book.fold(RouterReport("r", "1"), 0.0)
    for second in range(1, 301):  # of the 1000 that come in each turn, nine in ten are in the cache
        done = {"prefill_tokens": 100 * (second // 2), "prefill_s": 0.1 * second}
        book.fold(RouterReport("r", "1", pending_tokens=1000 * (second % 2), **done), float(second))
    assert 20 < book.routers(300.0)["r"].prompt_rate < 100


def test_the_first_long_prompt_is_no_rush():
    book = LoadBook(10.0)
    book.fold(RouterReport("r", "1"), 0.0)
    book.fold(RouterReport("r", "1", prefill_tokens=1000, prefill_s=1.0, pending_tokens=7000), 1.0)
    assert book.routers(1.0)["r"].prompt_rate < 300


def test_what_a_router_says_of_its_steps_is_that_of_the_last_ones():
    book = LoadBook(10.0)
    base = RouterReport("r", "1", step_s=50.0, expert_s=1.0, decode_tokens=900, decode_s=900.0)
    book.fold(base, 0.0)
    assert book.routers(0.0)["r"].tpot_s == 0.0  # what was before is of no known time
    slow = replace(
        base, step_s=60.0, expert_s=6.0, decode_tokens=940, decode_s=920.0, prefill_tokens=512, prefill_s=2.0
    )
    book.fold(replace(slow, pending_tokens=700), 1.0)
    load = book.routers(1.0)["r"]
    assert (load.tpot_s, load.prefill_rate, load.expert_part, load.pending_tokens) == (0.5, 256.0, 0.5, 700)
    quick = replace(slow, step_s=70.0, expert_s=8.0, decode_tokens=1940, decode_s=1020.0)
    book.fold(quick, 70.0)
    load = book.routers(70.0)["r"]
    assert load.tpot_s == pytest.approx(0.1, rel=0.01)
    assert load.pending_tokens == 0
    book.fold(RouterReport("r", "2", step_s=1.0, expert_s=1.0, decode_tokens=10, decode_s=2.0), 140.0)  # started again
    assert book.routers(140.0)["r"].tpot_s == pytest.approx(0.2, rel=0.01)
    book.fold(RouterReport("r", "2", step_s=1.0, expert_s=1.0, decode_tokens=10, decode_s=2.0), 400.0)
    assert book.routers(400.0)["r"].tpot_s == 0.0  # long idle


def test_idle_counts_from_the_last_row():
    book = LoadBook(10.0)
    assert book.idle_s(5.0) == 0
    book.fold(ExpertReport("a", "1", {A: 0}), 10.0)
    assert book.idle_s(15.0) == 5
    book.fold(ExpertReport("a", "1", {A: 1}), 16.0)
    book.fold(ExpertReport("a", "1", {A: 1}), 20.0)
    assert book.idle_s(21.0) == 5


def test_skew_divides_an_expert_over_its_replicas():
    load = {A: 30.0, B: 10.0}
    alone = Placement(1, {A: ("a",), B: ("b",)})
    assert skew(load, alone) == {0: 1.5}
    assert skew(load, Placement(1, {A: ("a", "b"), B: ("b",)})) == {0: 25 / 20}
    assert skew({}, alone) == {0: 1.0}
    assert skew({A: 40.0, B: 10.0}, alone, {"a": 4.0, "b": 1.0}) == {0: 1.0}
    assert skew({A: 25.0, B: 25.0}, alone, {"a": 4.0, "b": 1.0}) == {0: 2.5}
    shared = Placement(1, {A: ("a", "b"), B: ("b",)})
    assert skew({A: 50.0, B: 0.0}, shared, {"a": 4.0, "b": 1.0}) == {0: 1.0}


def test_the_observed_skew_is_what_actors_served():
    book = LoadBook(10.0)
    steady(book, 20, rate=30, actor="a", expert=A)
    steady(book, 20, rate=10, actor="b", expert=B)
    assert book.skew_observed()[0] == pytest.approx(1.5, rel=0.01)


def test_the_observed_skew_does_not_say_who_reported_last():
    book, moments = LoadBook(10.0), []
    for t in range(30):
        for actor, expert, at in (("a", A, t), ("b", B, t + 0.5)):
            book.fold(ExpertReport(actor, "1", {expert: 10 * t}), at)
            moments.append(book.skew_observed()[0])
    assert moments[4:] == pytest.approx([1.0] * 56)


def test_the_observed_skew_compares_the_same_seconds():
    """All serve the same, which doubles and halves: one has reported of it already, another not yet."""
    book, moments, rows = LoadBook(10.0), [], 0
    for t in range(40):
        rows += 100 if t % 8 < 4 else 50
        for actor, expert, at in (("a", A, t), ("b", B, t + 0.01)):
            book.fold(ExpertReport(actor, "1", {expert: rows}), at)
            moments.append(book.skew_observed()[0])
    assert moments[4:] == pytest.approx([1.0] * 76, abs=0.01)


def test_an_actor_that_is_silent_is_compared_as_it_was():
    book = LoadBook(10.0)
    steady(book, 20, rate=30, actor="a", expert=A)
    steady(book, 40, rate=10, actor="b", expert=B)
    assert book.skew_observed()[0] == pytest.approx(1.5, rel=0.01)


def test_late_requests_are_remembered_for_long_and_their_actors_for_as_long_as_the_steps():
    book = LoadBook(10.0)
    experts = [ExpertReport(f"e{n}", "1", {ExpertId(0, n): 5}) for n in range(3)]
    for report in experts[:2]:
        book.fold(report, 0.0)
    book.fold(RouterReport("r", "1", step_s=5.0, expert_s=2.0, requests=7, late=7), 0.0)  # before it was known
    book.fold(RouterReport("r", "1", step_s=6.0, expert_s=3.0, requests=107, late=9), 1.0)
    load = book.routers(1.0)["r"]
    assert (load.requests, load.late, load.actors) == (100.0, 2.0, 2.0)
    for report in (experts[2], ExpertReport("warm", "1")):  # who has served nothing is behind no wait
        book.fold(report, 1.5)
    book.fold(RouterReport("r", "1", step_s=7.0, expert_s=4.0, requests=107, late=9), 2.0)
    load = book.routers(2.0)["r"]
    assert load.late / load.requests == pytest.approx(0.02)
    assert load.requests == pytest.approx(100 * math.exp(-1 / LATE_S))
    faded = math.exp(-1 / (STEPS * 10.0))
    assert load.actors == pytest.approx((2 * faded + 3) / (faded + 1))
    book.fold(RouterReport("r", "2", requests=4, late=4), 3.0)  # started again
    assert book.routers(3.0)["r"].late == pytest.approx(2 * math.exp(-2 / LATE_S) + 4)
