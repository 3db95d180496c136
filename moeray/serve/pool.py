"""The routers as an ingress sees them: the load spread over them, and requests moved on when one goes, hangs or drains.

A request is resubmitted with the tokens it has so far, as its next attempt, until its own deadline. The tokens that
follow are those that it would have had: draws are keyed by (seed, position).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial

from moeray.actors.client import RouterClient
from moeray.errors import QueueFullError, RouterLostError
from moeray.logs import log_names
from moeray.recorder import Recorder
from moeray.types import Address, GenerationRequest, TokenOutput

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 1.0
FULL_RETRY_S = 1.0
LAST_WORD_S = 1.0
"""A router has so much less time for a request than there is: else its word on what is missing would come too late."""

Dial = Callable[[Address, Callable[[], None]], RouterClient]
"""(where the router listens, what to call when its channel ends by itself) -> a client"""


@dataclass(eq=False)
class _Router:
    """`requests`: ours that are on it. `mending`: it was lost, and is tried again until it answers. `failures`: losses
    since it last gave a token. `named`: the controller names it."""

    client: RouterClient
    requests: int = 0
    failures: int = 0
    mending: asyncio.Task[None] | None = None
    named: bool = True


class RouterPool:
    """Used on one event loop. `timeout_s` is what a request has from its start.

    `disturbed` is set when a router is lost or a request waits for one.
    """

    def __init__(
        self, dial: Dial, timeout_s: float, recorder: Recorder, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._dial = dial
        self.timeout_s = timeout_s
        self._moved = recorder.counter("moeray_requests_moved_total")
        self._clock = clock
        self._routers: dict[Address, _Router] = {}
        self._waiting = 0
        self._changed = asyncio.Event()
        self._leaving: dict[_Router, asyncio.Task[None]] = {}
        self._staying: set[_Router] = set()
        self._closed = False
        self.disturbed = asyncio.Event()

    @property
    def usable(self) -> bool:
        """True where a request would go out at once."""
        return any(router.mending is None for router in self._routers.values())

    @property
    def troubled(self) -> bool:
        """True while a request waits for a router, or one is lost."""
        return bool(self._waiting) or any(router.mending for router in self._routers.values())

    @property
    def lost(self) -> tuple[str, ...]:
        """The names of the routers that are lost."""
        return tuple(address.actor_id for address, router in self._routers.items() if router.mending is not None)

    def follow(self, addresses: Iterable[Address]) -> None:
        """The routers that there are. One that is named no more gets no new request, and keeps those it has."""
        named = set(addresses)
        for address in [address for address in self._routers if address not in named]:
            self._retire(self._routers.pop(address))
        for address in named - self._routers.keys():
            self._routers[address] = _Router(self._dial(address, partial(self._lost_at, address)))
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- one request ----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """The outputs of a request, whatever becomes of the routers that compute them.

        `cached_tokens` is that of the first attempt that gave a token. Raises QueueFullError when every router refuses
        a new request, RequestError, and RouterLostError when none has taken it over before the deadline.
        """
        until = self._clock() + self.timeout_s
        cached: int | None = None
        full: set[_Router] = set()
        while True:
            router = await self._acquire(until, full)
            refusal: QueueFullError | None = None
            request = replace(request, timeout_s=_told(until - self._clock()))
            try:
                async with aclosing(router.client.generate(request)) as stream:
                    async for output in stream:
                        cached = output.cached_tokens if cached is None else cached
                        request = _with(request, output)
                        router.failures = 0
                        yield replace(output, cached_tokens=cached)
                return
            except QueueFullError as error:
                full.add(router)
                refusal = error
            except RouterLostError as error:
                self._lose(router)
                full.clear()
                request = replace(request, attempt=request.attempt + 1)
                self._moved.add()
                _log_move(request, error)
            finally:
                router.requests -= 1
                self._leave(router)
            if refusal is not None and not self._usable(full):
                await self._stand_aside(request, refusal, until)
                full.clear()

    def stopped(self, request_id: str) -> None:
        """The text of a request has come to a stop string; its outputs are about to be closed."""
        for router in {*self._routers.values(), *self._staying}:
            router.client.stopped(request_id)

    async def _acquire(self, until: float, full: set[_Router]) -> _Router:
        """The usable router with the fewest of our requests; waits for one. Raises RouterLostError at the deadline."""
        while True:
            usable = self._usable(full)
            if usable:
                router = min(usable, key=lambda r: (r.requests, random.random()))
                router.requests += 1
                return router
            left = until - self._clock()
            if self._closed:
                raise RouterLostError("the endpoint is closing; send the request to another")
            if left <= 0:
                raise self._too_late()
            await self._wait(left)

    def _usable(self, full: set[_Router]) -> list[_Router]:
        return [r for r in self._routers.values() if r.mending is None and r not in full]

    async def _wait(self, seconds: float) -> None:
        """Until the routers change."""
        self._waiting += 1
        self.disturbed.set()
        try:
            # Not wait_for, which before Python 3.12 loses a cancellation that comes as the event is set.
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        finally:
            self._waiting -= 1

    async def _stand_aside(self, request: GenerationRequest, error: QueueFullError, until: float) -> None:
        """Every router is full: a new request is refused, and one that had begun waits, until its deadline."""
        if request.attempt == 0:
            raise error
        if self._clock() >= until:
            raise self._too_late() from error
        await asyncio.sleep(min(error.retry_after_s, FULL_RETRY_S, max(0.0, until - self._clock())))

    def _too_late(self) -> RouterLostError:
        return RouterLostError(
            f"no router has taken the request within {self.timeout_s:g} s (serve.request_timeout_s); "
            "`moeray status` shows what is missing"
        )

    # -- routers come and go --------------------------------------------------------------------------------------

    def _lost_at(self, address: Address) -> None:
        if address in self._routers:
            self._lose(self._routers[address])

    def _lose(self, router: _Router) -> None:
        """Give the router no request until it answers again."""
        if router.named and router.mending is None:
            router.mending = asyncio.create_task(self._mend(router), name="mend-router")
            self.disturbed.set()

    async def _mend(self, router: _Router) -> None:
        while True:
            await asyncio.sleep(min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(router.failures, 10)))
            router.failures += 1
            try:
                await router.client.open()
            except RouterLostError as error:
                log.info("%s", error)
                continue
            except Exception:  # a router that is given up here would never be used again
                log.exception("router %s could not be asked", router.client.address.actor_id)
                continue
            break
        router.mending = None
        self._wake()

    def _retire(self, router: _Router) -> None:
        """The controller names the router no more: its client is closed once its last request has left it."""
        router.named = False
        if router.mending is not None:
            router.mending.cancel()
        self._staying.add(router)
        self._leave(router)

    def _leave(self, router: _Router) -> None:
        if not router.named and not router.requests and router in self._staying:
            self._staying.discard(router)
            task = self._leaving[router] = asyncio.create_task(router.client.close(), name="leave-router")
            task.add_done_callback(lambda _: self._leaving.pop(router, None))

    async def close(self) -> None:
        """Close every channel; what is in flight ends with RouterLostError."""
        self._closed = True
        self.follow(())
        self._wake()
        await asyncio.gather(*self._leaving.values(), *(router.client.close() for router in self._staying))


def _with(request: GenerationRequest, output: TokenOutput) -> GenerationRequest:
    """What another router is asked for, now that this output is there."""
    return replace(
        request,
        output_ids=request.output_ids + output.token_ids,
        prompt_scored=request.prompt_scored + len(output.prompt_logprobs),
    )


def _told(left_s: float) -> float:
    return max(0.0, left_s - min(LAST_WORD_S, left_s / 10))


def _log_move(request: GenerationRequest, error: RouterLostError) -> None:
    log.warning(
        "attempt %d goes on behind %d tokens: %s", request.attempt, len(request.output_ids), error,
        extra=log_names(request.request_id, request.origin),
    )  # fmt: skip
