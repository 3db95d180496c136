"""Rows that go out and come in by way of the part in C: the same bytes and the same checks as in Python."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeray.buffers import aligned, new_buffer
from moeray.errors import WireError
from moeray.wire import row_message, rows
from moeray.wire.frame import (
    INLINE,
    PREFIX,
    WIRE_VERSION,
    Frame,
    Limits,
    Op,
    build_frame,
    check_lengths,
    decode,
    encode,
    pack_head,
    unpack_header,
)
from moeray.wire.row_message import Place, read_header
from moeray.wire.rows import Forward, Result, check_forward, put_rows
from moeray.wire.tensors import CODES, DTYPES, Tensors
from tests.wire.support import KINDS

pytestmark = pytest.mark.skipif(row_message.native is None, reason="the part in C was not compiled on this machine")

LIMITS = Limits(1 << 12, 1 << 20)
WIDE = Limits(1 << 30, (1 << 32) - 1)
SENT = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn]
NUMBERS = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-200, 70000)
fuzz = settings(deadline=None, max_examples=1500)


def ints(values):
    return np.array(values, np.int64).tobytes()


def random_tensor(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


@st.composite
def forwards(draw):
    tokens, width = draw(st.integers(1, 9)), draw(st.sampled_from([0, 1, 3, 8, 100]))
    used = sorted(draw(st.sets(st.integers(0, tokens - 1))))
    index = draw(st.lists(st.integers(0, max(len(used) - 1, 0)), max_size=30))
    experts = draw(st.lists(NUMBERS, max_size=20))
    counts = draw(st.lists(NUMBERS, min_size=len(experts), max_size=len(experts)))
    x_TD = random_tensor((tokens, width), draw(st.sampled_from(SENT)))
    return Forward(*draw(st.tuples(*[NUMBERS] * 3)), experts, counts, x_TD, ints(used), ints(index))


@st.composite
def results(draw):
    count, width, dtype = draw(st.integers(1, 9)), draw(st.sampled_from([1, 3, 8, 100])), draw(st.sampled_from(SENT))
    out = random_tensor((count, width), dtype)
    memory = memoryview(out.view(torch.uint8).numpy().reshape(-1))
    seconds = st.floats(allow_nan=False)
    return Result(
        *draw(st.tuples(*[NUMBERS] * 3)),
        draw(seconds),
        draw(seconds),
        dtype,
        Place(memory, out.data_ptr()),
        count,
        width,
    )


@given(forwards() | results())
@settings(deadline=None, max_examples=400)
def test_the_bytes_are_those_of_python(message):
    exact = b"".join(encode(message.frame(), WIDE))
    out = bytearray(b"\xff" * (len(exact) + 64))
    assert message.write(out, None, INLINE, WIDE.max_header_bytes) == len(exact)
    assert out == exact + b"\xff" * 64
    header_bytes, payload = PREFIX.unpack_from(exact)
    body = len(exact) - payload
    # With the payload elsewhere; and where something is too small, it stays untouched behind its end.
    ring = bytearray(b"\xff" * payload)
    if payload:
        assert message.write(out, memoryview(ring), 1 << 40, WIDE.max_header_bytes) is not None
        assert ring == exact[body:]
        head = pack_head(message.frame(), payload, 1 << 40, WIDE)
        assert out[: len(head)] == head
    assert message.write(bytearray(len(exact) - 1), None, INLINE, WIDE.max_header_bytes) is None
    assert message.write(out, None, INLINE, header_bytes - 1) is None
    assert message.write(bytearray(body), memoryview(bytearray(payload + 64)), 0, WIDE.max_header_bytes) is None
    for size in (0, 1, 8, 9, body - 1):
        assert message.write(bytearray(size), memoryview(ring), 0, WIDE.max_header_bytes) is None


def test_a_token_that_is_not_there_is_not_read():
    for token in (-1, 3, 1 << 60):
        with pytest.raises(TypeError, match="outside"):
            Forward(1, 2, 3, [0], [1], torch.ones(3, 4), ints([token]), ints([0])).write(bytearray(4096), None, -1, 999)


def test_a_dtype_that_is_not_carried_is_left_to_the_frame_to_refuse():
    assert (
        Forward(1, 2, 3, [], [], torch.ones(1, 1).double(), ints([0]), b"").write(bytearray(999), None, -1, 99) is None
    )


# -- reading: whatever C accepts, Python reads the same; nothing else is said, raised or touched -----------------------


def by_python(message, limits):
    """The header, or None where Python refuses it or needs more bytes."""
    if len(message) < PREFIX.size:
        return None
    header_bytes, payload_bytes = PREFIX.unpack_from(message)
    try:
        check_lengths(header_bytes, payload_bytes, limits)
        if aligned(PREFIX.size + header_bytes) > len(message):
            return None
        return unpack_header(memoryview(message)[PREFIX.size : PREFIX.size + header_bytes], payload_bytes)
    except WireError:
        return None


def check_reading(message, limits=LIMITS, start=0):
    """C's header is None or Python's. Bytes behind the end are such that reading them would tell."""
    # A block of its own of just this size, so that a sanitizer sees one byte too many.
    memory = bytearray(start) + message
    found = read_header(memoryview(memory), start, len(memory), limits)
    if found is not None:
        exact = by_python(bytes(message), limits)
        assert repr(found) == repr(exact)  # a number that is none, too; and no 1 for 1.0 or True
    return found


def raw(fields, payload):
    header = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    return PREFIX.pack(len(header), payload % (1 << 32)) + header + bytes(-(PREFIX.size + len(header)) % 64)


def head(message, limits=WIDE, where=INLINE):
    frame = message.frame()
    return pack_head(frame, message.payload_bytes, where, limits)


@given(forwards() | results(), st.integers(0, 200), NUMBERS)
@settings(deadline=None, max_examples=400)
def test_what_is_written_is_read(message, start, where):
    found = check_reading(head(message, where=where), WIDE, start)
    assert found is not None
    assert found.where == where
    assert found.payload_bytes == message.payload_bytes


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -0.0])
def test_seconds_that_are_none_are_read_alike(seconds):
    memory = memoryview(bytearray(4))
    message = Result(1, 2, 3, seconds, 0.0, torch.float32, Place(memory, 0), 1, 1)
    found = check_reading(head(message), WIDE)
    assert found is not None
    assert repr(found.meta["compute_s"]) == repr(seconds)


@given(forwards() | results())
@settings(deadline=None, max_examples=60)
def test_no_part_of_a_header_is_taken_for_it(message):
    whole = head(message)
    for size in range(len(whole)):
        assert check_reading(whole[:size], WIDE) is None
    header_bytes, payload = PREFIX.unpack_from(whole)
    for shorter in range(header_bytes):
        check_reading(PREFIX.pack(shorter, payload) + whole[PREFIX.size :], WIDE)
    for limits in (Limits(header_bytes - 1, 1 << 20), Limits(1 << 12, payload - 1)):
        assert check_reading(whole, limits) is None


@given(forwards() | results(), st.randoms(use_true_random=False), st.integers(1, 6))
@fuzz
def test_bytes_that_are_changed(message, chance, changes):
    whole = bytearray(head(message))
    for _ in range(changes):
        at = chance.randrange(len(whole))
        match chance.randrange(5):
            case 0:
                whole[at] = chance.choice([0, 0x7F, 0x80, 0x90, 0xC0, 0xCB, 0xCC, 0xCF, 0xD3, 0xDC, 0xDD, 0xDF, 0xFF])
            case 1:
                whole[at] ^= 1 << chance.randrange(8)
            case 2:
                del whole[at : at + chance.randrange(1, 9)]
            case 3:
                whole[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                whole[at : at + 8] = chance.randbytes(8)
        if not whole:
            break
    check_reading(bytes(whole))


@given(st.binary(max_size=300))
@fuzz
def test_any_bytes(data):
    check_reading(data)
    check_reading(raw(data, 64))
    check_reading(raw(b"\x99\x01\x04" + data, 64))
    check_reading(raw(b"\x99\x01\x04\x00\x00\x00\x82\xa7experts\x91\x00\xa6counts\x91\x01" + data, 128))
    check_reading(raw(b"\x99\x01\x05\x00\x00\x00\x82\xa9compute_s" + data, 64))


SIZES = st.integers(-2, 40) | st.sampled_from(
    [1 << 31, (1 << 31) - 1, 1 << 32, 1 << 47, 1 << 48, 1 << 62, (1 << 64) - 1]
)
SHAPES = st.lists(SIZES, max_size=3) | SIZES
ODD = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(-(1 << 63), (1 << 64) - 1)
LISTS = st.lists(st.integers(-5, 300) | ODD, max_size=5)
METAS = (
    st.fixed_dictionaries({"experts": LISTS, "counts": LISTS})
    | st.fixed_dictionaries({"compute_s": st.floats() | ODD, "queue_s": st.floats() | ODD})
    | st.dictionaries(st.sampled_from(["experts", "counts", "compute_s", "queue_s"]), LISTS | ODD)
)


def payload_of(shapes, codes):
    """What the shapes would take, if they are any."""
    try:
        sizes = zip(shapes, codes, strict=True)
        return sum(aligned(int(np.prod(np.array(s, object))) * DTYPES[c].itemsize) for s, c in sizes)
    except (TypeError, ValueError, IndexError):
        return 64


@given(
    st.sampled_from([WIRE_VERSION] * 8 + [0, WIRE_VERSION + 1]),
    st.sampled_from([4, 4, 4, 5, 5, 5, 6, (1 << 32) + 4, (1 << 32) + 5, -252, 4.0]),
    st.lists(NUMBERS | ODD, min_size=3, max_size=3),
    METAS,
    st.tuples(st.lists(SIZES, min_size=2, max_size=2), st.lists(SIZES, min_size=1, max_size=1)).map(list)
    | st.tuples(st.lists(SIZES, min_size=2, max_size=2)).map(list)
    | st.lists(SHAPES, max_size=3),
    st.lists(st.integers(0, 9), min_size=1, max_size=2) | st.lists(st.integers(-1, 10) | ODD, max_size=3),
    NUMBERS | ODD,
    st.integers(-64, 64),
)
@fuzz
@example(WIRE_VERSION, (1 << 32) + 4, [0, 0, 0], {"experts": [0], "counts": [1]}, [[1, 16], [1]], [0, 6], -1, 0)
@example(WIRE_VERSION, 4, [0, 0, 0], {"experts": [0], "counts": [1]}, [[1 << 31, 1 << 31], [1]], [0, 6], -1, 0)
@example(WIRE_VERSION, 4, [0, 0, 0], {"experts": [True], "counts": [1]}, [[1, 16], [1]], [0, 6], -1, 0)
@example(WIRE_VERSION, 4, [0, 0, 0], {"experts": [0], "counts": [1]}, [[1, 64], [1]], [8, 6], -1, 0)
def test_fields_of_any_kind(version, op, ids, meta, shapes, codes, where, off):
    payload = payload_of(shapes, codes)
    for announced in {payload, payload + off}:
        check_reading(raw([version, op, *ids, meta, shapes, codes, where], announced), WIDE)


def test_a_list_that_claims_more_than_there_is_takes_no_memory():
    begin = b"\x99\x01\x04\x00\x00\x00\x82\xa7experts"
    for claim in (b"\xdd\x7f\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\x9f"):
        assert check_reading(raw(begin + claim, 64), WIDE) is None


def test_bounds_that_are_none_are_refused():
    memory = bytearray(64)
    for start, end in ((-1, 8), (0, 65), (9, 8), (1 << 62, 1 << 62), (0, 1 << 63)):
        with pytest.raises((TypeError, OverflowError)):
            read_header(memoryview(memory), start, end, LIMITS)


# -- rows in memory -------------------------------------------------------------------------------------------------


def laid_out(tensors):
    """The tensors as a channel has them."""
    frame = Frame(Op.FORWARD, tensors=tensors)
    whole = b"".join(encode(frame, WIDE))
    return decode(whole, WIDE, new_buffer(len(whole))).tensors


# What is no number, or one that 64 bits hold: no expert has a larger one, and C refuses it.
NAMES = ODD.filter(lambda value: type(value) is not int or value < 1 << 63)


@st.composite
def requests(draw):
    """Experts, counts and tensors, right or nearly so."""
    counts = draw(st.lists(st.integers(1, 4), max_size=5))
    experts = draw(st.permutations(range(10)))[: len(counts)]
    tokens = draw(st.integers(1, 6))
    index = draw(st.lists(st.integers(0, tokens - 1), min_size=sum(counts), max_size=sum(counts)))
    x, index_R = torch.ones(tokens, 4), torch.tensor(index, dtype=torch.int64)
    experts, counts, tensors = list(experts), list(counts), [x, index_R]
    match draw(st.integers(0, 11)):
        case 0 if counts:
            counts[draw(st.integers(0, len(counts) - 1))] = draw(ODD | st.integers(-3, 5))
        case 1 if experts:
            experts[draw(st.integers(0, len(experts) - 1))] = draw(NAMES | st.integers(0, 9))
        case 2 if index:
            index_R[draw(st.integers(0, len(index) - 1))] = draw(st.sampled_from([-1, tokens, 1 << 62, -(1 << 63)]))
        case 3:
            experts.append(11)
        case 4:
            counts = [*counts, 1 << 63] if draw(st.booleans()) else [*counts, (1 << 63) - 1, (1 << 63) - 1, 2]
            experts = list(range(len(counts)))
        case 5:
            tensors = tensors[: draw(st.integers(0, 1))]
        case 6:
            tensors[1] = index_R.int()
        case 7:
            tensors[1] = index_R[:, None]
        case 8:
            tensors[0] = x[:0]
    return experts, counts, tuple(tensors)


@given(requests())
@fuzz
def test_both_refuse_the_same_forwards(request):
    experts, counts, tensors = request
    fits = rows._fits(experts, counts, tensors)
    if not tensors:
        assert not fits
        return
    frame = Frame(Op.FORWARD, meta={"experts": experts, "counts": counts}, tensors=laid_out(tensors))
    if not fits:
        with pytest.raises(WireError):
            check_forward(frame)
        return
    given_ = check_forward(frame)
    assert given_ is not None
    assert (given_.tokens, given_.width, given_.rows) == (*tensors[0].shape, len(tensors[1]))
    assert given_.token_of_row == tensors[1].numpy().tobytes()


def test_many_experts_in_no_order_take_no_long_time():
    """Compared each with each they would take the actor's interpreter an hour."""
    names = list(range(400_000))
    random.Random(0).shuffle(names)
    tensors = laid_out((torch.ones(1, 1), torch.zeros(len(names), dtype=torch.int64)))
    meta = {"experts": names, "counts": [1] * len(names)}
    assert check_forward(Frame(Op.FORWARD, meta=meta, tensors=tensors)) is not None
    names[-1] = names[0]
    with pytest.raises(WireError):
        check_forward(Frame(Op.FORWARD, meta=meta, tensors=tensors))


def test_an_index_that_its_sender_changes_afterwards_changes_nothing():
    tensors = laid_out((torch.ones(2, 4), torch.tensor([1, 0])))
    found = check_forward(Frame(Op.FORWARD, meta={"experts": [3], "counts": [2]}, tensors=tensors))
    tensors[1].fill_(1 << 60)
    assert found is not None
    assert found.token_of_row == ints([1, 0])


def test_spans_outside_the_memory_are_refused():
    memory = memoryview(bytearray(256))
    for spans, start in (
        ([(0, [1, 4], 4, 0), (6, [40], 40, 64)], 0),
        ([(0, [1, 4], 4, 0), (6, [8], 8, 256)], 0),
        ([(0, [1, 4], 4, 0), (6, [8], 8, 64)], 1 << 40),
        ([(0, [1, 4], 4, 0), (6, [(1 << 61) + 1], 1, 64)], 0),
    ):
        meta = {"experts": [0], "counts": [spans[1][1][0]]}
        with pytest.raises((TypeError, WireError)):
            check_forward(Frame(Op.FORWARD, meta=meta, tensors=Tensors(memory, start, spans)))
    out = torch.zeros(4, 1, 8)
    with pytest.raises(TypeError):
        put_rows(Tensors(memory, 200, [(0, [2, 8], 16, 0)]), ints([0, 1]), out)
    for places in ([0, 4], [-1, 0], [1 << 60, 0]):
        with pytest.raises(TypeError):
            put_rows(Tensors(memory, 0, [(0, [2, 8], 16, 0)]), ints(places), out)


@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([1, 3, 64]), st.sampled_from(SENT), st.data())
@settings(deadline=None, max_examples=200)
def test_rows_go_where_they_belong(tokens, top_k, width, dtype, data):
    places = data.draw(st.lists(st.integers(0, tokens * top_k - 1), unique=True))
    rows_RD = random_tensor((len(places), width), dtype)
    outs = []
    for tensors in (laid_out((rows_RD,)), [rows_RD]):
        # torch has no index_copy for every dtype that is carried
        if not isinstance(tensors, Tensors) and dtype is torch.float8_e4m3fn:
            continue
        out = torch.zeros(tokens, top_k, width, dtype=torch.uint8 if dtype is torch.uint8 else dtype)
        assert put_rows(tensors, ints(places), out)
        outs.append(out.view(torch.uint8))
        assert not put_rows(tensors, ints([*places, 0]), out)
        assert not put_rows(tensors, ints(places), torch.zeros(tokens, top_k, width + 1, dtype=dtype))
        assert not put_rows(tensors, ints(places), torch.zeros(tokens, top_k, width, dtype=torch.float64))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_rows_over_a_channel(kind, tokens, compiled, host, monkeypatch):
    """Inline, by way of the ring, and too large for that; with and without the part in C."""
    if not compiled:
        monkeypatch.setattr(rows, "native", None)
        monkeypatch.setattr(row_message, "native", None)
        monkeypatch.setattr("moeray.wire.sender.native", None)
        monkeypatch.setattr("moeray.wire.receiver.native", None)
    near, far = host.pair(kind)
    x_TD = random_tensor((tokens, 700), torch.bfloat16)
    index = np.arange(tokens).repeat(2)
    message = Forward(7, 3, 9, [1, 4], [tokens, tokens], x_TD, ints(range(tokens)), ints(index))
    pool = ThreadPoolExecutor(1)
    for n in range(30):  # around the ring
        sending = pool.submit(near.send_rows, message._replace(id=n))
        frame = far.recv(10)
        sending.result(10)
        assert (frame.op, frame.id, frame.layer, frame.epoch) == (Op.FORWARD, n, 3, 9)
        assert torch.equal(frame.tensors[0].view(torch.int16), x_TD.view(torch.int16))
        assert frame.tensors[1].tolist() == index.tolist()
        found = check_forward(frame)
        assert (found is not None) == compiled
        out = frame.tensors[0].clone()
        memory = memoryview(out.view(torch.uint8).numpy().reshape(-1))
        outputs = Result(n, 3, 9, 0.5, 0.25, torch.bfloat16, Place(memory, out.data_ptr()), tokens, 700)
        sending = pool.submit(far.send_rows, outputs)
        back = near.recv(10)
        sending.result(10)
        assert (back.op, back.id, back.meta) == (Op.RESULT, n, {"compute_s": 0.5, "queue_s": 0.25})
        placed = torch.zeros(tokens, 1, 700, dtype=torch.bfloat16)
        assert put_rows(back.tensors, ints(range(tokens)), placed)
        assert torch.equal(placed.view(torch.int16)[:, 0], x_TD.view(torch.int16))
    near.close()


def test_codes_are_those_of_c():
    """`SIZES`, `INT64` and `BOOL` of rows.c."""
    assert [dtype.itemsize for dtype in DTYPES] == [4, 2, 2, 1, 2, 4, 8, 1, 1, 1]
    assert (CODES[torch.int64], CODES[torch.bool]) == (6, 8)
    for code, dtype in enumerate(DTYPES):
        whole = raw(
            [WIRE_VERSION, 5, 0, 0, 0, {"compute_s": 0.0, "queue_s": 0.0}, [[1, 64]], [code], -1], 64 * dtype.itemsize
        )
        found = check_reading(whole)
        assert (found is None) == (dtype is torch.bool)  # whose bytes Python looks at
        if found is not None:
            assert build_frame(found, memoryview(bytearray(64 * dtype.itemsize)), 0).tensors[0].dtype is dtype
