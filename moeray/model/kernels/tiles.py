"""Which part of the experts' outputs one program of a GPU computes at a time, chosen by the rows of an expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from moeray.model.kernels.layout import Format, Matrix

_GROUP = 32  # MXFP4 values with one scale
_LEAST = 16  # inputs of a product, as tensor cores multiply them

_Bits = TypeVar("_Bits")


@dataclass(frozen=True)
class Tile:
    """`rows` of one expert times `outs` outputs, `ins` inputs a step; `warps` and pipeline `stages` of a program."""

    rows: int
    outs: int
    ins: int
    warps: int
    stages: int


Tiles = Mapping[int, Tile]
"""Most rows of an expert, on average -> tile; what has more goes by the last."""

# By rows; the first of each is what runs where nothing is measured, and fits in 96 KiB of shared memory.
CANDIDATES: Mapping[int, tuple[Tile, ...]] = {
    16: (Tile(16, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4)),
    64: (Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 8, 3)),
    128: (Tile(128, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
}
DEFAULTS: Tiles = {rows: tiles[0] for rows, tiles in CANDIDATES.items()}


@dataclass(frozen=True)
class Trial(Generic[_Bits]):
    """What came of running a tile on this GPU: some rows' outputs, and the seconds taken."""

    bits: _Bits
    seconds: float


def choose(
    candidates: Mapping[int, Iterable[Tile]],
    trial: Callable[[Tile, int], Trial[_Bits] | None],
    same: Callable[[_Bits, _Bits], bool],
) -> dict[int, Tile]:
    """The fastest tile for each number of rows, among those that give the `same` bits as the first that runs at all, so
    that a row's outputs do not depend on how many rows there are. `trial(tile, rows)` is None where it does not run.

    Numbers of rows without any are left out.
    """
    chosen: dict[int, Tile] = {}
    reference: Trial[_Bits] | None = None
    for rows, tiles in candidates.items():
        fastest: float | None = None
        for tile in tiles:
            result = trial(tile, rows)
            reference = reference or result
            if result is None or reference is None or not same(result.bits, reference.bits):
                continue
            if fastest is None or result.seconds < fastest:
                chosen[rows], fastest = tile, result.seconds
    return chosen


def tile_for(tiles: Tiles, counts: list[int]) -> Tile:
    """The tile for experts with so many rows each; none of them 0."""
    mean = sum(counts) / len(counts)
    fitting = [rows for rows in tiles if rows >= mean]
    return tiles[min(fitting) if fitting else max(tiles)]


def spread(addresses: list[int], counts: list[int], rows: int) -> list[tuple[int, int, int]]:
    """A table of (expert's address, its first row, the row after its last) of every tile of up to `rows` rows."""
    table, end = [], 0
    for address, count in zip(addresses, counts, strict=True):
        first, end = end, end + count
        table += [(address, row, end) for row in range(first, end, rows)]
    return table


def inputs_at_once(tile: Tile, matrix: Matrix, itemsize: int) -> int:
    """Inputs of a step: fewer where they take more memory, and all in one block of an FP8 matrix.

    `itemsize`: bytes of an input.
    """
    ins = tile.ins * 2 // max(itemsize, 2)
    if matrix.format == Format.FP8:
        ins = min(ins, 1 << matrix.in_shift)
    return max(ins, _GROUP if matrix.format == Format.MXFP4 else _LEAST)
