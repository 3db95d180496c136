"""A client and a router that does what the test says: the real channel, with a listener's handler for a router."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from moeray.actors.client import RouterClient
from moeray.actors.messages import error_tree, output_tree
from moeray.errors import QueueFullError, RequestError, RouterLostError
from moeray.settings.wire import WireConfig
from moeray.types import FinishReason, GenerationRequest, TokenOutput
from moeray.wire.channel import Channel, Listener
from moeray.wire.frame import Frame, Op
from moeray.wire.identity import Identity
from tests.threads import refuse_one

WIRE = WireConfig(remote="off", max_header_bytes=1 << 16)


def identity(name: str) -> Identity:
    return Identity(name, "node", "model", b"token")


class Script:
    """A router's side. `answer(frame, channel)` is called for every frame; `frames` has them all."""

    def __init__(self, answer: Callable[[Frame, Channel], None]) -> None:
        self.frames: queue.Queue[Frame] = queue.Queue()
        self.ended = threading.Semaphore(0)
        self._answer = answer

    def __call__(self, channel: Channel) -> None:
        try:
            while True:
                frame = channel.recv()
                self.frames.put(frame)
                self._answer(frame, channel)
        finally:
            self.ended.release()

    def next(self, op: Op) -> Frame:
        while (frame := self.frames.get(timeout=20)).op is not op:
            pass
        return frame


@contextmanager
def listening(script: Script, folder):
    listener = Listener(identity("router-0"), WIRE, script, folder)
    try:
        yield listener.start()
    finally:
        listener.close(timeout=5.0)


def silent(frame: Frame, channel: Channel) -> None:
    """Takes everything and answers nothing."""


def step(*outputs: TokenOutput) -> Frame:
    return Frame(Op.STEP, meta={"outputs": [output_tree(output) for output in outputs]})


def end(request_id: str, attempt: int, token: int) -> TokenOutput:
    return TokenOutput(request_id, attempt, (token,), finish_reason=FinishReason.STOP)


def request(request_id: str, attempt: int = 0, prompt=(1, 2)) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), attempt=attempt)


async def outputs_of(client: RouterClient, asked: GenerationRequest) -> list[TokenOutput]:
    return [output async for output in client.generate(asked)]


def run(script: Script, folder, test, **options):
    """Run `test(client)` against the script; afterwards no thread of the client's is left."""

    async def main():
        client = RouterClient(address, identity("ingress"), WIRE, **{"silence_s": 60.0} | options)
        try:
            return await test(client)
        finally:
            await client.close()

    before = set(threading.enumerate())
    with listening(script, folder) as address:
        result = asyncio.run(main())
    left = [t.name for t in set(threading.enumerate()) - before if not t.name.startswith("asyncio")]
    assert not left
    return result


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "s"
    path.mkdir(mode=0o700)
    return path


def test_a_router_that_never_answers_counts_as_hung(folder):
    async def test(client):
        streams = [outputs_of(client, request(f"r{i}")) for i in range(3)]
        async with asyncio.timeout(10):
            results = await asyncio.gather(*streams, return_exceptions=True)
        assert [type(result) for result in results] == [RouterLostError] * 3
        assert "has not answered for 0.3 s" in str(results[0])

    losses = []
    script = Script(silent)
    run(script, folder, test, silence_s=0.3, on_loss=lambda: losses.append(1))
    assert script.next(Op.PING)
    assert losses == [1]


def test_a_slow_router_that_answers_pings_is_waited_for(folder):
    pings = 0

    def slow(frame, channel):
        nonlocal pings
        if frame.op is Op.PING:
            pings += 1
            channel.send(Frame(Op.PONG, frame.id))
            if pings == 6:  # after three times the silence that it may keep
                channel.send(step(end("r", 0, 7)))

    outputs = run(Script(slow), folder, lambda client: outputs_of(client, request("r")), silence_s=1.0)
    assert [output.token_ids for output in outputs] == [(7,)]


def test_a_client_without_requests_sends_no_ping(folder):
    """What is idle is left alone, however long; the next request finds the channel as it was."""

    def answer(frame, channel):
        if frame.op is Op.SUBMIT:
            channel.send(step(end(frame.meta["request_id"], 0, 7)))

    async def test(client):
        await outputs_of(client, request("a"))
        link = await client.open()
        await asyncio.to_thread(idle.wait, 1.5)  # ten beats
        assert await client.open() is link
        await outputs_of(client, request("b"))

    idle = threading.Event()
    script = Script(answer)
    run(script, folder, test, silence_s=0.3)
    seen = [frame.op for frame in script.frames.queue]
    assert seen.count(Op.SUBMIT) == 2
    assert seen.count(Op.PING) < 4  # a machine under load may see one or two while a request is on its way


def test_what_an_older_attempt_says_is_dropped(folder):
    def answer(frame, channel):
        if frame.op is Op.SUBMIT:
            late = Frame(Op.ERROR, meta=error_tree("r", 1, RequestError("an old one")))
            channel.send(step(end("r", 1, 5)))
            channel.send(late)
            channel.send(step(end("r", 2, 6)))

    outputs = run(Script(answer), folder, lambda client: outputs_of(client, request("r", attempt=2)))
    assert [output.token_ids for output in outputs] == [(6,)]


def test_goodbye_ends_the_streams_and_the_next_request_connects_again(folder):
    greeted = []

    def answer(frame, channel):
        if frame.op is Op.SUBMIT:
            greeted.append(channel)
            channel.send(step(end("b", 0, 7)) if len(greeted) > 1 else Frame(Op.GOODBYE))

    async def test(client):
        with pytest.raises(RouterLostError, match="draining"):
            await outputs_of(client, request("a"))
        return await outputs_of(client, request("b"))

    assert run(Script(answer), folder, test)[0].token_ids == (7,)
    assert greeted[0] is not greeted[1]


@pytest.mark.parametrize(
    "error", [QueueFullError("full", retry_after_s=1.0), RequestError("no"), RouterLostError("router-0 is draining")]
)
def test_a_refusal_is_the_request_s_own(folder, error):
    def answer(frame, channel):
        if frame.op is Op.SUBMIT and frame.meta["request_id"] == "bad":
            channel.send(Frame(Op.ERROR, frame.id, meta=error_tree("bad", 0, error)))
            channel.send(step(end("good", 0, 7)))

    async def test(client):
        good = asyncio.create_task(outputs_of(client, request("good")))
        with pytest.raises(type(error), match=str(error)):
            await outputs_of(client, request("bad"))
        assert (await good)[0].token_ids == (7,)

    run(Script(answer), folder, test)


def test_a_request_too_large_for_a_frame_fails_alone(folder):
    def answer(frame, channel):
        if frame.op is Op.SUBMIT and frame.meta["request_id"] == "last":
            channel.send(step(end("good", 0, 7), end("last", 0, 8)))

    async def test(client):
        good = asyncio.create_task(outputs_of(client, request("good")))
        with pytest.raises(RequestError, match="too large"):
            await outputs_of(client, request("huge", prompt=range(300, 60_000)))
        await outputs_of(client, request("last"))
        assert (await good)[0].token_ids == (7,)

    run(Script(answer), folder, test)


@pytest.mark.parametrize("stopped", [False, True])
def test_an_abort_names_its_attempt_and_whether_a_stop_string_was_found(folder, stopped):
    def answer(frame, channel):
        if frame.op is Op.SUBMIT:
            channel.send(step(TokenOutput("r", 3, (7,))))

    async def test(client):
        stream = client.generate(request("r", attempt=3))
        await anext(stream)
        client.stopped("r" if stopped else "another")
        await stream.aclose()
        return await asyncio.to_thread(script.next, Op.ABORT)

    script = Script(answer)
    assert run(script, folder, test).meta == {"request_id": "r", "attempt": 3, "stopped": stopped}


def test_no_thread_to_be_had_is_a_lost_router_that_may_be_tried_again(folder, monkeypatch):
    async def test(client):
        refuse_one(monkeypatch, lambda name: name.startswith("read-"))
        with pytest.raises(RouterLostError, match="new thread"):
            await outputs_of(client, request("r"))
        return await outputs_of(client, request("r"))

    def answer(frame, channel):
        if frame.op is Op.SUBMIT:
            channel.send(step(end("r", 0, 7)))

    assert [output.token_ids for output in run(Script(answer), folder, test)] == [(7,)]


def test_a_router_that_is_not_there(folder):
    async def test(client):
        async with asyncio.timeout(10):
            results = await asyncio.gather(
                *(outputs_of(client, request(f"r{i}")) for i in range(20)), return_exceptions=True
            )
        assert all(isinstance(result, RouterLostError) for result in results)

    with listening(Script(silent), folder) as address:
        pass

    async def main():
        client = RouterClient(address, identity("ingress"), WIRE)
        await test(client)
        await client.close()

    asyncio.run(main())
