"""One frame as bytes, with no pickle and nothing allocated before its lengths pass the limits.

    u32 header length | u32 payload length | msgpack header | pad | tensor 0 | pad | tensor 1 | pad ...

Little endian. Header and tensors each start at a multiple of 64 bytes from the frame's start. The header is the msgpack
array [version, op, id, layer, epoch, meta, shapes, dtypes, where]: `where` is INLINE when the payload follows, else the
payload's position in the sender's shared memory ring.

This module imports no torch: frames without tensors are all that an endpoint knows.
"""

from __future__ import annotations

import reprlib
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np

from moeray.buffers import ALIGN, Bytes, aligned, new_buffer
from moeray.errors import WireError
from moeray.wire.spans import BOOL, Span, spans_of

if TYPE_CHECKING:
    from torch import Tensor

WIRE_VERSION = 2
INLINE = -1
PREFIX = struct.Struct("<II")

_PAD = bytes(ALIGN)


class Op(IntEnum):
    """What a frame asks or answers."""

    HELLO = 1
    WELCOME = 2
    PROOF = 3
    FORWARD = 4
    RESULT = 5
    ERROR = 6
    SUBMIT = 7
    ABORT = 8
    STEP = 9
    PING = 10
    PONG = 11
    STATS = 12
    GOODBYE = 13
    DEVICE = 14


_OPS = {int(op): op for op in Op}


_NOTHING: Mapping[str, Any] = {}


class Frame(NamedTuple):
    """One message. `meta` is plain data (msgpack: tuples arrive as lists) with text keys; `tensors` are on the CPU.

    Tensors of a received frame are valid until the next `recv` on its channel; clone what must live longer.
    """

    op: Op
    id: int = 0
    layer: int = -1
    epoch: int = 0
    meta: Mapping[str, Any] = _NOTHING
    tensors: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Limits:
    """The largest header and payload, in bytes, that a side accepts or sends; both below 4 GiB."""

    max_header_bytes: int
    max_payload_bytes: int


class VersionMismatchError(WireError):
    """The peer speaks another version of the wire."""


class Header(NamedTuple):
    """A checked header: `spans` holds (code, shape, elements, offset in the payload) of each tensor; `body` is where
    the frame's payload begins if it is inline."""

    op: Op
    id: int
    layer: int
    epoch: int
    meta: dict[str, Any]
    spans: list[Span]
    where: int
    body: int
    payload_bytes: int


class _Packers(threading.local):
    """A packer is not thread-safe and costs a buffer, so each thread keeps one."""

    def __init__(self) -> None:
        self.packer = msgpack.Packer(use_bin_type=True)


_PACKERS = _Packers()


def chunks_of(frame: Frame) -> tuple[list[memoryview], int]:
    """The bytes of its tensors, one flat view each, and the payload length with padding.

    Contiguous tensors are not copied. Raises WireError for a tensor that the wire does not carry.
    """
    if not frame.tensors:
        return [], 0
    from moeray.wire.tensors import flatten

    return flatten(frame.tensors)


def pack_head(frame: Frame, payload_bytes: int, where: int, limits: Limits) -> bytes:
    """Prefix, header and pad: all of the frame but its payload. Raises WireError over a limit or for bad `meta`."""
    shapes: list[tuple[int, ...]] = []
    codes: list[int] = []
    if frame.tensors:
        from moeray.wire.tensors import CODES

        shapes = [tuple(tensor.shape) for tensor in frame.tensors]
        codes = [CODES[tensor.dtype] for tensor in frame.tensors]
    fields = [WIRE_VERSION, frame.op, frame.id, frame.layer, frame.epoch, frame.meta, shapes, codes, where]
    try:
        header: bytes = _PACKERS.packer.pack(fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"frame {frame.op.name}: its fields are not plain data ({error}); send plain data") from error
    if len(header) > limits.max_header_bytes:
        raise WireError(_over(frame, "header", len(header), limits.max_header_bytes))
    if payload_bytes > limits.max_payload_bytes:
        raise WireError(_over(frame, "payload", payload_bytes, limits.max_payload_bytes))
    size = PREFIX.size + len(header)
    return PREFIX.pack(len(header), payload_bytes) + header + _PAD[: aligned(size) - size]


def _over(frame: Frame, part: str, size: int, limit: int) -> str:
    return f"frame {frame.op.name}: its {part} of {size} bytes is over wire.max_{part}_bytes ({limit}); split it"


def inline_buffers(head: bytes, chunks: list[memoryview]) -> list[bytes | memoryview]:
    """The buffers that follow each other on the wire when the payload is inline, pads included."""
    buffers: list[bytes | memoryview] = [head]
    for chunk in chunks:
        if chunk.nbytes:
            buffers.append(chunk)
            if pad := -chunk.nbytes % ALIGN:
                buffers.append(_PAD[:pad])
    return buffers


def encode(frame: Frame, limits: Limits) -> list[bytes | memoryview]:
    """The frame with its payload inline, as buffers for `sendmsg` or `b"".join`. Raises WireError."""
    chunks, size = chunks_of(frame)
    return inline_buffers(pack_head(frame, size, INLINE, limits), chunks)


def check_lengths(header_bytes: int, payload_bytes: int, limits: Limits) -> None:
    """Raise WireError unless both lengths of a prefix are within the limits."""
    if header_bytes > limits.max_header_bytes:
        raise WireError(f"the peer announced a header of {header_bytes} bytes, limit {limits.max_header_bytes}")
    if payload_bytes > limits.max_payload_bytes:
        raise WireError(f"the peer announced a payload of {payload_bytes} bytes, limit {limits.max_payload_bytes}")


def unpack_header(data: memoryview, payload_bytes: int) -> Header:
    """Check a header against its payload length. Raises WireError (VersionMismatchError for another version)."""
    try:
        fields = msgpack.unpackb(data, strict_map_key=False, ext_hook=_no_extension)
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        raise WireError(f"the peer's header is not msgpack ({type(error).__name__}); the channel is closed") from error
    if type(fields) is not list or not fields or type(fields[0]) is not int:
        raise WireError("the peer's header is not one of moeray's; is another program speaking on this channel?")
    if fields[0] != WIRE_VERSION:
        raise VersionMismatchError(
            f"the peer speaks wire version {fields[0]}, this side {WIRE_VERSION}; run one release of moeray everywhere"
        )
    if len(fields) != 9:
        raise WireError(f"the peer's header has {len(fields)} fields instead of 9; the channel is closed")
    _, op, frame_id, layer, epoch, meta, shapes, codes, where = fields
    if type(op) is not int or op not in _OPS:
        raise WireError(f"the peer sent the unknown op {reprlib.repr(op)}; run one release of moeray everywhere")
    if not (type(frame_id) is type(layer) is type(epoch) is type(where) is int):
        raise WireError("the peer's header holds something else than a whole number for id, layer, epoch or place")
    if type(meta) is not dict or not all(type(key) is str for key in meta):
        raise WireError("the peer's header holds meta that is not a mapping with text keys")
    spans, body = spans_of(shapes, codes, payload_bytes), aligned(PREFIX.size + len(data))
    return Header(_OPS[op], frame_id, layer, epoch, meta, spans, where, body, payload_bytes)


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def build_frame(header: Header, memory: memoryview, start: int) -> Frame:
    """A frame whose tensors are views of `memory` from byte `start` on; the caller has checked that they lie inside.

    Raises WireError for a bool tensor with bytes other than 0 and 1, which torch must never see.
    """
    for code, _, elements, offset in header.spans:
        if code == BOOL and elements and np.frombuffer(memory, np.uint8, elements, start + offset).max() > 1:
            raise WireError("the peer sent a bool tensor with values other than 0 and 1")
    tensors: Sequence[Tensor] = ()
    if header.spans:
        from moeray.wire.tensors import Tensors

        tensors = Tensors(memory, start, header.spans)
    return Frame(header.op, header.id, header.layer, header.epoch, header.meta, tensors)


def decode(message: bytes | bytearray | memoryview, limits: Limits, memory: Bytes | None = None) -> Frame:
    """A frame from one whole message with an inline payload, which is copied into `memory` (or into new memory).

    Raises WireError, and nothing else, for whatever is not such a message.
    """
    view = memoryview(message)
    if len(view) < PREFIX.size:
        raise WireError(f"the peer sent {len(view)} bytes, which is no frame")
    header_bytes, payload_bytes = PREFIX.unpack_from(view)
    check_lengths(header_bytes, payload_bytes, limits)
    body = aligned(PREFIX.size + header_bytes)
    if len(view) != body + payload_bytes:
        raise WireError(f"the peer sent {len(view)} bytes for a frame of {body + payload_bytes}")
    header = unpack_header(view[PREFIX.size : PREFIX.size + header_bytes], payload_bytes)
    if header.where != INLINE:
        raise WireError("the peer names shared memory on a channel that has none")
    if memory is None or memory.nbytes < payload_bytes:
        memory = new_buffer(payload_bytes)
    memory[:payload_bytes] = np.frombuffer(view, np.uint8, payload_bytes, body) if payload_bytes else 0
    return build_frame(header, memory.data, 0)
