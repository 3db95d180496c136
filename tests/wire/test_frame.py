"""The codec: every tensor comes back as it was, and hostile bytes raise WireError and nothing else."""

from __future__ import annotations

import struct
import tracemalloc

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeray.buffers import ALIGN, aligned
from moeray.errors import WireError
from moeray.wire.frame import (
    BOOL,
    INLINE,
    PREFIX,
    WIRE_VERSION,
    Frame,
    Limits,
    Op,
    VersionMismatchError,
    decode,
    encode,
)
from moeray.wire.spans import SIZES
from moeray.wire.tensors import DTYPES

LIMITS = Limits(1 << 16, 1 << 20)
GOOD = [WIRE_VERSION, int(Op.FORWARD), 1, 2, 3, {}, [[4]], [0], INLINE]


def message(frame: Frame) -> bytes:
    return b"".join(encode(frame, LIMITS))


def same(sent: torch.Tensor, got: torch.Tensor) -> bool:
    """Equal to the bit: NaN and float8, which have no equality of their own, included."""
    flat = [torch.empty(x.shape, dtype=x.dtype).copy_(x.detach()).view(-1).view(torch.uint8) for x in (sent, got)]
    return sent.dtype == got.dtype and sent.shape == got.shape and torch.equal(*flat)


def raw(fields: object, payload: bytes = bytes(64)) -> bytes:
    """A message with any header at all."""
    header = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    pad = bytes(aligned(PREFIX.size + len(header)) - PREFIX.size - len(header))
    return PREFIX.pack(len(header), len(payload)) + header + pad + payload


def with_field(index: int, value: object) -> list[object]:
    return [*GOOD[:index], value, *GOOD[index + 1 :]]


def tensors_to_try() -> list[torch.Tensor]:
    bits = torch.arange(48, dtype=torch.int64)
    tensors = [(bits % 2 if dtype is torch.bool else bits).to(dtype).view(6, 8) for dtype in DTYPES]
    grid = torch.arange(24.0).view(4, 6)
    odd = [torch.tensor(3.5), torch.empty(0), torch.empty(0, 7, dtype=torch.bfloat16), torch.empty(3, 0, 2)]
    strided = [
        grid.t(),
        grid[:, ::2],
        grid[1:2, 3:],
        torch.arange(9)[::4][1:2],
        torch.ones(1).expand(5, 3),
        grid.clone().requires_grad_(),
    ]
    return tensors + odd + strided + [torch.tensor([float("nan"), float("inf"), -0.0])]


@pytest.mark.parametrize("tensor", tensors_to_try(), ids=lambda t: f"{str(t.dtype)[6:]}-{tuple(t.shape)}")
def test_a_tensor_comes_back_as_it_was(tensor):
    frame = decode(message(Frame(Op.FORWARD, tensors=(tensor, torch.tensor([1, 2])))), LIMITS)
    assert same(tensor, frame.tensors[0])
    assert frame.tensors[1].tolist() == [1, 2]


def test_all_fields_come_back():
    meta = {"text": "a", "bytes": b"b", "list": [1, 2.5, None, True], "by_id": {7: -0.5}}
    frame = decode(message(Frame(Op.STEP, 1 << 60, 61, 12, meta)), LIMITS)
    assert frame == Frame(Op.STEP, 1 << 60, 61, 12, meta)


def test_received_tensors_are_aligned_and_writable():
    frame = decode(message(Frame(Op.RESULT, tensors=tuple(torch.ones(n) for n in (1, 17, 33)))), LIMITS)
    for tensor in frame.tensors:
        assert tensor.data_ptr() % ALIGN == 0
        tensor.add_(1)


def test_encoding_does_not_copy_contiguous_tensors():
    tensor = torch.ones(1000)
    buffers = encode(Frame(Op.FORWARD, tensors=(tensor,)), LIMITS)
    assert np.frombuffer(buffers[1], np.uint8).ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        (Frame(Op.FORWARD, tensors=(torch.ones(2, dtype=torch.complex64),)), "complex64"),
        (Frame(Op.FORWARD, tensors=(torch.ones(2, device="meta"),)), "meta"),
        (Frame(Op.FORWARD, tensors=(torch.ones(2, 2).to_sparse(),)), "sparse"),
        (Frame(Op.FORWARD, tensors=(torch.ones([1] * 9),)), "9 dimensions"),
        (Frame(Op.FORWARD, tensors=(torch.ones(1),) * 200), "200"),
        (Frame(Op.FORWARD, meta={"x": object()}), "plain data"),
        (Frame(Op.FORWARD, id=1 << 70), "plain data"),
        (Frame(Op.FORWARD, meta={"x": "y" * (1 << 17)}), "max_header_bytes"),
        (Frame(Op.FORWARD, tensors=(torch.ones(1 << 19),)), "max_payload_bytes"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(frame, named):
    with pytest.raises(WireError, match=named):
        encode(frame, LIMITS)
    message(Frame(Op.PING))  # the packer is in order again


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x01\x02",
        raw(GOOD)[:-1],
        raw(GOOD) + b"x",
        raw(GOOD, bytes(128)),
        raw(b""),
        raw(b"\xc1"),
        raw(b"\x91" * 5000),  # nested beyond any stack
        raw(b"\xdd\x7f\xff\xff\xff"),  # a list of two thousand million items
        raw(msgpack.packb(GOOD) + b"\x00"),
        raw({}),
        raw([]),
        raw(GOOD[:8]),
        raw([*GOOD, 0]),
        raw(with_field(0, "1")),
        raw(with_field(1, 99)),
        raw(with_field(1, [1])),
        raw(with_field(2, 1.0)),
        raw(with_field(3, None)),
        raw(with_field(4, True)),
        raw(with_field(5, [])),
        raw(with_field(5, {1: 2})),
        raw(with_field(5, msgpack.ExtType(5, b"x"))),
        raw(with_field(6, [[17]])),
        raw(with_field(6, [[-4]])),
        raw(with_field(6, [[-2, -2]])),
        raw(with_field(6, [[1 << 62, 4, 4]])),
        raw(with_field(6, [[1 << 62, 1 << 62, 0]]), b""),
        raw(with_field(6, [[4.0]])),
        raw(with_field(6, [[True]])),
        raw(with_field(6, [[1] * 9])),
        raw(with_field(6, [4])),
        raw(with_field(6, [[4], [4]])),
        raw(with_field(6, {})),
        raw(with_field(7, [10])),
        raw(with_field(7, [-1])),
        raw(with_field(7, ["float32"])),
        raw([WIRE_VERSION, int(Op.FORWARD), 1, 2, 3, {}, [[4]], [8], INLINE], b"\x02" + bytes(63)),  # bool of value 2
        raw(with_field(8, 0)),  # shared memory on a channel without
        raw(with_field(8, "0")),
    ],
)
def test_hostile_messages_raise_wire_error(bad):
    with pytest.raises(WireError):
        decode(bad, LIMITS)


def test_another_version_is_named():
    with pytest.raises(VersionMismatchError, match=f"version {WIRE_VERSION + 1}"):
        decode(raw([WIRE_VERSION + 1, "whatever that release has here"]), LIMITS)


@pytest.mark.parametrize(
    "lengths", [(LIMITS.max_header_bytes + 1, 0), (10, LIMITS.max_payload_bytes + 1), (2**32 - 1,) * 2]
)
def test_oversized_lengths_are_refused_before_allocation(lengths):
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="announced"):
            decode(struct.pack("<II", *lengths), LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def decodes_or_refuses(data: bytes) -> None:
    try:
        frame = decode(data, LIMITS)
    except WireError:
        return
    for tensor in frame.tensors:
        tensor.clone()  # reads every byte; sums and the like are not there for each dtype


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_fuzz_noise(data):
    decodes_or_refuses(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 500), st.integers(0, 255), st.integers(0, 500), st.integers(0, 255))
@example(1, 0, 226, 9)  # float8
def test_fuzz_flipped_bytes(at, value, at2, value2):
    tensors = (torch.arange(8), torch.ones(3, 2).bool())
    data = bytearray(message(Frame(Op.FORWARD, 1, 2, 3, {"request": [1, "x"]}, tensors)))
    data[at % len(data)], data[at2 % len(data)] = value, value2
    decodes_or_refuses(bytes(data))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 8), ANYTHING, st.integers(0, 8), ANYTHING)
@example(6, [[2**63]], 7, [0])
def test_fuzz_well_formed_headers(at, value, at2, value2):
    fields = list(GOOD)
    fields[at], fields[at2] = value, value2
    decodes_or_refuses(raw(fields))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=5))
def test_any_mix_of_tensors_comes_back(specs):
    tensors = tuple(torch.ones(shape).to(dtype) for dtype, shape in specs)
    got = decode(message(Frame(Op.FORWARD, tensors=tensors)), LIMITS).tensors
    assert len(got) == len(tensors)
    assert all(same(a, b) for a, b in zip(tensors, got, strict=True))


def test_sizes_are_those_of_the_dtypes():
    assert tuple(dtype.itemsize for dtype in DTYPES) == SIZES
    assert DTYPES[BOOL] is torch.bool
