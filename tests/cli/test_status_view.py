"""The table of `moeray status`: rates of two readings, and what fits on a small terminal."""

import io

import pytest
from rich.console import Console

from moeray.cli.status_view import view, with_rates, without_answer

EXPERT = {
    "actor": "experts-12", "kind": "expert", "device": "cuda:0", "node": "8d7f076c43b69987", "pid": 123456,
    "state": "draining", "experts": 1024, "queue": 12, "rows_total": 1000, "busy_s": 10.0, "rows_per_s": 0.0,
}  # fmt: skip
ROUTER = {
    "actor": "router-0", "kind": "router", "device": "cpu", "node": "8d7f076c43b69987", "pid": 7, "state": "ready",
    "queue": 3, "generation_tokens": 50, "epoch": 3,
}  # fmt: skip
STATUS = {"at": 100.0, "model": "tiny", "status": "ready", "detail": "ready", "epoch": 3, "actors": [EXPERT, ROUTER]}


def later(**changes):
    return {**STATUS, "at": 102.0, "actors": [EXPERT | changes, ROUTER | {"generation_tokens": 75}]}


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"rows_total": 1500, "busy_s": 11.0}, (250.0, 0.5)),
        ({}, (0.0, 0.0)),
        ({"rows_total": 3, "busy_s": 0.1}, (0.0, 0.0)),  # never below nothing
        ({"pid": 99, "rows_total": 3}, (0.0, None)),  # another process of that name: what the controller says
    ],
)
def test_rates_are_the_growth_of_counters(changes, rates):
    expert, router = with_rates(later(**changes), STATUS)["actors"]
    assert (expert["rows_per_s"], expert.get("busy")) == rates
    assert router["tokens_per_s"] == 12.5


def test_the_first_reading_has_no_rates_of_ours():
    assert with_rates(STATUS, None)["actors"] == [EXPERT, ROUTER]


def shown(renderable, width=80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


def test_a_terminal_of_80_columns_shows_it_all():
    text = shown(view(with_rates(later(rows_total=30_000, busy_s=11.9), STATUS)))
    assert "tiny: ready, epoch 3" in text
    assert "…" not in text
    words = text.splitlines()[2].split()
    assert words == ["experts-12", "cuda:0", "8d7f076c", "123456", "draining", "1024", "14500", "95%", "12"]
    assert text.splitlines()[3].split() == ["router-0", "cpu", "8d7f076c", "7", "ready", "12.5", "3"]


def test_a_router_that_is_behind_says_so():
    behind = {**STATUS, "epoch": 4}
    assert "ready (epoch 3)" in shown(view(behind), width=100)


def test_what_loads_says_how_far_it_is():
    loading = {**STATUS, "status": "loading", "detail": "loading experts 3/8", "actors": []}
    assert "loading (loading experts 3/8)" in shown(view(loading))


def test_without_an_answer_the_last_one_stays():
    missing = {"at": 105.0, "error": "the controller has not answered for 10 s; ask again"}
    text = shown(without_answer(missing, STATUS))
    assert missing["error"] in text
    assert "as it was 5 s ago" in text
    assert "experts-12" in text
    assert missing["error"] in shown(without_answer(missing, None))


def test_an_actor_without_a_process_is_named_with_what_helps():
    waiting = ROUTER | {"actor": "router-1", "state": "pending"}
    text = " ".join(shown(view({**STATUS, "actors": [EXPERT, waiting]})).split())
    assert "no process yet for router-1: where `ray status` shows a demand without room, add a node" in text
    assert "no process yet" not in shown(view(STATUS))
