"""Another config for a system that runs: what it takes at once, by new actors, and not at all."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from moeray.actors.controller import Controller
from moeray.config import overlay
from moeray.errors import ConfigError
from tests.actors.test_controller import audit, config_of, settled, tokens, until
from tests.checkpoints import make_tiny
from tests.systems import GREEDY24, LocalSystem, tiny_config, tokens_of

_dates = itertools.count(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("configure") / "m")


@pytest.fixture(scope="module")
def expected(model):
    with LocalSystem(tiny_config(model)) as system:
        return tokens(system)


def configure(system, changes, since=None):
    system.config = overlay(system.config, changes)
    return system.controller.configure(system.config, next(_dates) if since is None else since)


def names(status):
    return {row["actor"] for row in status["actors"]}


def test_limits_change_in_place(model, expected, tmp_path):
    with LocalSystem(config_of(model, tmp_path)) as system:
        before = until(system.controller, settled)
        assert before["limits"] == {"experts": [2, 2], "router": [1, 1]}
        assert configure(system, {"experts": {"max_actors": 4, "min_actors": 1}})
        wider = until(system.controller, settled)
        assert wider["limits"]["experts"] == [1, 4]
        assert wider["wanted"] == before["wanted"]
        assert names(wider) == names(before)
        assert configure(system, {"experts": {"actors": 3}})
        grown = until(system.controller, lambda s: settled(s) and s["wanted"]["experts"] == 3)
        assert names(grown) - names(before) == {"experts-2"}
        assert tokens(system) == expected
        assert configure(system, {"experts": {"actors": 1, "max_actors": 1}})
        small = until(system.controller, lambda s: settled(s) and s["ready"]["experts"] == 1)
        assert names(small) < names(grown)
        assert tokens(system) == expected
    written = [entry for entry in audit(tmp_path) if entry["event"] == "config"]
    assert written[0]["changed"] == ["experts.groups.experts.max_actors", "experts.groups.experts.min_actors"]
    assert not any(entry["renewed"] for entry in written)


def test_an_older_config_changes_nothing(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path)) as system:
        assert configure(system, {"experts": {"max_actors": 4}}, since=1e12)
        assert not configure(system, {"experts": {"max_actors": 9}}, since=1e12 - 1)
        assert not configure(system, {"experts": {"max_actors": 9}}, since=0.0)
        assert system.controller.status()["limits"]["experts"] == [2, 4]


def test_objectives_policies_and_autoscaling_hold_at_once(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path)) as system:
        control = {"autoscale": False, "slo_ttft_s": 3.0, "window_s": 5.0, "shrink_votes": 3, "orphan_s": 900.0}
        configure(system, {"control": {**control, "policies": ["idle"]}})
        assert system.controller.status()["autoscaling"] is False
        assert system.controller.commands.plan()["shrink_votes"] == 3
        assert system.handle("router-0").call("describe").result(10)["config"]["control"]["slo_ttft_s"] == 3.0
        with pytest.raises(ConfigError, match="nearest"):
            configure(system, {"control": {"policies": ["idel"], "shrink_votes": 4}})
        assert system.controller.commands.plan()["shrink_votes"] == 3


def test_what_needs_another_system_is_refused_and_changes_nothing(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path)) as system:
        with pytest.raises(ConfigError, match=r"cannot change dtype, wire\.host; .* serve\.name"):
            configure(system, {"dtype": "bfloat16", "wire": {"host": "::1"}, "experts": {"max_actors": 9}})
        assert system.controller.status()["limits"]["experts"] == [2, 2]
        with pytest.raises(ConfigError, match=r"wire\.token"):
            system.controller.configure(tiny_config(model, wire__token="another"), next(_dates))
        system.controller.commands.refuse("no such key")
        assert system.controller.status()["decisions"][-1]["event"] == "config_refused"


@pytest.mark.slow
def test_actors_are_renewed_one_after_the_other_under_load(model, tmp_path):
    """Every kind of actor, while requests run: none fails, and each has the tokens that it has without a change."""
    long = replace(GREEDY24, max_tokens=300)
    prompts = [[5 + i, 9, 33] for i in range(6)]
    with LocalSystem(config_of(model, tmp_path)) as system:
        alone = [tokens_of(outputs) for outputs in system.generate(prompts, long)]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(system.generate, prompts, long)
            until(system.controller, lambda s: any(row["kind"] == "router" and row["running"] for row in s["actors"]))
            changes = {"experts": {"kernel": "torch"}, "engine": {"prefill_chunk": 64}, "router": {"max_actors": 2}}
            assert configure(system, changes)
            assert system.controller.status()["outdated"] == ["experts-0", "experts-1", "router-0"]
            assert [tokens_of(outputs) for outputs in answer.result(120)] == alone
        status = until(system.controller, lambda s: settled(s) and not s["outdated"])
        assert names(status) == {"experts-2", "experts-3", "router-1"}
        system.info = system.controller.state()["info"]
        assert [tokens_of(outputs) for outputs in system.generate(prompts, long)] == alone
    assert "lost" not in [entry["event"] for entry in audit(tmp_path)]


def test_groups_come_and_go(model, expected, tmp_path):
    with LocalSystem(config_of(model, tmp_path)) as system:
        other = {"name": "other", "actors": 2, "device": "cpu"}
        configure(system, {"experts": {"groups": [{"name": "experts", "actors": 2}, other]}})
        both = until(system.controller, lambda s: settled(s) and s["ready"].get("other") == 2)
        assert both["wanted"] == {"experts": 2, "other": 2, "router": 1}
        assert tokens(system) == expected
        configure(system, {"experts": {"groups": [other]}})
        left = until(system.controller, lambda s: settled(s) and len(s["actors"]) == 3)
        assert names(left) == {"other-0", "other-1", "router-0"}
        assert tokens(system) == expected


def test_the_next_controller_goes_on_with_the_newest_config(model, expected, tmp_path):
    config = config_of(model, tmp_path)
    with LocalSystem(config) as system:
        configure(system, {"experts": {"groups": [{"name": "experts", "actors": 2}, {"name": "late", "actors": 1}]}})
        before = until(system.controller, lambda s: settled(s) and s["ready"].get("late") == 1)
        system.controller.abandon()
        system.controller = Controller(config, system.cluster)  # Ray starts it again as it was first made
        system.controller.start()
        after = until(system.controller, settled)
        assert after["limits"] == before["limits"]
        assert names(after) == names(before)
        assert tokens(system) == expected
