"""What a whole system says of itself at /metrics, through losses, drains and another controller."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from moeray.actors.accounts import Accounts
from moeray.actors.controller import Controller
from moeray.actors.controller_metrics import ControllerMetrics
from moeray.actors.expert_load import EXPERT_LOAD
from moeray.actors.roster import Roster
from moeray.control.ledger import merge
from moeray.errors import NotReadyError
from moeray.metrics import METRICS
from moeray.recorder import Reading
from moeray.settings.metrics import MetricsConfig
from tests.actors.test_controller import config_of, settled, until
from tests.checkpoints import make_tiny
from tests.scraping import fallen, lasting, samples, total
from tests.systems import GREEDY24, LocalSystem, tiny_config

PROMPTS = [[5, 9, 33], list(range(10, 70))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("olmoe", tmp_path_factory.mktemp("metrics") / "m")


def scrape(system):
    text, _ = system.controller.metrics()
    return text


def test_every_metric_of_the_table_is_filled(model, tmp_path):
    config = config_of(model, tmp_path, serve__model_name="tiny", control__slo_ttft_s=60.0, control__slo_tpot_s=1e-9)
    with LocalSystem(config) as system:
        system.generate(PROMPTS, GREEDY24)
        system.controller.hear(Reading("ingress-1", "1", 1.0, {"moeray_requests_moved_total": {(): 2}}, guest=True))
        until(system.controller, lambda status: status["skew"])
        found = samples(scrape(system))
        rows = sum(count for _, _, count in system.controller.load())
    names = {name.removesuffix("_bucket") for name, _ in found}
    assert names >= METRICS.keys() - {"moeray_http_requests_total", "moeray_http_request_duration_seconds"}
    assert total(found, "moeray_request_success_total", model_name="tiny", finished_reason="length") == 2
    assert total(found, "moeray_request_success_total", finished_reason="error") == 0
    assert total(found, "moeray_generation_tokens_total") == 48
    assert total(found, "moeray_prompt_tokens_total") == 63
    assert total(found, "moeray_time_to_first_token_seconds_count") == 2
    assert total(found, "moeray_request_queue_time_seconds_count") == 2
    assert total(found, "moeray_time_per_output_token_seconds_count") == 46
    assert total(found, "moeray_request_prompt_tokens_sum") == 63
    assert total(found, "moeray_request_generation_tokens_sum") == 48
    assert total(found, "moeray_slo_requests_total") == total(found, "moeray_slo_late_requests_total") == 2
    assert total(found, "moeray_slo_objective_seconds", objective="ttft") == 60
    assert total(found, "moeray_dispatch_rows_total", hop="unix") == rows
    assert total(found, "moeray_dispatch_bytes_total", hop="unix", direction="received") == rows * 64 * 4
    assert total(found, "moeray_expert_rows_total") == total(found, "moeray_expert_batch_rows_sum") == rows
    assert total(found, "moeray_expert_forwards_total") == total(found, "moeray_expert_queue_wait_seconds_count") > 0
    assert total(found, "moeray_combine_seconds_count") >= 2 * total(found, "moeray_step_seconds_count") > 0
    assert total(found, "moeray_actors", kind="expert", group="experts", state="ready") == 2
    assert total(found, "moeray_actors", state="draining") == 0
    assert total(found, "moeray_actors_desired", group="router") == 1
    assert total(found, "moeray_plans_total", kind="first", result="done") == 1
    assert total(found, "moeray_plans_total", kind="repair") == 0
    assert total(found, "moeray_requests_moved_total") == 2
    assert total(found, "moeray_actor_cost_total") == pytest.approx(total(found, "moeray_actor_seconds_total") / 3600)
    assert total(found, "moeray_info", model_name="tiny") == 1


def test_no_counter_falls_when_actors_are_lost_and_replaced(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path, experts__replicas=2)) as system:
        system.generate(PROMPTS, GREEDY24)
        before = scrape(system)
        for victim in ("experts-0", "router-0"):
            system.handle(victim).call("stop").result(10)
            until(system.controller, lambda s, v=victim: settled(s) and v not in {r["actor"] for r in s["actors"]})
            assert fallen(lasting(before), lasting(scrape(system))) == {}
        until(system.controller, lambda _: system.controller.state()["info"].routers)
        system.info = system.controller.state()["info"]
        system.generate(PROMPTS, GREEDY24)
        found = samples(scrape(system))
    assert total(found, "moeray_request_success_total", finished_reason="length") == 4
    assert total(found, "moeray_generation_tokens_total") == 96
    assert total(found, "moeray_actor_losses_total", group="experts", reason="closed") == 1
    assert total(found, "moeray_actor_losses_total", group="router") == 1
    assert total(found, "moeray_expert_rows_total", actor="experts-0") > 0  # it stays for a while
    gauges = {name for name, spec in METRICS.items() if spec.kind == "gauge"}
    living = {dict(labels).get("actor") for name, labels in found if name in gauges}
    assert living == {None, "experts-1", "experts-2", "router-1"}


def test_an_actor_that_drains_leaves_all_that_it_counted(model, tmp_path):
    with LocalSystem(config_of(model, tmp_path, experts__max_actors=3)) as system:
        system.generate(PROMPTS, GREEDY24)
        for actor in ("experts-0", "router-0"):
            system.controller.commands.drain([actor])
            until(system.controller, lambda s, a=actor: settled(s) and a not in {r["actor"] for r in s["actors"]})
        system.controller.commands.scale({"experts": 3})
        found = samples(scrape(system))
    assert total(found, "moeray_generation_tokens_total") == 48
    assert total(found, "moeray_request_success_total", finished_reason="length") == 2
    assert total(found, "moeray_dispatch_rows_total") == total(found, "moeray_expert_batch_rows_sum")
    assert total(found, EXPERT_LOAD) == total(found, "moeray_dispatch_rows_total")
    assert total(found, "moeray_actor_losses_total") == 0
    assert total(found, "moeray_decisions_total", group="experts", direction="up") == 1
    assert total(found, "moeray_migrations_total", change="mapped") > 0


def test_the_next_controller_goes_on_from_what_was_served(model, tmp_path):
    config = config_of(model, tmp_path, experts__replicas=2)
    with LocalSystem(config) as system:
        system.generate(PROMPTS, GREEDY24)
        victim = system.handle("experts-0")
        victim.call("stop").result(10)
        until(system.controller, lambda s: settled(s) and "experts-0" not in {r["actor"] for r in s["actors"]})
        endpoint = Reading("ingress-1", "1", 1.0, {"moeray_requests_moved_total": {(): 3}}, guest=True)
        system.controller.hear(endpoint)
        before = scrape(system)
        system.controller.abandon()
        with pytest.raises(NotReadyError):
            system.controller.metrics()
        system.generate(PROMPTS, GREEDY24)
        system.handle("router-0").call("stop").result(10)  # nobody sees it die, and what it counted last
        with pytest.raises(NotReadyError):
            Controller(config, system.cluster).metrics()
        system.take_over()
        system.controller.hear(endpoint)
        after = scrape(system)
        assert fallen(lasting(before), lasting(after)) == {}
        system.generate(PROMPTS, GREEDY24)
        found = samples(scrape(system))
    assert total(found, "moeray_requests_moved_total") == 3
    assert total(found, "moeray_actor_losses_total", group="experts") == 1
    assert total(found, "moeray_plans_total", kind="first") == 1
    assert total(found, "moeray_request_success_total", finished_reason="length") == 4  # two died with their router


EXPERTS = {0: 4, 1: 4}


def accounts(config):
    return Accounts(config, Roster(), ControllerMetrics(tiny_config("m")), EXPERTS, None)


@pytest.mark.parametrize(
    ("config", "series", "warnings"),
    [
        (MetricsConfig(), {(str(layer), str(e)) for layer in EXPERTS for e in range(4)}, 0),
        (MetricsConfig(max_expert_series=8), {(str(layer), str(e)) for layer in EXPERTS for e in range(4)}, 0),
        (MetricsConfig(max_expert_series=7), {("0", "all"), ("1", "all")}, 1),
        (MetricsConfig(expert_load=False), None, 0),
        (MetricsConfig(expert_load=False, max_expert_series=0), None, 0),
    ],
)
def test_the_load_of_experts_is_bounded(config, series, warnings, caplog):
    with caplog.at_level(logging.WARNING):
        parts, _, _ = accounts(config).statement([], STANDING, [])
    assert merge(parts).get(EXPERT_LOAD, {}).keys() == (series or set())
    assert len(caplog.records) == warnings


STANDING = {
    "wanted": {"experts": 2, "router": 1}, "skew": {}, "epoch": 1, "replicas": 8, "without_replica": 0,
    "without_spare": 8, "autoscaling": True,
}  # fmt: skip


def test_load_over_the_bound_is_counted_by_layer(model):
    config = tiny_config(model)
    config = replace(config, metrics=MetricsConfig(max_expert_series=1))
    with LocalSystem(config) as system:
        system.generate(PROMPTS, GREEDY24)
        until(system.controller, lambda s: total(samples(scrape(system)), EXPERT_LOAD, expert="all") > 0)
        found = samples(scrape(system))
    assert {dict(labels)["expert"] for name, labels in found if name == EXPERT_LOAD} == {"all"}


def test_nothing_is_said_of_spares_before_there_is_a_placement():
    metrics = ControllerMetrics(tiny_config("m"))
    metrics.stand(STANDING | {"epoch": 0, "replicas": 0, "without_spare": 0}, [], [])
    before = metrics.reading().values
    assert before.keys() & {"moeray_experts_without_spare", "moeray_placement_epoch", "moeray_replicas"} == set()
    assert before["moeray_autoscaling_enabled"] == {(): 1}
    metrics.stand(STANDING, [], [])
    assert metrics.reading().values["moeray_experts_without_spare"] == {(): 8}
    metrics.stand(STANDING | {"epoch": 2, "replicas": 0, "without_replica": 8}, [], [])  # all actors are lost
    after = metrics.reading().values
    assert (after["moeray_replicas"], after["moeray_experts_without_replica"]) == ({(): 0}, {(): 8})


def test_an_objective_that_is_withdrawn_is_told_no_more():
    metrics = ControllerMetrics(tiny_config("m", control__slo_ttft_s=5.0))
    name = "moeray_slo_objective_seconds"
    assert metrics.reading().values[name] == {("ttft",): 5.0, ("queue_wait",): 0.25}
    metrics.configure(tiny_config("m", control__slo_tpot_s=0.2))
    assert metrics.reading().values[name] == {("tpot",): 0.2, ("queue_wait",): 0.25}
