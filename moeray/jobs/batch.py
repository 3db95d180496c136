"""Ask every line of a batch, thousands at a time, through the same calls as the endpoint's, and write what comes."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

from moeray.errors import BatchPausedError, MoerayError, QueueFullError, RequestError, RouterLostError
from moeray.jobs.ledger import Ledger
from moeray.jobs.lines import BatchLine, answer_line, refusal_line, seeded
from moeray.jobs.tally import Tally
from moeray.jobs.window import Window
from moeray.logs import REQUEST_ID
from moeray.serve.backend import Backend, BackendState, ModelInfo
from moeray.serve.calls import Call, Calls
from moeray.serve.errors import GenerationFailedError, reply_for
from moeray.types import GenerationRequest, TokenOutput

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""So often a line is asked whose generation the system ended with an error of its own."""


class WatchedBackend:
    """A backend whose tokens are counted. `heard` is when it last gave any, or took up work."""

    def __init__(self, backend: Backend, tally: Tally, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._tally = tally
        self._clock = clock
        self._heard = clock()

    @property
    def state(self) -> BackendState:
        return self._backend.state

    @property
    def model(self) -> ModelInfo | None:
        return self._backend.model

    @property
    def silent_s(self) -> float:
        """Seconds since the last token."""
        return self._clock() - self._heard

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        async with aclosing(self._backend.generate(request)) as stream:
            async for output in stream:
                self._heard = self._clock()
                self._tally.generated += len(output.token_ids)
                yield output

    def stopped(self, request_id: str) -> None:
        self._backend.stopped(request_id)


class BatchJob:
    """Used once, on one event loop. `concurrency`: sequences in flight, and lines held in memory, at most.

    `queue` is how many sequences the routers take at most; a line that asks for more is refused. The job pauses when
    the system is lost, or takes nothing, and has given no token for `patience_s` seconds.
    """

    def __init__(
        self,
        backend: Backend,
        chat_template: str | None,
        ledger: Ledger,
        tally: Tally,
        *,
        concurrency: int,
        queue: int,
        patience_s: float,
    ) -> None:
        self._backend = WatchedBackend(backend, tally)
        self._calls = Calls(self._backend, chat_template)
        self._ledger = ledger
        self._tally = tally
        self._concurrency = concurrency
        self._queue = queue
        self._patience_s = patience_s
        self._window = Window(min(concurrency, queue))

    async def run(self, lines: Iterable[BatchLine]) -> None:
        """Until each line is in one of the files. Raises the first MoerayError that concerns more than one line.

        That is BatchPausedError where it is worth another run. Cancelled, it leaves what is not finished to the next.
        """
        await self._calls.warm_up()
        slots, began = asyncio.Semaphore(self._concurrency), time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                for line in lines:
                    await slots.acquire()
                    tasks.create_task(self._settle(line)).add_done_callback(lambda _: slots.release())
        except ExceptionGroup as group:
            known = group.subgroup(MoerayError)
            if known is None:
                raise
            raise known.exceptions[0] from group
        finally:
            self._tally.seconds = time.monotonic() - began

    async def _settle(self, line: BatchLine) -> None:
        request_id = uuid.uuid4().hex
        REQUEST_ID.set(request_id)  # each line is a task of its own, and so is its context
        self._tally.in_flight += 1
        try:
            call, answer = await self._ask(line)
        except BatchPausedError:
            raise
        except Exception as error:  # whatever it is, it is this line's
            reply = reply_for(error)
            if reply.status == 503:
                raise BatchPausedError(f"{error}; run the same job again to go on") from error
            if reply.status >= 500:
                log.error("line %d failed", line.number, exc_info=error)
            written = self._ledger.write_error(refusal_line(line, reply, request_id))
            self._tally.fail(reply.code or str(reply.status))
        else:
            usage = call.generation.usage()
            written = self._ledger.write_answer(answer_line(line, answer, request_id))
            self._tally.answered += 1
            self._tally.prompt_tokens += usage.prompt_tokens
            self._tally.completion_tokens += usage.completion_tokens
        finally:
            self._tally.in_flight -= 1
        await asyncio.shield(asyncio.wrap_future(written))

    async def _ask(self, line: BatchLine) -> tuple[Call, bytes]:
        """The call that succeeded, and its answer. A line waits here for as long as the system takes no more."""
        failures = 0
        while True:
            call = await self._calls.prepare(line.url, seeded(line))
            self._check_choices(call)
            try:
                async with self._window.room(len(call.job.choices)):
                    return call, await call.plain()
            except (QueueFullError, RouterLostError) as error:
                self._check_patience(error)
            except GenerationFailedError as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise
                log.warning("line %d is asked again: %s", line.number, error)

    def _check_choices(self, call: Call) -> None:
        if (count := len(call.job.choices)) > self._queue:
            raise RequestError(
                f"{count} sequences are asked for at once, and the routers queue {self._queue} (engine.max_waiting); "
                "lower n or give fewer prompts",
                param="n",
            )

    def _check_patience(self, error: MoerayError) -> None:
        silent_s = self._backend.silent_s
        if silent_s >= self._patience_s:
            raise BatchPausedError(
                f"the system has given no token for {silent_s:.0f} s: {error}; `moeray status` shows what is missing; "
                "run the same job again to go on"
            ) from error
