from dataclasses import replace

import pytest

from moeray.cli.options import _keys
from moeray.config import Config, config_from, overlay
from moeray.control.update import Reach, compare, reach, wanted_after

GROUPS = {"groups": [{"name": "a", "actors": 2, "max_actors": 4}, {"name": "b", "actors": 1}]}
BASE = config_from({"model": "m", "experts": GROUPS, "router": {"actors": 2, "max_actors": 3}})


def with_group(**keys):
    """Group `a` with other keys."""
    return {"experts": {"groups": [{**GROUPS["groups"][0], **keys}, GROUPS["groups"][1]]}}


@pytest.mark.parametrize(
    "changes",
    [
        with_group(max_actors=9),
        with_group(min_actors=1),
        with_group(actors=3),
        with_group(price_per_hour=0.2),
        with_group(share=2.0, memory_gib=4.0),
        {"experts": {"replicas": 2}},
        {"router": {"max_actors": 5, "price_per_hour": 3.0}},
        {"control": {"policies": ["idle"], "slo_ttft_s": 2.0, "autoscale": False}},
        {"control": {"schedule": [{"cron": "0 8 * * *", "group": "b", "actors": 1}]}},
        {"serve": {"request_timeout_s": 5.0, "model_name": "other", "api_key": "k", "max_body_bytes": 2048}},
        {"log_format": "json"},
        {"chat_template": "t"},
        {"experts": {"groups": [*GROUPS["groups"], {"name": "c", "device": "cpu"}]}},
        {"experts": {"groups": GROUPS["groups"][:1]}},
        {"wire": {"token": "new"}},
    ],
)
def test_taken_at_once(changes):
    update = compare(BASE, overlay(BASE, changes))
    assert not update.renewed
    assert not update.refused


@pytest.mark.parametrize(
    ("changes", "renewed"),
    [
        (with_group(threads=4), {"a": ("experts.groups.a.threads",)}),
        (
            with_group(resources={"spot": 1.0}, num_cpus=2.0),
            {"a": ("experts.groups.a.num_cpus", "experts.groups.a.resources")},
        ),
        ({"experts": {"quantization": "int8"}}, {"a": ("experts.quantization",), "b": ("experts.quantization",)}),
        ({"engine": {"block_size": 32}}, {"router": ("engine.block_size",)}),
        ({"router": {"threads": 3}}, {"router": ("router.threads",)}),
    ],
)
def test_by_new_actors(changes, renewed):
    update = compare(BASE, overlay(BASE, changes))
    assert update.renewed == renewed
    assert not update.refused


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"model": "other"}, ("model",)),
        ({"dtype": "float32"}, ("dtype",)),
        ({"wire": {"host": "0.0.0.0"}, "engine": {"block_size": 32}}, ("wire.host",)),
        ({"serve": {"name": "second"}}, ("serve.name",)),
        ({"control": {"audit_log": "/tmp/a"}}, ("control.audit_log",)),
    ],
)
def test_needs_another_system(changes, refused):
    assert compare(BASE, overlay(BASE, changes)).refused == refused


def test_the_same_is_no_change_however_it_is_spelt():
    short = config_from({"experts": {"actors": 3, "max_actors": 5, "device": "cpu"}})
    group = {"name": "experts", "actors": 3, "max_actors": 5, "device": "cpu"}
    assert not compare(short, config_from({"experts": {"groups": [group]}})).changed
    assert compare(BASE, overlay(BASE, with_group(max_actors=9))).changed == ("experts.groups.a.max_actors",)


def test_every_key_reaches_somewhere():
    reaches = {key: reach(key) for key, _, _ in _keys(Config) if not key.startswith("experts.")}
    assert set(reaches.values()) == {Reach.CONTROL, Reach.ROUTERS, Reach.SYSTEM}
    with pytest.raises(KeyError):
        reach("elsewhere.key")
    changed = replace(BASE, experts=replace(BASE.experts, kernel="torch", quantization="int8", pin_threads=False))
    assert len(compare(BASE, changed).renewed["b"]) == 3


@pytest.mark.parametrize(
    ("wanted", "changes", "after"),
    [
        ({"a": 4}, {}, {"a": 4}),  # scaled up since: it stays
        ({"a": 4}, with_group(max_actors=3), {"a": 3}),
        ({"a": 2}, with_group(actors=3), {"a": 3}),  # the number at the start is changed: it is meant
        ({"a": 4}, with_group(price_per_hour=2.0), {"a": 4}),
        ({"router": 3}, {"router": {"max_actors": 2}}, {"router": 2}),
        ({}, {"experts": {"groups": [{"name": "c", "actors": 5}]}}, {"c": 5}),
    ],
)
def test_how_many_are_wanted_afterwards(wanted, changes, after):
    counts = wanted_after({"a": 2, "b": 1, "router": 2} | wanted, BASE, overlay(BASE, changes))
    assert {name: counts[name] for name in after} == after
    groups = changes.get("experts", {}).get("groups", GROUPS["groups"])
    assert set(counts) == {group["name"] for group in groups} | {"router"}
