"""Routers that are lost or full for longer than usual, behind a client that does as the test says."""

from __future__ import annotations

import asyncio

import pytest

from moeray.errors import QueueFullError, RouterLostError
from moeray.recorder import Recorder
from moeray.serve import pool as module
from moeray.serve.pool import RouterPool
from moeray.types import Address, GenerationRequest, SamplingParams

ADDRESS = Address("router-0", "here", None)
REQUEST = GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=4))


class Client:
    """A router that is full, and that cannot be reached for so many times, by whatever error."""

    address = ADDRESS

    def __init__(self, unreachable: int = 0, error: Exception | None = None) -> None:
        self.unreachable = unreachable
        self.error = error or RouterLostError("nobody listens")
        self.asked = 0
        self.told: list[float] = []

    async def generate(self, request):
        self.asked += 1
        self.told.append(request.timeout_s)
        raise QueueFullError("the queue is full", retry_after_s=0.01)
        yield

    async def open(self):
        if self.unreachable:
            self.unreachable -= 1
            raise self.error

    async def close(self):
        """Nothing is open."""


def test_a_request_that_had_begun_waits_for_a_full_router_until_its_deadline_and_no_longer():
    async def ask():
        client = Client()
        pool = RouterPool(lambda address, on_loss: client, 0.2, Recorder())
        pool.follow([ADDRESS])
        begun = GenerationRequest("r", REQUEST.prompt_ids, REQUEST.sampling, output_ids=(7,), attempt=1)
        with pytest.raises(RouterLostError, match="no router has taken the request"):
            await asyncio.wait_for(anext(pool.generate(begun)), 20)
        assert client.asked > 1
        assert 0.2 > client.told[0] > client.told[-1] >= 0.0  # what is left of its time, less some for the last word
        await pool.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("times", "error"), [(1100, RouterLostError("nobody listens")), (3, RuntimeError("can't start new thread"))]
)
def test_a_router_that_was_out_of_reach_for_very_long_is_used_again(monkeypatch, times, error):
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.0)

    async def wait():
        losses = []
        pool = RouterPool(lambda address, on_loss: losses.append(on_loss) or Client(times, error), 1.0, Recorder())
        pool.follow([ADDRESS])
        losses[0]()
        assert not pool.usable
        async with asyncio.timeout(30):
            while not pool.usable:
                await asyncio.sleep(0)
        await pool.close()

    asyncio.run(wait())
