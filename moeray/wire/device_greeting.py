"""How the two ends of a proven channel come to rings on a device: each shows the other that it reads what is there.

    dialling side                                          listening side
    DEVICE  its ring, a pattern written there        ->
                                                     <-    DEVICE  its ring, the pattern inverted there; what it read
    DEVICE  agreed                                   ->

Whoever cannot says DEVICE with `refused` instead, and why; that ends it, and the channel goes on without.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from time import monotonic
from typing import Any, TypeVar

import torch

from moeray.buffers import ALIGN
from moeray.errors import WireError, one_line
from moeray.wire.device_memory import DeviceMemory, Region
from moeray.wire.device_rings import DeviceRings, OwnRing, PeersRing
from moeray.wire.device_side import DeviceSide
from moeray.wire.frame import Frame, Op
from moeray.wire.lifeline import take_hold
from moeray.wire.ring import RingReader
from moeray.wire.socket_channel import SocketChannel

log = logging.getLogger(__name__)

PATTERN_BYTES = 64
_MOST_BYTES = 1 << 40

_R = TypeVar("_R")


class _RefusedError(Exception):
    """Why there are no rings on a device, in words for the log."""


def offer(channel: SocketChannel, side: DeviceSide, deadline: float) -> DeviceRings | None:
    """The dialling side. None where it cannot be, which is logged, and raises WireError where it must be; raises what
    the channel does, ChannelTimeoutError at the deadline (of time.monotonic)."""
    try:
        return _offer(channel, side, deadline)
    except _RefusedError as refused:
        side.go_without(channel.peer, str(refused))
        return None


def _offer(channel: SocketChannel, side: DeviceSide, deadline: float) -> DeviceRings:
    writer, reader = channel.host_rings
    pattern = secrets.token_bytes(PATTERN_BYTES)
    with ExitStack() as undo:
        own = _try(channel, lambda: side.new_ring(writer))
        undo.callback(_retire, own, side)
        _try(channel, lambda: _write(own.region, pattern, side.memory))
        channel.send(_introduction(own, side, b""))
        answer = _hear(channel, deadline)
        own.lifeline.handed_over()
        peers = _try(channel, lambda: _open(answer, side, reader))
        undo.callback(peers.close)
        _try(channel, lambda: _compare(answer.get("read"), pattern, "the peer reads"))
        _try(channel, lambda: _compare(_read(peers.region), _inverted(pattern), "this side reads"))
        channel.send(Frame(Op.DEVICE, meta={"agreed": True}))
        undo.pop_all()
        return DeviceRings(side.memory, own, peers, side.retired)


def take_offer(channel: SocketChannel, side: DeviceSide, deadline: float) -> DeviceRings | None:
    """The listening side. None where either cannot; the dialling side says so in its log. Raises what the channel
    does."""
    try:
        return _take_offer(channel, side, deadline)
    except _RefusedError as refused:
        log.debug("rows of %s go through the host's memory: %s", channel.peer, refused)
        return None


def _take_offer(channel: SocketChannel, side: DeviceSide, deadline: float) -> DeviceRings:
    writer, reader = channel.host_rings
    asked = _hear(channel, deadline)
    with ExitStack() as undo:
        peers = _try(channel, lambda: _open(asked, side, reader))
        undo.callback(peers.close)
        pattern = _try(channel, lambda: _read(peers.region))
        own = _try(channel, lambda: side.new_ring(writer))
        undo.callback(_retire, own, side)
        _try(channel, lambda: _write(own.region, _inverted(pattern), side.memory))
        channel.send(_introduction(own, side, pattern))
        _hear(channel, deadline)
        own.lifeline.handed_over()
        undo.pop_all()
        return DeviceRings(side.memory, own, peers, side.retired)


def _try(channel: SocketChannel, step: Callable[[], _R]) -> _R:
    """What may fail on a device; the peer is told."""
    try:
        return step()
    except (WireError, RuntimeError) as error:  # torch raises the latter for a device's failures
        why = one_line(error)[:300]
        channel.send(Frame(Op.DEVICE, meta={"refused": why}))
        raise _RefusedError(why) from error


def _hear(channel: SocketChannel, deadline: float) -> Mapping[str, Any]:
    frame = channel.recv(max(0.0, deadline - monotonic()))
    if frame.op is not Op.DEVICE:
        raise WireError(f"{channel.peer} sent {frame.op.name} instead of DEVICE; run one release of moeray everywhere")
    if "refused" in frame.meta:
        raise _RefusedError(f"{channel.peer} says: {one_line(ValueError(frame.meta['refused']))[:300]}")
    return frame.meta


def _introduction(own: OwnRing, side: DeviceSide, read: bytes) -> Frame:
    region = own.region
    meta = {
        "kind": side.memory.kind, "name": region.device_name, "handle": region.handle, "bytes": len(region.memory),
        "lifeline": own.lifeline.path, "read": read,
    }  # fmt: skip
    return Frame(Op.DEVICE, meta=meta)


def _open(meta: Mapping[str, Any], side: DeviceSide, host: RingReader) -> PeersRing:
    kind, name, handle, nbytes, lifeline = (meta.get(key) for key in ("kind", "name", "handle", "bytes", "lifeline"))
    if not (type(name) is type(lifeline) is str and type(handle) is bytes and type(nbytes) is int):
        raise WireError("the peer's DEVICE frame names no memory; run one release of moeray everywhere")
    if not PATTERN_BYTES <= nbytes < _MOST_BYTES or nbytes % ALIGN:
        raise WireError(f"the peer names a ring of {nbytes} bytes; set wire.shared_memory_bytes alike on both sides")
    if kind != side.memory.kind:
        raise WireError(f"the peer's memory is of the kind {kind!r}, this side's {side.memory.kind}")
    held = take_hold(lifeline)
    try:
        return PeersRing(side.memory.open(handle, name, nbytes), held, host)
    except BaseException:
        os.close(held)
        raise


def _retire(own: OwnRing, side: DeviceSide) -> None:
    own.lifeline.handed_over()
    side.retired.add(own.region, own.lifeline)


def _write(region: Region, data: bytes, memory: DeviceMemory) -> None:
    region.memory[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    memory.settle()


def _read(region: Region) -> bytes:
    data: bytes = region.memory[:PATTERN_BYTES].cpu().numpy().tobytes()
    return data


def _inverted(data: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in data)


def _compare(found: object, wanted: bytes, who: str) -> None:
    if found != wanted:
        raise WireError(f"{who} something else in the device's memory than was written there")
