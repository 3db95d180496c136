"""One actor under watch, over real channels: reports, silence, a broken channel."""

from __future__ import annotations

import queue
import threading

import pytest

from moeray.actors.watch import Loss, Watcher
from moeray.config import load_config
from moeray.control.reports import ExpertReport, report_tree
from moeray.errors import ConfigError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.channel import Listener, connect
from moeray.wire.frame import Frame, Op
from moeray.wire.identity import Identity

TOKEN = b"t" * 32
WIRE = WireConfig(remote="off")


def identity(name):
    return Identity(name, "n", "model", TOKEN)


class Watched:
    """An actor that answers as `answer` says: nothing, a frame or several. `asked` counts what it was asked."""

    def __init__(self, folder, answer, **settings):
        self.asked = threading.Semaphore(0)
        self.reports: queue.Queue = queue.Queue()
        self.lost: queue.Queue = queue.Queue()
        self._answer = answer
        self.listener = Listener(identity("experts-0"), WIRE, self._serve, folder)
        control = {"control.report_s": 0.05, "control.silence_s": 0.5}
        self._config = load_config(None, control | settings).control
        address = self.listener.start()
        self.watcher = Watcher(
            address, lambda to: connect(to, identity("controller"), WIRE, timeout=5.0), self._config,
            lambda name, report: self.reports.put((name, report)), lambda *loss: self.lost.put(loss),
        )  # fmt: skip

    def _serve(self, channel):
        while True:
            frame = channel.recv()
            self.asked.release()
            reply = self._answer(frame)
            for each in reply if type(reply) is tuple else [reply] if reply else []:
                channel.send(each)

    def close(self):
        self.watcher.close()
        self.watcher.join(5.0)
        self.listener.close(5.0)
        assert "watch-experts-0" not in {thread.name for thread in threading.enumerate()}


def test_a_watch_that_cannot_be_kept_is_a_loss():
    lost: queue.Queue = queue.Queue()

    def connect_to(address):
        raise RuntimeError("can't start new thread")

    watcher = Watcher(
        Address("experts-0", "n", "nowhere"), connect_to, load_config(None, {}).control, lambda *_: None,
        lambda *loss: lost.put(loss),
    )  # fmt: skip
    name, why, detail = lost.get(timeout=10)
    assert (name, why) == ("experts-0", Loss.ERROR)
    assert "new thread" in detail
    watcher.join(5.0)


@pytest.fixture
def watched(tmp_path):
    made = []

    def make(answer, **settings):
        folder = tmp_path / "s"
        folder.mkdir(mode=0o700)
        made.append(Watched(folder, answer, **settings))
        return made[0]

    yield make
    made[0].close()


def report(frame, number=None):
    tree = report_tree(ExpertReport("experts-0", "i", forwards=7))
    return Frame(Op.STATS, frame.id if number is None else number, meta=tree)


def test_reports_come_again_and_again(watched):
    actor = watched(report)
    for _ in range(3):
        name, said = actor.reports.get(timeout=10)
        assert (name, said.forwards) == ("experts-0", 7)
    assert actor.lost.empty()


def test_a_broken_channel_is_a_loss_at_once(watched):
    actor = watched(report, **{"control.silence_s": 60.0})
    actor.reports.get(timeout=10)
    actor.listener.close(5.0)
    assert actor.lost.get(timeout=10)[:2] == ("experts-0", Loss.CLOSED)


def test_silence_is_a_loss(watched):
    actor = watched(lambda frame: None)
    assert actor.lost.get(timeout=10) == ("experts-0", Loss.SILENT, "silent for 0.5 s")
    assert actor.reports.empty()


def test_a_suspect_that_does_not_answer_is_lost_before_its_silence_is_up(watched):
    actor = watched(lambda frame: None, **{"control.silence_s": 60.0})
    assert actor.asked.acquire(timeout=10)
    actor.watcher.probe()
    assert actor.lost.get(timeout=20)[2] == "silent for 1 s"


def test_a_suspicion_that_is_repeated_gives_no_more_time(watched):
    actor = watched(lambda frame: None, **{"control.silence_s": 60.0})
    assert actor.asked.acquire(timeout=10)
    while actor.lost.empty():
        actor.watcher.probe()
        actor.watcher.join(0.1)
        assert actor.watcher._thread.is_alive() or not actor.lost.empty()
    assert actor.lost.get()[2] == "silent for 1 s"


def test_a_suspect_that_answers_is_asked_at_once_and_stays(watched):
    actor = watched(report, **{"control.report_s": 3600.0})
    actor.reports.get(timeout=10)
    actor.watcher.probe()
    actor.reports.get(timeout=10)
    assert actor.lost.empty()


def test_a_suspect_has_its_time_from_then_on_whatever_it_was_asked_before(watched):
    """The answer comes 0.8 s after the suspicion, and 1.6 s after the question."""
    never = threading.Event()

    def slowly(frame):
        never.wait(1.6)
        return report(frame)

    actor = watched(slowly, **{"control.report_s": 3600.0, "control.silence_s": 60.0})
    assert actor.asked.acquire(timeout=10)
    never.wait(0.8)
    actor.watcher.probe()
    actor.reports.get(timeout=10)
    assert actor.lost.empty()


def test_an_actor_that_cannot_be_dialled_for_a_fault_of_ours_is_lost_with_the_reason():
    def dial(address):
        raise ConfigError("config key wire.tls_cert: cannot read it")

    lost = queue.Queue()
    watcher = Watcher(
        Address("experts-0", "n", None), dial, load_config().control, lambda *_: None, lambda *loss: lost.put(loss)
    )
    assert lost.get(timeout=10) == ("experts-0", Loss.ERROR, "config key wire.tls_cert: cannot read it")
    watcher.join(5.0)


def test_a_goodbye_is_no_loss(watched):
    actor = watched(lambda frame: (Frame(Op.GOODBYE), report(frame)))
    for _ in range(3):
        actor.reports.get(timeout=10)
    assert actor.lost.empty()


def test_what_is_no_report_is_a_loss(watched):
    actor = watched(lambda frame: Frame(Op.STATS, frame.id, meta={"kind": "expert", "nonsense": 1}))
    _, why, detail = actor.lost.get(timeout=10)
    assert why is Loss.ERROR
    assert "cannot be read" in detail


def test_nobody_there_is_a_loss(tmp_path):
    lost: queue.Queue = queue.Queue()
    (tmp_path / "s").mkdir(mode=0o700)
    listener = Listener(identity("experts-9"), WIRE, lambda channel: None, tmp_path / "s")
    address = listener.start()
    listener.close(5.0)
    watcher = Watcher(
        address, lambda to: connect(to, identity("controller"), WIRE, timeout=5.0), load_config(None, {}).control,
        lambda *_: None, lambda name, why, detail: lost.put(name),
    )  # fmt: skip
    assert lost.get(timeout=10) == "experts-9"
    watcher.join(5.0)
