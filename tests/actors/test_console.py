"""The picture that the live page draws, of a real system; and how often it is drawn."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from moeray.actors.console import KEEP_S, Console, layers
from moeray.control.placement import Placement
from moeray.types import ExpertId
from tests.checkpoints import EXPERTS, make_tiny
from tests.systems import GREEDY24, LocalSystem, tiny_config

A, B, C = ExpertId(2, 0), ExpertId(2, 1), ExpertId(5, 0)


def test_experts_by_layer():
    placement = Placement(1, {C: (), B: ("a", "b"), A: ("a",)})
    assert layers(placement, {B: 3.14159, ExpertId(9, 9): 1.0}) == [
        {"layer": 2, "rates": [0.0, 3.1], "replicas": [1, 2]},
        {"layer": 5, "rates": [0.0], "replicas": [0]},
    ]


def test_many_who_look_at_once_see_one_picture():
    now, drawn = [10.0], []

    def state():
        drawn.append(now[0])
        return {"status": "loading", "detail": len(drawn)}

    console = Console(state, lambda: None, lambda: now[0])
    assert console.look() is console.look()
    now[0] += KEEP_S
    begin, seen = threading.Barrier(8), []

    def look():
        begin.wait(10)
        seen.append(console.look()["detail"])

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == [2] * 8
    assert drawn == [10.0, 10.0 + KEEP_S]


def test_a_running_system_and_its_load(tmp_path):
    model = make_tiny("qwen3_moe", tmp_path / "m")
    config = tiny_config(model, control__audit_log=str(tmp_path / "a.jsonl"), control__report_s=0.1)
    with LocalSystem(config) as system:
        before = system.controller.console()
        assert (before["status"], before["epoch"], before["without_replica"]) == ("ready", 1, 0)
        assert [row["layer"] for row in before["layers"]] == [1, 2]
        assert all(row["replicas"] == [1] * EXPERTS and row["rates"] == [0] * EXPERTS for row in before["layers"])
        assert before["groups"] == [
            {"group": "experts", "wanted": 2, "ready": 2, "reserve": 0, "min": 2, "max": 2},
            {"group": "router", "wanted": 1, "ready": 1, "reserve": 0, "min": 1, "max": 1},
        ]
        assert {row["actor"]: row["state"] for row in before["actors"]} == {
            "experts-0": "ready", "experts-1": "ready", "router-0": "ready"
        }  # fmt: skip
        assert before["decisions"][0]["text"].startswith(("router-0 is ready", "Place the experts"))
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(system.generate, [[5, 9, 33]] * 4, replace(GREEDY24, max_tokens=480))
            after = loaded(system)
            running.result(60)
        assert json.loads(json.dumps(after)) == after
        rate = sum(sum(row["rates"]) for row in after["layers"])
        actors = sum(row["rows_per_s"] for row in after["actors"] if row["kind"] == "expert")
        assert rate > 0
        assert abs(rate - actors) <= 0.05 * (2 * EXPERTS + 2)  # what rounding may take
        assert after["figures"]["generation_tokens_per_s"] > 0
        assert after["figures"]["ttft_p50_s"] > 0


def loaded(system):
    """The first picture with load in it."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        seen = system.controller.console()
        if seen["figures"]["ttft_p50_s"] is not None and any(any(row["rates"]) for row in seen["layers"]):
            return seen
    raise AssertionError(f"no load was seen: {seen}")


def test_a_system_that_ended_says_so(tmp_path):
    with LocalSystem(tiny_config(make_tiny("mixtral", tmp_path / "m"))) as system:
        pass
    assert system.controller.console()["status"] == "stopping"
