"""A router's step loop: the one thread that owns the engine. Requests come in as events, tokens leave by outboxes."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from moeray.actors import request_log
from moeray.actors.life import Life
from moeray.actors.messages import error_tree, output_tree, request_from, split
from moeray.actors.outbox import Outbox
from moeray.actors.request_figures import RequestFigures
from moeray.control.objectives import Objectives
from moeray.engine.engine import Engine, EngineStats
from moeray.errors import MoerayError, NoReplicaError, RouterLostError
from moeray.recorder import Recorder
from moeray.types import FinishReason, TokenOutput
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)

Event = Callable[[], None]


@dataclass
class _Request:
    outbox: Outbox
    life: Life

    @property
    def attempt(self) -> int:
        return self.life.request.attempt


class StepLoop:
    """Any thread may call the public methods; what they ask is done between two steps.

    A request's end is told only to the channel that submitted its newest attempt. `on_death` is called from the loop's
    thread when it dies of a bug, `prepare` before its first step.
    """

    def __init__(
        self, actor_id: str, recorder: Recorder, figures: RequestFigures, on_death: Callable[[], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._actor_id = actor_id
        self._step_seconds = recorder.histogram("moeray_step_seconds")
        self._figures = figures
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._requests: dict[str, _Request] = {}
        self._idle = threading.Condition()
        self._refusing = False
        self._engine: Engine | None = None
        self._prepare = prepare
        self._thread = threading.Thread(target=self._run, name=f"step-loop-{actor_id}", daemon=True)

    def start(self, engine: Engine) -> None:
        self._engine = engine
        self._thread.start()

    def stats(self) -> EngineStats | None:
        """The engine's counters; None before it has one."""
        return self._engine.stats() if self._engine else None

    def patience(self, since: float) -> float:
        """When the first request's time is up that was not up at `since`; infinite where there is none such.

        For the threads that compute a step.
        """
        return min((until for r in self._requests.values() if (until := r.life.until) > since), default=math.inf)

    # -- from other threads ---------------------------------------------------------------------------------------

    def submit(self, frame: Frame, outbox: Outbox) -> None:
        """A SUBMIT frame; RESULT or ERROR is the answer."""
        self._inbox.put(lambda: self._submit(frame, outbox))

    def abort(self, frame: Frame, outbox: Outbox) -> None:
        """An ABORT frame: it ends the attempt that it names, if that one is the channel's own; `stopped` says that
        the ingress has found a stop string in the text, which is an end like any other."""
        request_id, attempt = str(frame.meta.get("request_id")), frame.meta.get("attempt")
        reason = FinishReason.STOP if frame.meta.get("stopped") else FinishReason.ABORT

        def own(request: _Request) -> bool:
            return request.outbox is outbox and request.attempt == attempt

        self._inbox.put(lambda: self._abort_if(request_id, own, reason))

    def abandon(self, outbox: Outbox) -> None:
        """The channel has ended: nobody waits for its requests."""
        self._inbox.put(lambda: self._abort_all(lambda request: request.outbox is outbox))

    def keep_to(self, objectives: Objectives) -> None:
        """Lateness is counted by these from now on, and steps last as long as they say."""
        self._inbox.put(lambda: self._keep_to(objectives))

    def refuse(self) -> None:
        """From now on every SUBMIT is answered by the error `draining`."""
        self._refusing = True

    def abort_all(self) -> None:
        """End every request without a word."""
        self._inbox.put(lambda: self._abort_all(lambda request: True))

    def wait_idle(self, timeout: float) -> bool:
        """After `refuse`: wait until no request is left; False after `timeout` seconds."""
        if not self._thread.is_alive():
            return True
        until = time.monotonic() + timeout
        passed = threading.Event()
        self._inbox.put(passed.set)  # what was submitted before is a request by then, what comes after is refused
        if not passed.wait(timeout):
            return False
        with self._idle:
            return self._idle.wait_for(lambda: not self._requests, max(0.0, until - time.monotonic()))

    def stop(self, timeout: float) -> None:
        """End the loop after the step that runs, and join its thread."""
        self._inbox.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    # -- the loop's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._prepare()
            self._steps()
        except BaseException:
            log.exception("the step loop died; every channel is closed, so that no client waits for ever")
            self._on_death()
            raise

    def _steps(self) -> None:
        assert self._engine is not None
        while True:
            if not self._drain_inbox(wait=not self._engine.has_work):
                return
            if self._engine.has_work:
                self._deliver(self._step())

    def _drain_inbox(self, wait: bool) -> bool:
        """Run the events that wait (or wait for one); False when told to stop."""
        while True:
            try:
                event = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if event is None:
                return False
            event()
            wait = False

    def _submit(self, frame: Frame, outbox: Outbox) -> None:
        assert self._engine is not None
        request_id, attempt = str(frame.meta.get("request_id")), frame.meta.get("attempt", 0)
        try:
            if self._refusing:
                raise RouterLostError(f"router {self._actor_id} is draining; send the request to another")
            request = request_from(frame.meta)
            self._engine.submit(request)
        except Exception as error:  # one request must not end the router, and the next one after it
            if not isinstance(error, MoerayError):
                log.exception("a request could not be taken")
                error = MoerayError(f"the request could not be taken: {error!r}")
            request_log.refused(request_id, str(frame.meta.get("origin", "")), error)
            outbox.put(Frame(Op.ERROR, frame.id, meta=error_tree(request_id, attempt, error)))
            return
        self._requests[request_id] = _Request(outbox, Life(request, time.monotonic()))
        request_log.taken(request)
        outbox.put(Frame(Op.RESULT, frame.id, meta={"request_id": request_id}))

    def _keep_to(self, objectives: Objectives) -> None:
        assert self._engine is not None
        self._figures.objectives = objectives
        self._engine.keep_to(objectives.step_s)

    def _abort_if(
        self, request_id: str, fits: Callable[[_Request], bool], reason: FinishReason = FinishReason.ABORT
    ) -> None:
        assert self._engine is not None
        request = self._requests.get(request_id)
        if request is not None and fits(request):
            if self._engine.abort(request_id):
                self._ended(request.life, reason, time.monotonic())
            self._forget(request_id)

    def _ended(self, life: Life, reason: FinishReason, now: float, error: str | None = None) -> None:
        self._figures.end(life, reason, now)
        request_log.ended(life, reason, now, error)

    def _abort_all(self, fits: Callable[[_Request], bool]) -> None:
        for request_id in list(self._requests):
            self._abort_if(request_id, fits)

    def _forget(self, request_id: str) -> None:
        with self._idle:
            self._requests.pop(request_id, None)
            self._idle.notify_all()

    def _step(self) -> list[TokenOutput]:
        assert self._engine is not None
        began = time.monotonic()
        try:
            outputs = self._engine.step()
        except NoReplicaError as error:
            return self._fail_late(error)
        except MoerayError as error:
            log.error("the step failed, and its requests with it: %s", error)
            return self._fail_all(str(error))
        except Exception as error:  # a request that no engine can compute must not end one router after the other
            log.exception("the step failed; its requests end with an error")
            return self._fail_all(str(error))
        self._step_seconds.observe(time.monotonic() - began)
        for request_id in self._engine.take_begun():
            if request := self._requests.get(request_id):
                self._figures.began(request.life, began)
        return outputs

    def _fail_late(self, error: NoReplicaError) -> list[TokenOutput]:
        """The requests whose time ran out as rows waited, all where none has any; the others are computed again."""
        now = time.monotonic()
        late = [key for key, request in self._requests.items() if error.since < request.life.until <= now]
        late = late or list(self._requests)
        log.error("the step failed, and %d of %d requests with it: %s", len(late), len(self._requests), error)
        return self._fail(late, str(error))

    def _fail_all(self, message: str) -> list[TokenOutput]:
        return self._fail(self._requests.keys(), message)

    def _fail(self, keys: Collection[str], message: str) -> list[TokenOutput]:
        assert self._engine is not None
        failed = [(key, self._requests[key].attempt) for key in keys if self._engine.abort(key)]
        return [TokenOutput(*key, (), finish_reason=FinishReason.ERROR, error=message) for key in failed]

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """One STEP frame per ingress with all its requests' tokens, after those for long parts of prompts."""
        now = time.monotonic()
        by_outbox: dict[Outbox, list[Any]] = {}
        ended = []
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None or request.attempt != output.attempt:
                continue
            *first, last = split(output)
            for part in first:
                request.outbox.put(Frame(Op.STEP, meta={"outputs": [output_tree(part)]}))
            by_outbox.setdefault(request.outbox, []).append(output_tree(last))
            if output.token_ids:
                request.life.cached_tokens = output.cached_tokens
                self._figures.token(request.life, len(output.token_ids), now)
            if output.finish_reason is not None:
                self._ended(request.life, output.finish_reason, now, output.error)
                ended.append(output.request_id)
        for outbox, trees in by_outbox.items():
            outbox.put(Frame(Op.STEP, meta={"outputs": trees}))
        for request_id in ended:  # only now: a drain that finds no request left sends what is in the outboxes
            self._forget(request_id)
