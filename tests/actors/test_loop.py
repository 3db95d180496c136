"""The controller's loop and its audit log."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from concurrent.futures import Future

import pytest

from moeray.actors.audit import Audit
from moeray.actors.hosting import stop_all
from moeray.actors.loop import Loop, started_pool
from moeray.actors.roster import Calls
from moeray.errors import MoerayError


@pytest.fixture
def loop():
    made = Loop("test-loop", lambda: None, 3600.0)
    made.start()
    yield made
    made.stop(5.0)
    assert "test-loop" not in {thread.name for thread in threading.enumerate()}


def test_events_run_in_order_on_one_thread(loop):
    seen: list[tuple[int, str]] = []
    for i in range(20):
        loop.post(lambda i=i: seen.append((i, threading.current_thread().name)))
    loop.ask(lambda: None)
    assert seen == [(i, "test-loop") for i in range(20)]


def test_a_question_has_its_answer_or_its_error(loop):
    assert loop.ask(lambda: 6 * 7) == 42
    with pytest.raises(ZeroDivisionError):
        loop.ask(lambda: 1 // 0)


def test_a_failing_event_does_not_end_the_loop(loop, caplog):
    loop.post(lambda: [][0])
    assert loop.ask(lambda: "alive") == "alive"


def test_a_question_to_a_busy_loop_has_a_deadline(loop):
    gate = threading.Event()
    loop.post(lambda: gate.wait(30))
    with pytest.raises(MoerayError, match="did not answer"):
        loop.ask(lambda: None, timeout=0.05)
    gate.set()


def test_ticks_come_though_there_is_always_something_to_do():
    ticks = threading.Semaphore(0)
    loop = Loop("test-loop", ticks.release, 0.01)

    def again():
        loop.post(again)

    loop.post(again)
    loop.start()
    assert all(ticks.acquire(timeout=10) for _ in range(3))
    loop.stop(5.0)


def test_events_run_though_each_tick_takes_longer_than_its_period():
    loop = Loop("test-loop", lambda: threading.Event().wait(0.05), 0.01)
    loop.start()
    assert [loop.ask(lambda i=i: i, timeout=10) for i in range(5)] == list(range(5))
    loop.stop(5.0)
    assert "test-loop" not in {thread.name for thread in threading.enumerate()}


def test_a_pool_has_all_its_threads_from_the_start_or_is_not_made(monkeypatch):
    pool = started_pool(3, "full")
    assert sum(thread.name.startswith("full") for thread in threading.enumerate()) == 3
    pool.shutdown()
    start, left = threading.Thread.start, [2]

    def run_out(thread):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", run_out)
    with pytest.raises(RuntimeError, match="new thread"):
        started_pool(3, "short")
    for thread in threading.enumerate():
        if thread.name.startswith("short"):
            thread.join(10)
            assert not thread.is_alive()


def test_a_call_that_cannot_be_made_is_answered_and_keeps_no_later_one_waiting(loop):
    class Handle:
        actor_id = "experts-0"

        def call(self, method, *args):
            if method == "publish":
                raise ConnectionError("no head")
            done = Future()
            done.set_result(method)
            return done

    calls, told = Calls(Handle(), loop), queue.SimpleQueue()
    for method in ("publish", "stop"):
        loop.post(lambda method=method: calls.put(method, then=lambda *answer: told.put(answer)))
    answer, error = told.get(timeout=10)
    assert answer is None
    assert "publish" in str(error)
    assert "no head" in str(error)
    assert told.get(timeout=10) == ("stop", None)


def test_a_kill_that_fails_keeps_nobody_from_killing_the_others(caplog):
    killed = []

    class Handle:
        def __init__(self, actor_id):
            self.actor_id = actor_id

        def call(self, method):
            if self.actor_id == "b":
                raise ConnectionError("no head")
            return Future()  # never answered

        def kill(self):
            killed.append(self.actor_id)
            if self.actor_id == "a":
                raise ConnectionError("no head")

    stop_all([Handle(name) for name in "abc"], 0.01)
    assert killed == ["a", "b", "c"]
    assert "actor a could not be killed" in caplog.text


def test_the_outcome_of_a_future_is_an_event(loop):
    good, bad, dropped = Future(), Future(), Future()
    seen = []
    for future in (good, bad, dropped):
        loop.when_done(future, lambda result, error: seen.append((result, error and str(error))))
    good.set_result(3)
    bad.set_exception(MoerayError("no"))
    dropped.cancel()
    loop.ask(lambda: None)
    assert seen == [(3, None), (None, "no"), (None, "it was cancelled")]


def test_the_tick_comes_again_and_again():
    ticks = threading.Semaphore(0)
    loop = Loop("ticking", ticks.release, 0.01)
    loop.start()
    assert all(ticks.acquire(timeout=10) for _ in range(3))
    loop.stop(5.0)


def test_the_audit_log_is_appended_to(tmp_path):
    path = tmp_path / "deep" / "audit.jsonl"
    first = Audit(path)
    first.write("pause", by="hand")
    first.write("decision", actors={"a": 2}, inputs={"at": (1, 2)})
    again = Audit(path)
    again.write("resume", by="hand")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["pause", "decision", "resume"]
    assert lines[1]["actors"] == {"a": 2}
    assert [entry["event"] for entry in again.recent] == ["resume"]


def test_the_folder_of_the_audit_log_is_made_again(tmp_path):
    path = tmp_path / "deep" / "audit.jsonl"
    audit = Audit(path)
    audit.write("pause", by="hand")
    shutil.rmtree(path.parent)
    audit.write("resume", by="hand")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["resume"]


def test_a_torn_line_of_the_audit_log_spoils_no_other(tmp_path):
    path = tmp_path / "audit.jsonl"
    Audit(path).write("pause", by="hand")
    path.write_bytes(path.read_bytes() + b'{"at": 17')
    Audit(path).write("controller", adopted=True)
    first, torn, last = path.read_text().splitlines()
    assert json.loads(first)["event"] == "pause"
    assert torn == '{"at": 17'
    assert json.loads(last)["event"] == "controller"


def test_an_audit_log_that_cannot_be_written_is_reported(tmp_path, caplog):
    path = tmp_path / "audit.jsonl"
    path.mkdir()
    audit = Audit(path)
    audit.write("decision")
    assert audit.recent[0]["event"] == "decision"
