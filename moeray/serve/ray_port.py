"""The way from an endpoint, or a command, to the controller's Ray actor."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from moeray.cluster.ray import find_controller, start_controller
from moeray.config import Config
from moeray.errors import MoerayError, one_line
from moeray.recorder import Reading
from moeray.serve.errors import ControllerLostError, ControllerSilentError

log = logging.getLogger(__name__)

RENEW_TIMEOUT_S = 15.0
CALL_TIMEOUT_S = 60.0
HUNG_RENEWALS = 2
"""A controller that has answered once, and then so many renewals in a row not at all, hangs."""


@dataclass(frozen=True)
class _Offer:
    """A config to run by, laid down at `since`; `before`: the one that is in force while the system has not taken
    this one."""

    config: Config
    since: float
    before: _Offer | None = None

    def same(self, other: _Offer) -> bool:
        """Whichever was in force before."""
        return self.config is other.config and self.since == other.since


class RayPort:
    """Implements `ControllerPort` over the controller's Ray actor, starting it where it does not run.

    `since`: when the config was laid down; a running system follows the newest, and never one of 0.

    The handle is kept for as long as the actor lives (restarts included): a call over it goes from process to process,
    while a lookup asks Ray's GCS, which may be away. A controller that hangs, which Ray never notices, is ended.
    """

    def __init__(self, config: Config, since: float = 0.0) -> None:
        self._offer = _Offer(config, since)
        self._lookup: asyncio.Future[Any] | None = None
        self._silences: int | None = None  # renewals in a row; None while it may not have started yet

    async def configure(self, config: Config, since: float, reading: Reading) -> None:
        """Ask for the system by a newer config from now on. Raises MoerayError, and keeps the one before, where the
        system refuses it; one that does not answer at present will hear of it when it does."""
        self._offer = _Offer(config, since, self._offer.before or self._offer)
        try:
            await self.renew(reading)
        except ControllerLostError as error:
            log.warning("the new config is not taken yet: %s", error)

    async def renew(self, reading: Reading) -> dict[str, Any]:
        offer = self._offer  # while it is asked about, there may come a newer one
        try:
            state = dict(await self._ask("renew", offer.config, offer.since, reading, timeout=RENEW_TIMEOUT_S))
        except ControllerSilentError:
            await self._note_silence()
            raise
        except ControllerLostError:
            self._silences = None
            raise
        except MoerayError:
            self._silences = 0
            if self._offer.same(offer) and self._offer.before is not None:
                self._offer = self._offer.before
            raise
        self._silences = 0
        taken = replace(offer, before=None)
        self._offer = taken if self._offer.same(offer) else replace(self._offer, before=taken)
        return await self._replace(state["detail"]) if state["status"] == "gone" else state

    async def call(self, method: str, *args: Any) -> Any:
        return await self._ask("call", method, *args, timeout=CALL_TIMEOUT_S)

    async def _ask(self, method: str, *args: Any, timeout: float) -> Any:
        """Raises the controller's own MoerayError, or ControllerLostError where it gave no answer."""
        try:
            async with asyncio.timeout(timeout):
                actor = await self._actor()
                return await asyncio.wrap_future(getattr(actor, method).remote(*args).future())
        except RayTaskError as error:
            if isinstance(error.cause, MoerayError):
                raise error.cause from None  # it says all; `serve status` would show Ray's lines around it
            raise MoerayError(f"the controller failed: {one_line(error)[-300:]}") from error
        except ActorDiedError as error:
            self._lookup = None
            said = one_line(error)
            # Of a constructor that failed the cause comes last, of a process that died first.
            why = said[-300:] if "creation task" in said else said[:300]
            raise ControllerLostError(f"the controller is gone: {why}") from error
        except TimeoutError as error:
            raise ControllerSilentError(f"the controller has not answered for {timeout:g} s") from error
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise ControllerLostError(f"the controller does not answer: {one_line(error)[:300]}") from error

    async def _note_silence(self) -> None:
        if self._silences is None:
            return
        self._silences += 1
        if self._silences == HUNG_RENEWALS:
            self._silences = None
            await self._restart()

    async def _restart(self) -> None:
        """End a controller that hangs: Ray starts another, which takes everything over."""
        log.error("the controller hangs; another one takes its place")
        await asyncio.to_thread(ray.kill, await self._actor(), no_restart=False)

    async def _replace(self, failure: str) -> dict[str, Any]:
        """End a system that failed with another config, so that the next look-up starts one with ours."""
        actor, self._lookup = await self._actor(), None
        await asyncio.to_thread(ray.kill, actor)
        return {"status": "loading", "detail": "starting again with a new config", "info": None}

    def _find(self) -> Any:
        return start_controller(self._offer.config, self._offer.since)

    async def _actor(self) -> Any:
        """One lookup at a time, whoever waits for it: without a GCS it holds its thread for as long as Ray retries."""
        if self._lookup is None or (self._lookup.done() and (self._lookup.cancelled() or self._lookup.exception())):
            self._lookup = asyncio.ensure_future(asyncio.to_thread(self._find))
        return await asyncio.shield(self._lookup)


class AttachedPort(RayPort):
    """The same for a system of others, whose config this is: it is never started here, nor replaced."""

    async def _restart(self) -> None:
        log.error("the controller hangs; whoever owns the system ends it")

    async def _replace(self, failure: str) -> dict[str, Any]:
        return {"status": "failed", "detail": failure, "info": None}

    def _find(self) -> Any:
        return find_controller(self._offer.config.serve.name)
