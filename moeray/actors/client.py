"""An ingress's side of a router's stream: one channel, many requests, outputs as they come."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from moeray.actors.link import Link
from moeray.actors.messages import error_from, output_from, request_tree
from moeray.errors import MoerayError, RequestError, RouterLostError, WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address, GenerationRequest, TokenOutput
from moeray.wire.channel import Channel, connect
from moeray.wire.frame import Frame, Op
from moeray.wire.identity import Identity

SILENCE_S = 1.5
"""A router that is silent for so long while requests are in flight counts as hung."""
CONNECT_S = 5.0


@dataclass(eq=False)
class _Stream:
    """`stopped`: whoever reads it has found a stop string, so its early end is no abort."""

    attempt: int
    link: Link
    stopped: bool = False
    items: asyncio.Queue[TokenOutput | MoerayError] = field(default_factory=asyncio.Queue)


class RouterClient:
    """Made and used on one event loop. `on_loss` is called there whenever the channel to the router ends by itself.

    Outputs of an older attempt than the stream's are dropped: a router that was stopped and wakes cannot speak for it.
    """

    def __init__(
        self,
        address: Address,
        identity: Identity,
        wire: WireConfig,
        *,
        silence_s: float = SILENCE_S,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self.address = address
        self._identity = identity
        self._wire = wire
        self._silence_s = silence_s
        self._on_loss = on_loss
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self._ended: list[Link] = []
        self._connecting: asyncio.Task[Link] | None = None
        self._streams: dict[str, _Stream] = {}
        self._ids = itertools.count(1)
        self._closing = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Outputs of one request, the last one with a finish reason. Closing the iterator aborts the request.

        Raises QueueFullError or RequestError when the router does not take it; RouterLostError when the router goes,
        hangs or drains.
        """
        stream = await self._submit(request)
        finished = False
        try:
            while not finished:
                item = await stream.items.get()
                if isinstance(item, MoerayError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            self._leave(request.request_id, stream)
            if not finished:
                named = {"request_id": request.request_id, "attempt": request.attempt}
                stream.link.put(Frame(Op.ABORT, meta={**named, "stopped": stream.stopped}))

    def stopped(self, request_id: str) -> None:
        """The text of a request has come to a stop string: when its iterator is closed now, it has ended by STOP."""
        if stream := self._streams.get(request_id):
            stream.stopped = True

    async def _submit(self, request: GenerationRequest) -> _Stream:
        frame = Frame(Op.SUBMIT, next(self._ids), meta=request_tree(request))
        link = await self.open()
        if link is not self._link:
            raise self._loss("is gone")  # between the connecting task's end and this task's turn
        stream = self._streams[request.request_id] = _Stream(request.attempt, link)
        link.busy = True
        link.put(frame)
        return stream

    def _leave(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
        stream.link.busy = any(other.link is stream.link for other in self._streams.values())

    # -- the link -------------------------------------------------------------------------------------------------

    async def open(self) -> Link:
        """The link to the router, made where there is none. Raises RouterLostError."""
        if self._closing:
            raise self._loss("was left")
        if self._link is not None:
            return self._link
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name=f"connect-{self.address.actor_id}")
            self._connecting.add_done_callback(self._connected)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Link:
        await self._join_ended()
        try:
            channel = await asyncio.to_thread(connect, self.address, self._identity, self._wire, timeout=CONNECT_S)
        except MoerayError as error:
            raise self._loss(f"cannot be reached: {error}") from error
        link = self._link_over(channel)
        try:
            link.start()
        except RuntimeError as error:
            raise self._loss(f"cannot be reached: {error}") from error
        self._link = link
        return link

    def _connected(self, task: asyncio.Task[Link]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # each waiter has it too, if any is left

    def _link_over(self, channel: Channel) -> Link:
        link = Link(
            channel,
            self._silence_s,
            on_frame=lambda frame: self._call(self._take, frame),
            on_unsent=lambda frame, error: self._call(self._refuse, frame, error),
            on_end=lambda reason: self._call(self._end, link, reason),
        )
        return link

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _take(self, frame: Frame) -> None:
        if frame.op is Op.STEP:
            for output in map(output_from, frame.meta["outputs"]):
                self._hand(output.request_id, output.attempt, output)
        elif frame.op is Op.ERROR:
            self._hand(frame.meta["request_id"], frame.meta["attempt"], error_from(frame.meta))

    def _refuse(self, frame: Frame, error: WireError) -> None:
        if frame.op is Op.SUBMIT:
            refused = RequestError(f"the request is too large to be sent: {error}", param="prompt")
            self._hand(frame.meta["request_id"], frame.meta["attempt"], refused)

    def _hand(self, request_id: str, attempt: int, item: TokenOutput | MoerayError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and stream.attempt == attempt:
            stream.items.put_nowait(item)

    def _end(self, link: Link, reason: str) -> None:
        self._ended.append(link)
        if self._link is link:
            self._link = None
        for stream in self._streams.values():
            if stream.link is link:
                stream.items.put_nowait(self._loss(reason))
        if not self._closing:
            self._on_loss()

    def _loss(self, reason: str) -> RouterLostError:
        return RouterLostError(f"router {self.address.actor_id} {reason}; send the request again")

    async def _join_ended(self) -> None:
        while self._ended:
            await asyncio.to_thread(self._ended.pop().close)

    async def close(self) -> None:
        """Close the channel and join its threads; streams that are left end with RouterLostError."""
        self._closing = True
        if self._connecting is not None:
            await asyncio.wait({self._connecting})
        if self._link is not None:
            await asyncio.to_thread(self._link.close)
        await self._join_ended()
