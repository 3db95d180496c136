"""Orders as bytes: what is read is what was written, and what is none is refused."""

from __future__ import annotations

import json

import pytest

from moeray.actors.orders import Orders, decode, encode, newest
from moeray.control.policy import Wish
from moeray.types import ExpertId

FIRST = Orders(1.5, Wish({"experts": 2}, 1), False, {}, {})
FULL = Orders(
    2.0, Wish({"fast": 2, "cheap": 5}, 3, {ExpertId(3, 7): 2, ExpertId(0, 1): 4}), True,
    {"fast-1": None, "cheap-0": 99.5}, {"fast": 3, "router": 4},
)  # fmt: skip


@pytest.mark.parametrize("orders", [FIRST, FULL])
def test_what_is_read_is_what_was_written(orders):
    assert decode(encode(orders)) == orders
    assert decode(encode(orders)).at == orders.at


@pytest.mark.parametrize("data", [b"", b"\x80", b"[]", b"{}", json.dumps({"at": 1, "replicas": [[1]]}).encode()])
def test_what_is_none_is_refused(data):
    with pytest.raises(ValueError, match="no orders"):
        decode(data)


@pytest.mark.parametrize(
    ("one", "other", "wanted"), [(None, None, None), (FIRST, None, FIRST), (None, FULL, FULL), (FULL, FIRST, FULL)]
)
def test_the_later_ones_hold(one, other, wanted):
    assert newest(one, other) is wanted
