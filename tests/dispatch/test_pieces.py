"""Pieces of a share, and who takes which."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeray.buffers import aligned
from moeray.dispatch.flight import Sent
from moeray.dispatch.pieces import AHEAD, PIECE_BYTES, Backlog, cut, rows_of_a_frame, rows_of_a_piece
from moeray.dispatch.plan import Share, plan_rows
from moeray.dispatch.work import Work


def share_of(counts, top_k=2):
    """Expert e has counts[e] rows of as many tokens, chosen at random."""
    ids_R = np.repeat(np.arange(len(counts)), counts)
    ids_R = np.random.default_rng(1).permutation(ids_R)
    (share,) = plan_rows(ids_R.reshape(-1, top_k), dict.fromkeys(range(len(counts)), ("a",))).shares
    return share


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ([2, 4, 6], 12, [[(0, 2), (1, 4), (2, 6)]]),
        ([2, 4, 6], 6, [[(0, 2), (1, 4)], [(2, 6)]]),
        ([2, 4, 6], 11, [[(0, 2), (1, 4)], [(2, 6)]]),
        ([10, 2], 4, [[(0, 4)], [(0, 4)], [(0, 2), (1, 2)]]),
        ([1, 9, 2], 4, [[(0, 1)], [(1, 4)], [(1, 4)], [(1, 1), (2, 2)]]),
        ([2, 2, 2], 1, [[(0, 1)], [(0, 1)], [(1, 1)], [(1, 1)], [(2, 1)], [(2, 1)]]),
    ],
)
def test_a_share_in_pieces(counts, most, expected):
    share = share_of(counts)
    pieces = cut(share, most)
    assert [list(zip(piece.experts, piece.counts, strict=True)) for piece in pieces] == expected
    assert b"".join(piece.rows for piece in pieces) == share.rows
    for piece in pieces:
        assert sum(piece.counts) == piece.size <= most or len(pieces) == 1
        token_R = piece.tokens_U[piece.token_of_row_R]
        assert token_R.tolist() == (piece.rows_R // 2).tolist()
        assert sorted(set(token_R.tolist())) == piece.tokens_U.tolist()


@pytest.mark.parametrize(
    ("row_bytes", "room", "expected"),
    [
        (2048, 32 << 20, PIECE_BYTES // 2048),
        (2048, 1 << 20, (1 << 18) // 2048),
        (14336, 32 << 20, PIECE_BYTES // 14336),
        (2048, 0, 0),  # all at once
        (2048, 4096, 0),
    ],
)
def test_what_is_on_its_way_fits_the_channel_twice(row_bytes, room, expected):
    rows = rows_of_a_piece(row_bytes, room)
    assert rows == expected
    assert 2 * AHEAD * rows * row_bytes <= room


@pytest.mark.parametrize(
    ("row_bytes", "most", "expected"), [(2048, 1 << 30, 522247), (248, 1 << 16, 255), (2048, 1 << 11, 1), (2048, 0, 1)]
)
def test_a_frame_carries_rows_with_their_index_and_their_outputs(row_bytes, most, expected):
    rows = rows_of_a_frame(row_bytes, most)
    assert rows == expected
    assert rows == 1 or aligned(rows * row_bytes) + aligned(rows * 8) <= most


def piece(actor, experts, rows):
    return Share(actor, experts, [rows] * len(experts), bytes(8 * rows * len(experts)), b"", b"")


BOTH = dict.fromkeys(range(8), ("a", "b"))


def test_an_actor_gets_its_own_in_order_then_the_last_of_the_others():
    backlog = Backlog()
    backlog.add("a", [piece("a", [e], 10) for e in range(4)])
    taken = []
    while (got := backlog.take("a", BOTH, {}, {})) and len(taken) < 2:
        taken.append(got)
    assert [got.experts for got in taken] == [[0], [1]]
    stolen = backlog.take("b", BOTH, {}, {})
    assert (stolen.actor_id, stolen.experts) == ("b", [3])
    assert not backlog


@pytest.mark.parametrize(
    ("replicas", "rates", "in_flight", "stolen"),
    [
        (BOTH, {}, {}, True),
        (BOTH, {}, {"b": 10}, True),
        (BOTH, {}, {"b": 11}, False),  # it would be done later
        (BOTH, {}, {"a": 5, "b": 15}, True),
        (BOTH, {"b": 0.25}, {}, False),
        (BOTH, {"b": 0.25}, {"a": 20}, True),
        (BOTH, {"a": 4.0}, {"a": 20}, True),
        (BOTH, {"a": 4.0}, {"a": 19}, False),
        ({**BOTH, 1: ("a",)}, {}, {}, False),  # it does not host one of the experts
        ({}, {}, {}, False),
    ],
)
def test_work_is_taken_over_by_whoever_can_do_it_sooner(replicas, rates, in_flight, stolen):
    backlog = Backlog()
    backlog.add("a", [piece("a", [2], 10), piece("a", [0, 1], 5)])
    got = backlog.take("b", replicas, rates, in_flight)
    assert (got is not None) is stolen
    if got is not None:
        assert (got.actor_id, got.experts) == ("b", [0, 1])


def test_the_last_of_whoever_is_farthest_from_the_end():
    backlog = Backlog()
    backlog.add("a", [piece("a", [0], 10)])
    backlog.add("b", [piece("b", [1], 10), piece("b", [2], 10)])
    every = dict.fromkeys(range(3), ("a", "b", "c"))
    assert backlog.take("c", every, {}, {}).experts == [2]
    assert backlog.take("c", every, {}, {"a": 1}).experts == [0]
    assert backlog.take("c", every, {}, {}).experts == [1]
    assert backlog.take("c", every, {}, {}) is None


def test_what_was_left_for_an_actor_that_is_gone():
    backlog = Backlog()
    backlog.add("a", [piece("a", [0], 10), piece("a", [1], 10)])
    assert [lost.experts for lost in backlog.drop("a")] == [[0], [1]]
    assert backlog.drop("a") == []
    assert not backlog


def test_what_an_actor_takes_begins_when_it_is_done_with_what_came_before():
    work = Work(0, torch.empty(0), torch.empty(0), torch.empty(0), 0.0, None)

    def sent(actor, at):
        return Sent(1, piece(actor, [0], 10), None, at, 1.0, at + 1.0, "unix")

    times = [("a", 1.0, 3.0), ("a", 1.0, 4.5), ("b", 1.0, 5.0), ("a", 6.0, 7.0)]
    assert [work.answered(sent(actor, at), 0.5, now) for actor, at, now in times] == [2.0, 1.5, 4.0, 1.0]
    assert work.compute_s == {"a": 1.5, "b": 0.5}
