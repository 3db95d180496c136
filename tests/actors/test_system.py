"""Whole systems in one process: replicas, losses, and starts that cannot work."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from moeray.actors.client import RouterClient
from moeray.actors.controller import Controller
from moeray.actors.spec import model_fingerprint
from moeray.cluster.local import NODE, LocalCluster
from moeray.errors import AuthenticationError, MoerayError, PlacementError, RequestError, RouterLostError
from moeray.types import GenerationRequest, SamplingParams
from moeray.wire.channel import connect
from moeray.wire.identity import Identity
from tests.checkpoints import make_tiny
from tests.systems import GREEDY24, LocalSystem, tiny_config, tokens_of

PROMPTS = [[5, 9, 33], list(range(10, 70)), [8] * 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("deepseek_v3", tmp_path_factory.mktemp("actors") / "m")


@pytest.fixture(scope="module")
def expected(model):
    with LocalSystem(tiny_config(model)) as system:
        return [tokens_of(outputs) for outputs in system.generate(PROMPTS, GREEDY24)]


@pytest.mark.parametrize(("actors", "replicas"), [(1, 1), (3, 1), (3, 2), (2, 2)])
def test_no_placement_changes_a_token(model, expected, actors, replicas):
    config = tiny_config(model, experts__actors=actors, experts__replicas=replicas)
    with LocalSystem(config) as system:
        assert [tokens_of(outputs) for outputs in system.generate(PROMPTS, GREEDY24)] == expected


def test_the_loss_of_an_actor_changes_no_token(model, expected):
    with LocalSystem(tiny_config(model, experts__actors=2, experts__replicas=2)) as system:
        victim = system.handle("experts-0")
        served = threading.Event()

        def kill_once_it_serves():
            while not victim.call("load").result(10):
                pass
            served.set()
            victim.call("stop").result(10)

        killer = threading.Thread(target=kill_once_it_serves)
        killer.start()
        outputs = system.generate(PROMPTS, GREEDY24)
        killer.join(30)
        assert served.is_set()
        assert [tokens_of(o) for o in outputs] == expected


def test_experts_without_a_replica_come_back_on_another_actor(model, expected):
    with LocalSystem(tiny_config(model, experts__actors=2)) as system:
        system.handle("experts-0").call("stop").result(10)
        outputs = system.generate(PROMPTS, GREEDY24)
    assert [tokens_of(o) for o in outputs] == expected


@pytest.fixture
def runtime(monkeypatch):
    """A folder for sockets, which want a short path."""
    with TemporaryDirectory(prefix="moeray-") as base:
        monkeypatch.setenv("MOERAY_RUNTIME_DIR", base)
        yield Path(base)


def test_actors_can_be_reached_again_after_somebody_removed_their_sockets(model, expected, runtime):
    with LocalSystem(tiny_config(model, experts__actors=2)) as system:
        shutil.rmtree(runtime)
        system.handle("experts-0").call("stop").result(10)
        system.controller.status()
        assert [tokens_of(outputs) for outputs in system.generate(PROMPTS, GREEDY24)] == expected
    assert not list(runtime.rglob("*.sock"))


def test_actors_whose_sockets_are_gone_for_good_are_replaced(model, expected, runtime, monkeypatch):
    """As after the last logout of a user whose session's folder they were in."""
    with LocalSystem(tiny_config(model, experts__actors=2)) as system:
        before = {handle.actor_id for handle in system.cluster.find()}
        shutil.rmtree(runtime)
        runtime.write_text("nobody makes a folder here")
        with TemporaryDirectory(prefix="moeray-") as another:
            monkeypatch.setenv("MOERAY_RUNTIME_DIR", another)
            end = time.monotonic() + 60.0
            while before & {row["actor"] for row in system.controller.status()["actors"]}:
                assert time.monotonic() < end
            system.info = system.controller.state()["info"]
            assert [tokens_of(outputs) for outputs in system.generate(PROMPTS, GREEDY24)] == expected
            system.controller.stop()
        runtime.unlink()
        runtime.mkdir()


def test_a_request_that_cannot_be_served_is_refused_and_others_go_on(model, expected):
    with LocalSystem(tiny_config(model)) as system:
        with pytest.raises(RequestError, match="context"):
            system.generate([[1] * 600], GREEDY24)
        assert tokens_of(system.generate(PROMPTS[:1], GREEDY24)[0]) == expected[0]


def test_a_client_learns_that_its_router_is_gone(model):
    system = LocalSystem(tiny_config(model)).__enter__()

    async def run():
        identity = Identity("test", NODE, model_fingerprint(system.config), system.info.token)
        client = RouterClient(system.info.routers[0], identity, system.config.wire)
        request = GenerationRequest("x", (1, 2), SamplingParams(max_tokens=400, temperature=0, ignore_eos=True))
        stream = client.generate(request)
        await anext(stream)
        stopper = asyncio.create_task(asyncio.to_thread(system.controller.stop))
        with pytest.raises(RouterLostError, match="router-0"):
            async for _ in stream:
                pass
        await stopper
        await client.close()

    asyncio.run(run())


def test_a_stranger_is_not_served(model):
    with LocalSystem(tiny_config(model)) as system:
        stranger = Identity("x", NODE, model_fingerprint(system.config), b"another token")
        with pytest.raises(AuthenticationError):
            connect(system.info.routers[0], stranger, system.config.wire, timeout=5.0)


def start_error(config):
    with pytest.raises(MoerayError) as error:
        Controller(config, LocalCluster()).start()
    assert "\n" not in str(error.value)
    return error


def test_more_memory_than_there_is(model):
    error = start_error(tiny_config(model, experts__memory_gib=0.00001))
    assert error.type is PlacementError
    assert "GiB" in str(error.value)


def test_a_folder_that_is_not_there():
    assert "absent" in str(start_error(tiny_config("/absent/model")).value)


def test_a_truncated_file(model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        data = path.read_bytes()
        (copy / path.name).write_bytes(data[:-1000] if path.suffix == ".safetensors" else data)
    assert "model.safetensors" in str(start_error(tiny_config(copy)).value)


def test_nothing_is_left_behind(model):
    before = set(threading.enumerate())
    with LocalSystem(tiny_config(model, wire__remote="tcp")) as system:
        system.generate(PROMPTS[:1], GREEDY24)
    left = {t.name for t in threading.enumerate()} - {t.name for t in before}
    assert not {name for name in left if not name.startswith(("asyncio", "Thread-auto_conversion"))}
