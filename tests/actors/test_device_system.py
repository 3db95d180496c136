"""A whole system whose routers and actors share a device's memory: the same tokens, and what it says of itself."""

from __future__ import annotations

import logging

import pytest

import moeray.actors.expert
import moeray.actors.router
from moeray.wire.device_side import device_side
from moeray.wire.host_memory import HostMemory
from tests.checkpoints import make_tiny
from tests.scraping import samples, total
from tests.systems import GREEDY24, LocalSystem, tiny_config, tokens_of

PROMPTS = [[5, 9, 33], list(range(10, 70))]
RING = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("olmoe", tmp_path_factory.mktemp("device") / "m")


def config_of(model):
    return tiny_config(model, experts__actors=2, wire__shared_memory_bytes=RING)


def run(model):
    """The tokens of each prompt, and what /metrics says then."""
    with LocalSystem(config_of(model)) as system:
        outputs = system.generate(PROMPTS, GREEDY24)
        text, _ = system.controller.metrics()
        return [tokens_of(output) for output in outputs], samples(text)


def test_the_tokens_are_the_same_and_the_metrics_say_how_rows_went(model, monkeypatch, caplog):
    wanted, through_host = run(model)
    assert total(through_host, "moeray_dispatch_rows_total", hop="device") == 0
    assert total(through_host, "moeray_device_ring_bytes") == 0
    for room in (moeray.actors.expert, moeray.actors.router):
        monkeypatch.setattr(room, "device_side", lambda device, wire, memory: device_side(device, wire, HostMemory()))
    with caplog.at_level(logging.WARNING):
        got, on_device = run(model)
    assert got == wanted
    assert not caplog.messages
    rows = total(through_host, "moeray_dispatch_rows_total", hop="unix")
    assert rows > 0
    assert total(on_device, "moeray_dispatch_rows_total", hop="device") == rows
    assert total(on_device, "moeray_dispatch_rows_total", hop="unix") == 0
    assert total(on_device, "moeray_device_ring_bytes", kind="router") == 2 * RING  # one for each actor
    assert total(on_device, "moeray_device_ring_bytes", kind="expert") == 2 * RING
