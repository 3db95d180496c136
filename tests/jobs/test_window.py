"""How many sequences are in flight beside routers that take what they can."""

from __future__ import annotations

import asyncio

import pytest

from moeray.errors import QueueFullError
from moeray.jobs.window import Window


class Routers:
    """Queue up to `capacity` sequences, and refuse more; `step` answers the oldest."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.queue = []
        self.refusals = 0
        self.most = 0

    async def ask(self, count):
        if sum(c for c, _ in self.queue) + count > self.capacity:
            self.refusals += 1
            raise QueueFullError("full", retry_after_s=0.01)
        turn = asyncio.get_running_loop().create_future()
        self.queue.append((count, turn))
        self.most = max(self.most, sum(c for c, _ in self.queue))
        await turn

    def step(self):
        if self.queue and not (turn := self.queue.pop(0)[1]).done():
            turn.set_result(None)


async def send(window, routers, count=1):
    while True:
        try:
            async with window.room(count):
                await routers.ask(count)
                return
        except QueueFullError:
            continue


async def settle(turns=20):
    for _ in range(turns):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("most", "capacity", "counts"),
    [(8, 100, [1] * 50), (100, 8, [1] * 300), (100, 1, [1] * 30), (10, 10, [3, 4, 5] * 20), (4, 100, [9, 1, 1, 9])],
)
def test_all_come_through_and_few_are_refused(most, capacity, counts):
    async def run():
        window, routers = Window(most), Routers(capacity)
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(send(window, routers, count)) for count in counts]
            while not all(task.done() for task in waiting):
                await settle()
                routers.step()
        assert window.in_flight == 0
        return routers

    routers = asyncio.run(run())
    assert routers.refusals <= min(most, len(counts)) + len(counts)
    if capacity >= most:
        assert routers.refusals == 0
        assert routers.most <= max(most, *counts)
    else:
        assert routers.most == capacity  # they are kept full


def test_the_window_follows_routers_that_grow():
    async def run():
        window, routers = Window(50), Routers(4)
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(send(window, routers)) for _ in range(400)]
            for _ in range(40):
                await settle()
                routers.step()
            assert window.size <= 5
            routers.capacity = 50
            while not all(task.done() for task in waiting):
                await settle()
                routers.step()
        return routers

    assert asyncio.run(run()).most == 50


def test_routers_that_others_fill_are_asked_at_their_pace():
    async def run():
        window, routers = Window(50), Routers(0)
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for _ in range(20):
                tasks.create_task(send(window, routers))
            await settle(200)
            assert (routers.refusals, window.size) == (1, 1)  # all others wait for the pause
            routers.capacity = 20
            while routers.most == 0:
                await asyncio.sleep(0)
            while window.in_flight:
                routers.step()
                await settle()

    asyncio.run(run())


def test_a_sequence_that_is_cancelled_leaves_its_place_to_others():
    async def run():
        window, routers = Window(1), Routers(10)
        first, second, third = (asyncio.create_task(send(window, routers)) for _ in range(3))
        await settle()
        second.cancel()
        await settle()
        first.cancel()
        await settle()
        routers.step()  # the first's, which nobody waits for
        routers.step()
        async with asyncio.timeout(10):
            await third
        await asyncio.gather(first, second, return_exceptions=True)
        assert window.in_flight == 0

    asyncio.run(run())


def test_one_that_is_cancelled_while_another_leaves_is_just_cancelled():
    async def run():
        window, go = Window(1), asyncio.Event()

        async def hold():
            async with window.room(1):
                await go.wait()

        async def wait():
            async with window.room(1):
                pass

        holds = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waits = asyncio.create_task(wait())
        await asyncio.sleep(0)
        go.set()
        waits.cancel()
        return await asyncio.gather(holds, waits, return_exceptions=True)

    left, cancelled = asyncio.run(run())
    assert left is None
    assert isinstance(cancelled, asyncio.CancelledError)
