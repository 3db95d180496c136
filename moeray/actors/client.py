"""An ingress's side of a router's stream: one channel, many requests, outputs as they come."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator

from moeray.actors.messages import error_from, output_from, request_tree
from moeray.config import WireConfig
from moeray.errors import ChannelClosedError, MoerayError, RouterLostError, WireError
from moeray.types import Address, GenerationRequest, TokenOutput
from moeray.wire.channel import Channel, Identity, connect
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)

_Item = TokenOutput | MoerayError | None


class RouterClient:
    """Made and used on one event loop. Two threads serve the channel: one reads, one writes."""

    def __init__(self, address: Address, identity: Identity, wire: WireConfig) -> None:
        self.address = address
        self._identity = identity
        self._wire = wire
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._streams: dict[str, asyncio.Queue[_Item]] = {}
        self._ids = itertools.count(1)
        self._out: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._opening = asyncio.Lock()

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Outputs of one request, the last one with a finish reason. Closing the iterator aborts the request.

        Raises QueueFullError or RequestError when the router does not take it, RouterLostError when the router goes.
        """
        await self._open()
        stream: asyncio.Queue[_Item] = asyncio.Queue()
        self._streams[request.request_id] = stream
        finished = False
        try:
            self._out.put(Frame(Op.SUBMIT, next(self._ids), meta=request_tree(request)))
            while not finished:
                item = await stream.get()
                if isinstance(item, MoerayError):
                    finished = True
                    raise item
                if item is not None:
                    finished = item.finish_reason is not None
                    yield item
        finally:
            self._streams.pop(request.request_id, None)
            if not finished:
                self._out.put(Frame(Op.ABORT, meta={"request_id": request.request_id}))

    async def _open(self) -> None:
        async with self._opening:
            if self._channel is not None and not self._channel.closed:
                return
            await self._join()
            try:
                channel = await asyncio.to_thread(connect, self.address, self._identity, self._wire, timeout=10.0)
            except WireError as error:
                raise RouterLostError(f"router {self.address.actor_id} cannot be reached: {error}") from error
            self._channel = channel
            out: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
            self._out = out
            self._threads = [
                threading.Thread(target=self._read, args=(channel, out), name="router-read", daemon=True),
                threading.Thread(target=_write, args=(channel, out), name="router-write", daemon=True),
            ]
            for thread in self._threads:
                thread.start()

    def _read(self, channel: Channel, out: queue.SimpleQueue[Frame | None]) -> None:
        """The reading thread: hand each frame to the event loop, until the channel ends."""
        try:
            while True:
                frame = channel.recv()
                self._loop.call_soon_threadsafe(self._take, frame)
        except WireError as error:
            if not isinstance(error, ChannelClosedError):
                log.warning("channel to router %s broke: %s", self.address.actor_id, error)
            channel.close()
            out.put(None)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._lost)

    def _take(self, frame: Frame) -> None:
        if frame.op is Op.STEP:
            for tree in frame.meta["outputs"]:
                output = output_from(tree)
                if stream := self._streams.get(output.request_id):
                    stream.put_nowait(output)
        elif frame.op is Op.ERROR and (stream := self._streams.get(frame.meta["request_id"])):
            stream.put_nowait(error_from(frame.meta))

    def _lost(self) -> None:
        for stream in self._streams.values():
            stream.put_nowait(RouterLostError(f"router {self.address.actor_id} is gone; send the request again"))

    async def close(self) -> None:
        """Close the channel and join its threads."""
        if self._channel is not None:
            self._channel.close()
        self._out.put(None)
        await self._join()

    async def _join(self) -> None:
        for thread in self._threads:
            await asyncio.to_thread(thread.join, 5.0)
        self._threads = []


def _write(channel: Channel, out: queue.SimpleQueue[Frame | None]) -> None:
    while (frame := out.get()) is not None:
        try:
            channel.send(frame)
        except WireError:
            channel.close()
            return
