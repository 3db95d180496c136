"""Which tile for how many rows, what a launch's table lists, and the choice among tiles that were tried."""

import pytest

from moeray.model.kernels.layout import Format, Matrix
from moeray.model.kernels.tiles import CANDIDATES, DEFAULTS, Tile, Trial, choose, inputs_at_once, spread, tile_for

A, B, C, D = (Tile(rows, outs, 64, 4, 3) for rows, outs in ((16, 64), (16, 128), (64, 64), (64, 128)))
PAIRS = {16: (A, B), 64: (C, D)}


@pytest.mark.parametrize(("counts", "rows"), [
    ([1], 16), ([1] * 8, 16), ([16], 16), ([17], 64), ([1, 31], 16), ([64, 66], 128), ([9000], 128),
])  # fmt: skip
def test_the_mean_of_the_rows_decides(counts, rows):
    assert tile_for(DEFAULTS, counts).rows == rows


def test_more_rows_than_any_tile_is_for_go_by_the_largest():
    assert tile_for({16: A}, [500]) is A


@pytest.mark.parametrize(("counts", "rows", "table"), [
    ([3], 16, [(7, 0, 3)]),
    ([16, 1], 16, [(7, 0, 16), (8, 16, 17)]),
    ([33, 2], 16, [(7, 0, 33), (7, 16, 33), (7, 32, 33), (8, 33, 35)]),
])  # fmt: skip
def test_the_table_covers_each_row_of_each_expert_once(counts, rows, table):
    assert spread([7, 8][: len(counts)], counts, rows) == table
    covered = [row for _, first, end in table for row in range(first, min(first + rows, end))]
    assert covered == list(range(sum(counts)))


@pytest.mark.parametrize(("trials", "chosen"), [
    ({A: ("x", 2), B: ("x", 1), C: ("x", 1), D: ("x", 2)}, {16: B, 64: C}),
    ({A: ("x", 2), B: ("y", 1), C: ("x", 3), D: ("y", 2)}, {16: A, 64: C}),  # faster, but with other bits
    ({B: ("y", 1), C: ("x", 3), D: ("y", 2)}, {16: B, 64: D}),  # the first does not run
    ({A: ("x", 1), C: ("y", 1)}, {16: A}),
    ({}, {}),
])  # fmt: skip
def test_the_fastest_tiles_that_give_the_same_bits(trials, chosen):
    def trial(tile, rows):
        assert rows == tile.rows
        return Trial(*trials[tile]) if tile in trials else None

    assert choose(PAIRS, trial, lambda a, b: a == b) == chosen


@pytest.mark.parametrize(("form", "shift", "itemsize", "ins"), [
    (Format.BF16, 0, 2, 128), (Format.F32, 0, 4, 64), (Format.FP8, 7, 2, 128), (Format.FP8, 5, 2, 32),
    (Format.FP8, 4, 4, 16), (Format.MXFP4, 0, 4, 64),
])  # fmt: skip
def test_a_step_stays_within_a_block(form, shift, itemsize, ins):
    assert inputs_at_once(Tile(16, 64, 128, 4, 4), Matrix(format=form, in_shift=shift), itemsize) == ins


def test_a_tile_has_no_more_rows_than_it_is_chosen_for():
    assert all(tile.rows == rows for rows, tiles in CANDIDATES.items() for tile in tiles)
