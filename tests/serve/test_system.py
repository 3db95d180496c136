"""The endpoint's follower of the controller: what ends it, and what it waits out."""

from __future__ import annotations

import asyncio

import pytest

from moeray.actors.spec import SystemInfo
from moeray.config import load_config
from moeray.errors import ConfigError, MoerayError
from moeray.serve import system
from moeray.serve.ray_port import RayPort
from moeray.serve.system import SystemBackend
from tests.checkpoints import make_tiny
from tests.systems import tiny_config


class Controller:
    """A system that is ready, and how often it was asked. `faults` are raised first."""

    def __init__(self, model, faults=()):
        self.asked = asyncio.Event()
        self.faults = list(faults)
        self.info = SystemInfo(str(model), None, b"token", "system", (), 512, 320, ())

    async def renew(self, reading):
        self.asked.set()
        if self.faults:
            raise self.faults.pop(0)
        return {"status": "ready", "detail": "ready", "info": self.info}


def test_a_model_that_cannot_be_read_yet_where_the_endpoint_runs(tmp_path):
    model = tmp_path / "m"
    controller = Controller(model)

    async def follow():
        backend = SystemBackend(tiny_config(model), controller, "here")
        backend.start()
        for _ in range(2):
            controller.asked.clear()
            await asyncio.wait_for(controller.asked.wait(), 30)
        assert backend.state.status == "loading"
        assert str(model) in backend.state.detail
        await asyncio.to_thread(make_tiny, "olmoe", model)
        assert (await backend.ready(60)).max_context == 512
        await backend.close()

    asyncio.run(follow())


def test_nothing_that_goes_wrong_ends_the_follower(tmp_path, caplog):
    model = make_tiny("olmoe", tmp_path / "m")
    controller = Controller(model, [RuntimeError("can't start new thread"), KeyError("info")])

    async def follow():
        room = {"engine__max_running": 3, "engine__max_waiting": 4, "router__max_actors": 2}
        backend = SystemBackend(tiny_config(model, **room), controller, "here")
        backend.start()
        described = await backend.ready(60)
        assert (described.max_context, described.max_sequences) == (512, 14)
        backend.configure(tiny_config(model, **room | {"router__max_actors": 4}))
        assert backend.model.max_sequences == 28
        assert backend.model.name == described.name
        await backend.close()

    asyncio.run(follow())
    assert caplog.text.count("the controller could not be asked") == 2
    assert "can't start new thread" in caplog.text


def test_a_system_that_could_not_start_is_followed_once_another_config_mends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "RENEW_S", 0.05)
    model = make_tiny("olmoe", tmp_path / "m")
    controller = Controller(model, [MoerayError("no room")])

    async def follow():
        backend = SystemBackend(tiny_config(model), controller, "here")
        controller.faults *= 3
        backend.start()
        with pytest.raises(MoerayError, match="no room"):
            await backend.ready(60)
        while backend.model is None:
            controller.asked.clear()
            await asyncio.wait_for(controller.asked.wait(), 30)
        assert backend.state.status == "waiting"  # for a router
        await backend.close()

    asyncio.run(follow())


class Port(RayPort):
    """Answers each offer when the test says so; it refuses `refused`."""

    def __init__(self, config, refused):
        super().__init__(config, 1.0)
        self.refused = refused
        self.asked = asyncio.Queue()

    async def _ask(self, method, config, since, reading, timeout):
        answer = asyncio.Event()
        self.asked.put_nowait((config, answer))
        await answer.wait()
        if config == self.refused:
            raise ConfigError("it needs another system")
        return {"status": "ready", "detail": "ready", "info": None}


@pytest.mark.parametrize("first", ["old", "new"])
def test_a_config_that_is_refused_is_not_offered_again_whoever_asked_meanwhile(first):
    old, new = (load_config(None, {"model": "/m", "experts.replicas": replicas}) for replicas in (1, 2))

    async def follow():
        port = Port(old, new)
        renewal = asyncio.create_task(port.renew(None))
        _, answer_old = await port.asked.get()
        change = asyncio.create_task(port.configure(new, 2.0, None))
        offered, answer_new = await port.asked.get()
        assert offered == new
        for answer, task in ((answer_old, renewal), (answer_new, change))[:: 1 if first == "old" else -1]:
            answer.set()
            await asyncio.wait([task])
        assert isinstance(change.exception(), ConfigError)
        again = asyncio.create_task(port.renew(None))
        offered, answer = await port.asked.get()
        answer.set()
        await again
        assert offered == old

    asyncio.run(follow())
