"""Both kinds of channel keep one contract: frames, deadlines, closing, and peers that die or stop."""

from __future__ import annotations

import logging
import os
import resource
import select
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest
import torch

from moeray.buffers import ALIGN
from moeray.errors import ChannelClosedError, ChannelTimeoutError, WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.frame import Frame, Op
from moeray.wire.grpc_dial import dial_grpc
from moeray.wire.tcp import dial_tcp
from moeray.wire.unix_dial import dial_unix
from tests.wire.support import KINDS, SMALL, Host, echo, eventually
from tests.wire.test_frame import same, tensors_to_try


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of asyncio's half-made loop
@pytest.mark.parametrize(("dial", "address"), [
    (dial_tcp, Address("expert-0", "n", None, "127.0.0.1:9")),
    (dial_unix, Address("expert-0", "n", "/tmp/nobody")),
    (lambda address, wire, _: dial_grpc(address, wire), Address("expert-0", "n", None, None, "127.0.0.1:9")),
])  # fmt: skip
def test_a_process_without_a_free_descriptor_is_told_so(dial, address):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(ChannelClosedError, match=r"no socket for expert-0 .* raise `ulimit -n`"):
            dial(address, SMALL, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_every_tensor_comes_back_both_ways(host, kind):
    near, far = host.pair(kind)
    assert (near.kind, near.peer, far.kind, far.peer) == (kind, "expert-0", kind, "router-0")
    for sender, receiver in ((near, far), (far, near)):
        for turn, tensor in enumerate(tensors_to_try()):
            sender.send(Frame(Op.FORWARD, turn, 3, 9, {"turn": turn}, (tensor, tensor)))
            frame = receiver.recv(5.0)
            assert (frame.op, frame.id, frame.layer, frame.epoch, frame.meta) == (
                Op.FORWARD,
                turn,
                3,
                9,
                {"turn": turn},
            )
            assert all(same(tensor, got) and got.data_ptr() % ALIGN == 0 for got in frame.tensors)
    near.close()


@pytest.mark.parametrize("size", [1, 40_000, 300_000, 5_000_000])
def test_payloads_of_all_sizes_come_back(host, kind, size):
    near, far = host.pair(kind)
    answering = threading.Thread(target=echo, args=(far,))
    answering.start()
    sent = torch.randint(0, 255, (size,), dtype=torch.uint8)
    for turn in range(6):
        near.send(Frame(Op.FORWARD, turn, tensors=(sent,)))
        frame = near.recv(20.0)
        assert frame.id == turn
        assert torch.equal(frame.tensors[0], sent)
    near.close()
    answering.join()


def test_recv_times_out_and_the_channel_stays_usable(host, kind):
    near, far = host.pair(kind)
    begun = monotonic()
    for timeout in (0.05, 0.0, -1.0):
        with pytest.raises(ChannelTimeoutError):
            near.recv(timeout)
    assert 0.05 <= monotonic() - begun < 2.0
    far.send(Frame(Op.PONG, 4))
    assert near.recv(5.0).id == 4
    near.close()


def test_what_cannot_be_sent_leaves_the_channel_open(host, kind):
    near, far = host.pair(kind)
    with pytest.raises(WireError, match="complex64"):
        near.send(Frame(Op.FORWARD, tensors=(torch.ones(2, dtype=torch.complex64),)))
    near.send(Frame(Op.PING, 1))
    assert far.recv(5.0).id == 1
    near.close()


@pytest.mark.parametrize("closer", ["near", "far"])
def test_close_wakes_both_sides(host, kind, closer):
    near, far = host.pair(kind)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(end.recv) for end in (near, far)]
        (near if closer == "near" else far).close()
        for future in waiting:
            with pytest.raises(ChannelClosedError):
                future.result(timeout=10.0)
    assert eventually(lambda: near.closed and far.closed)
    for end in (near, far):
        end.close()
        end.close()
        with pytest.raises(ChannelClosedError):
            end.send(Frame(Op.PING))
        with pytest.raises(ChannelClosedError):
            end.recv(1.0)


def test_frames_sent_before_close_still_arrive(host, kind):
    near, far = host.pair(kind)
    for turn in range(5):
        near.send(Frame(Op.GOODBYE, turn, tensors=(torch.full((100,), turn),)))
    near.close()
    assert [far.recv(5.0).id for _ in range(5)] == list(range(5))
    with pytest.raises(ChannelClosedError):
        far.recv(5.0)


@pytest.mark.parametrize("closer", ["near", "far"])
def test_what_was_never_read_troubles_nobody(host, kind, closer, caplog):
    near, far = host.pair(kind)
    ends = (near, far) if closer == "near" else (far, near)
    ends[1].send(Frame(Op.PONG, 1, tensors=(torch.ones(20_000),)))
    arrived, _, _ = select.select([ends[0]._connection.sock], [], [], 5.0)
    assert arrived
    ends[0].close()
    with pytest.raises(ChannelClosedError):
        ends[1].recv(5.0)
    ends[1].close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_many_threads_may_send_on_one_channel(host, kind):
    near, far = host.pair(kind)

    def send(worker: int) -> None:
        for turn in range(20):
            near.send(Frame(Op.SUBMIT, worker * 100 + turn, tensors=(torch.full((9000,), worker * 100 + turn),)))

    with ThreadPoolExecutor(8) as pool:
        sends = [pool.submit(send, worker) for worker in range(8)]
        got = []
        for _ in range(160):
            frame = far.recv(10.0)
            assert (frame.tensors[0] == frame.id).all()
            got.append(frame.id)
        for future in sends:
            future.result()
    assert sorted(got) == sorted(worker * 100 + turn for worker in range(8) for turn in range(20))
    for worker in range(8):  # each thread's frames keep their order
        assert [i for i in got if i // 100 == worker] == [worker * 100 + turn for turn in range(20)]
    near.close()


def test_many_channels_at_once(host, kind):
    pairs = [host.pair(kind) for _ in range(12)]
    with ThreadPoolExecutor(12) as pool:
        echoes = [pool.submit(echo, far) for _, far in pairs]
        for turn in range(5):
            for number, (near, _) in enumerate(pairs):
                near.send(Frame(Op.FORWARD, turn, tensors=(torch.full((20_000,), number),)))
            for number, (near, _) in enumerate(pairs):
                frame = near.recv(10.0)
                assert frame.id == turn
                assert (frame.tensors[0] == number).all()
        for near, _ in pairs:
            near.close()
        for future in echoes:
            future.result(timeout=10.0)


def test_limits_of_the_config_hold_on_a_channel(folder, kind):
    host = Host(folder, WireConfig(max_payload_bytes=1 << 16, max_header_bytes=1 << 16))
    near, _ = host.pair(kind)
    with pytest.raises(WireError, match="max_payload_bytes"):
        near.send(Frame(Op.FORWARD, tensors=(torch.ones(1 << 15),)))
    near.close()
    host.close()


def test_a_peer_with_larger_limits_is_cut_off(folder, kind):
    host = Host(folder, WireConfig(max_payload_bytes=1 << 16, shared_memory_bytes=0))
    host.wire = WireConfig(max_payload_bytes=1 << 24)
    near, far = host.pair(kind)
    near.send(Frame(Op.FORWARD, tensors=(torch.ones(1 << 17),)))
    with pytest.raises(WireError):
        far.recv(5.0)
    with pytest.raises(ChannelClosedError):
        near.recv(5.0)
    near.close()
    host.close()


def test_a_killed_peer_is_seen_at_once(other):
    channels = [other.dial(kind) for kind in KINDS]
    for channel in channels:
        channel.send(Frame(Op.PING, 1, tensors=(torch.ones(50_000),)))
        assert channel.recv(10.0).id == 1
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(channel.recv, 30.0) for channel in channels]
        other.process.send_signal(signal.SIGKILL)
        begun = monotonic()
        for future in waiting:
            with pytest.raises(ChannelClosedError):
                future.result(timeout=10.0)
    assert monotonic() - begun < 2.0
    for channel in channels:
        with pytest.raises(ChannelClosedError):
            channel.send(Frame(Op.PING))
        channel.close()


def send_until_it_times_out(channel, payload: torch.Tensor) -> tuple[int, float]:
    """How many frames went out, and the seconds that the one which did not took."""
    for count in range(100_000):
        begun = monotonic()
        try:
            channel.send(Frame(Op.FORWARD, count, tensors=(payload,)))
        except ChannelTimeoutError:
            return count, monotonic() - begun
    raise AssertionError("a stopped peer never stopped the sender")


def test_a_stopped_peer_times_out_and_goes_on_where_it_was(other):
    wire = WireConfig(send_timeout_s=0.5, shared_memory_bytes=1 << 20)
    channels = [other.dial(kind, wire) for kind in KINDS]
    other.process.send_signal(signal.SIGSTOP)
    os.waitpid(other.process.pid, os.WUNTRACED)
    payload = torch.ones(30_000)
    sent = []
    for channel in channels:
        with pytest.raises(ChannelTimeoutError):
            channel.recv(0.2)
        count, took = send_until_it_times_out(channel, payload)
        assert took < 5.0
        assert not channel.closed
        sent.append(count)
    other.process.send_signal(signal.SIGCONT)
    for channel, count in zip(channels, sent, strict=True):
        for turn in range(count):
            assert channel.recv(20.0).id == turn
        channel.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def wire_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "wire" in thread.name}


def use_and_close(folder, kind) -> None:
    host = Host(folder, SMALL)
    for _ in range(3):
        near, far = host.pair(kind)
        near.send(Frame(Op.FORWARD, tensors=(torch.ones(50_000),)))
        far.recv(5.0)
        near.close()
    abandoned, _ = host.pair(kind)  # the listener ends first
    host.close()
    abandoned.close()


def test_no_thread_and_no_descriptor_is_left(folder, kind):
    use_and_close(folder, kind)  # gRPC opens its own machinery once
    threads, files = threading.active_count(), open_files()
    for _ in range(3):
        use_and_close(folder, kind)
    assert eventually(lambda: threading.active_count() <= threads and open_files() <= files), (
        [thread.name for thread in threading.enumerate()],
        open_files() - files,
    )
    assert not wire_threads()
    assert not list(folder.iterdir())
