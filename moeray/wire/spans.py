"""Where a frame's tensors lie in its payload, checked: what a peer says of them is not to be believed."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from moeray.buffers import aligned
from moeray.errors import WireError

MAX_TENSORS = 128
MAX_DIMS = 8
_MAX_ELEMENTS = 1 << 48

SIZES = (4, 2, 2, 1, 2, 4, 8, 1, 1, 1)
"""Bytes of an element of each dtype, by its code (`tensors.DTYPES`)."""
BOOL = 8
"""A dtype's code."""

Span = tuple[int, list[int], int, int]
"""A tensor's dtype as its code, its shape, its elements, and its offset in the payload in bytes."""


def spans_of(shapes: Any, codes: Any, payload_bytes: int) -> list[Span]:
    """Of the tensors of these shapes and dtypes, one behind the other. Raises WireError for what no frame has."""
    if type(shapes) is not list or type(codes) is not list or len(shapes) != len(codes) or len(codes) > MAX_TENSORS:
        raise WireError("the peer's header holds shapes and dtypes that do not go together")
    spans = []
    offset = 0
    for shape, code in zip(shapes, codes, strict=True):
        if type(code) is not int or not 0 <= code < len(SIZES):
            raise WireError(
                f"the peer sent the unknown dtype {reprlib.repr(code)}; run one release of moeray everywhere"
            )
        elements = _elements(shape)
        spans.append((code, shape, elements, offset))
        offset += aligned(elements * SIZES[code])
    if offset != payload_bytes:
        raise WireError(f"the peer's shapes take {offset} bytes but its payload has {payload_bytes}")
    return spans


def _elements(shape: Any) -> int:
    if type(shape) is not list or len(shape) > MAX_DIMS or not all(type(size) is int and size >= 0 for size in shape):
        raise WireError(f"the peer sent the shape {reprlib.repr(shape)}, which no tensor has")
    # A zero among huge sizes multiplies to nothing but would still overflow the strides.
    if math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        raise WireError(f"the peer sent the shape {reprlib.repr(shape)}, which is too large")
    return math.prod(shape)
