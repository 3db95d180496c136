"""The endpoint's follower of the controller: what ends it, and what it waits out."""

from __future__ import annotations

import asyncio

from moeray.actors.spec import SystemInfo
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
        backend = SystemBackend(tiny_config(model), controller, "here")
        backend.start()
        assert (await backend.ready(60)).max_context == 512
        await backend.close()

    asyncio.run(follow())
    assert caplog.text.count("the controller could not be asked") == 2
    assert "can't start new thread" in caplog.text
