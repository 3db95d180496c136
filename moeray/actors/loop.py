"""A thread that owns some state: everything that touches it is an event in its inbox, run one after the other."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from moeray.errors import MoerayError

log = logging.getLogger(__name__)

_T = TypeVar("_T")


def started_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads run already, so that none of its submits fails for want of one."""
    pool, met = ThreadPoolExecutor(threads, thread_name_prefix=name), threading.Barrier(threads)
    try:
        for each in [pool.submit(met.wait) for _ in range(threads)]:
            each.result()
    except BaseException:
        met.abort()
        pool.shutdown(wait=False)
        raise
    return pool


class Loop:
    """Runs posted events, and `tick` each `period_s` seconds, until it is stopped. An event's failure is logged."""

    def __init__(self, name: str, tick: Callable[[], None], period_s: float) -> None:
        self._tick = tick
        self._period_s = period_s
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, event: Callable[[], None]) -> None:
        """Run `event` on the loop's thread, soon. Any thread may post."""
        self._inbox.put(event)

    def ask(self, question: Callable[[], _T], timeout: float = 30.0) -> _T:
        """Run `question` on the loop's thread and return its answer. Raises what it raises, MoerayError when late."""
        answer: Future[_T] = Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        self.post(run)
        try:
            return answer.result(timeout)
        except FutureTimeoutError:
            raise MoerayError(f"the controller is stopped or busy; it did not answer within {timeout:g} s") from None

    def when_done(self, future: Future[Any], then: Callable[[Any, Exception | None], None]) -> None:
        """Post `then(result, error)` when the future is settled."""

        def settled(done: Future[Any]) -> None:
            if done.cancelled():
                self.post(lambda: then(None, MoerayError("it was cancelled")))
                return
            error = done.exception()
            if error is None:
                self.post(lambda: then(done.result(), None))
            elif isinstance(error, Exception):
                self.post(lambda: then(None, error))

        future.add_done_callback(settled)

    def _run(self) -> None:
        event: Callable[[], None] | None
        next_tick = time.monotonic() + self._period_s
        while True:
            left_s = next_tick - time.monotonic()
            try:
                event = self._inbox.get(timeout=left_s) if left_s > 0 else self._tick  # however full the inbox is
            except queue.Empty:
                continue
            if event is None:
                return
            try:
                event()
            except Exception:  # one event's fault must not end the control of the system, but it is never silent
                log.exception("an event of the controller failed")
            if left_s <= 0:
                next_tick = time.monotonic() + self._period_s  # after it: what is in the inbox has its time, too

    def stop(self, timeout: float) -> None:
        """End the thread; what is still in the inbox behind this call is not run."""
        self._inbox.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)
