"""Which actor serves how many rows of a step: the dispatcher's choice of replicas (`dispatch.balance`), for many steps
and layers at once.

S = steps (G x L: entries of a token grid and layers), E = experts, A = actors, R = replicas of one expert at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeray.control.placement import Placement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MIN_PIECE = 16
"""An expert is split into pieces of at least so many rows, as by the dispatcher (a test compares)."""
NEAR = 1.1
"""Costs that differ by less take turns, as by the dispatcher (a test compares)."""

_Given = tuple[Floats, Floats, Floats]
"""What each replica gets: rows and experts in the mean over steps, the most rows in one."""


class Spread(NamedTuple):
    """`rows_GLA`, `distinct_GLA`: rows and experts of each actor, in the mean over steps. `whole_GLA`: the most rows
    that an actor has in one step, which is more where replicas take turns at rows too few to be split."""

    rows_GLA: Floats
    distinct_GLA: Floats
    whole_GLA: Floats


def spread(placement: Placement, batches_GLE: Ints, actors: Mapping[str, int], speed_A: Floats) -> Spread:
    """Spread drawn batches over the replicas. `actors`: which column each is.

    Experts with one replica come first; then those with several by falling rows, each onto its replicas that are done
    first. With `2 * MIN_PIECE` rows and more it is split so that they are done at the same time; with fewer all rows go
    to one, and replicas that would be done at nearly the same time take turns.
    """
    held_LER, nowhere = _held(placement, batches_GLE.shape[1:], actors), len(actors)
    single_LE = (held_LER < nowhere).sum(axis=2) == 1
    onto_LEA = (single_LE[..., None] & (held_LER[:, :, :1] == np.arange(nowhere + 1))).astype(np.float64)
    batches_LGE = batches_GLE.transpose(1, 0, 2).astype(np.float64)
    rows_LGA, distinct_LGA = batches_LGE @ onto_LEA, (batches_LGE > 0) @ onto_LEA
    rows_LGA[..., nowhere] = np.inf  # so full that it gets none
    so_far = Spread(rows_LGA, distinct_LGA, rows_LGA.copy())
    _share(np.where(single_LE[:, None], 0.0, batches_LGE), held_LER, speed_A, so_far)
    return Spread(*(of_LGA[..., :nowhere].transpose(1, 0, 2) for of_LGA in so_far))


def _held(placement: Placement, shape: tuple[int, ...], actors: Mapping[str, int]) -> Ints:
    """The actors that host each expert; A, which is nowhere, where there are fewer than R."""
    layers, experts = shape
    hosts: list[tuple[str, ...]] = [()] * (layers * experts)
    for (layer, expert), held in placement.replicas.items():
        hosts[layer * experts + expert] = held
    counts = np.array([len(held) for held in hosts])
    there = np.arange(counts.max()) < counts[:, None]
    padded = np.full(there.shape, len(actors), np.int64)
    padded[there] = [actors[actor] for held in hosts for actor in held]
    return padded.reshape(layers, experts, -1)


def _share(batches_LGE: Floats, held_LER: Ints, speed_A: Floats, so_far: Spread) -> None:
    """Add the rows of these experts, in place."""
    layers, entries, experts = batches_LGE.shape
    order_LGE = np.argsort(-batches_LGE, axis=2, kind="stable")
    n_SE = np.take_along_axis(batches_LGE, order_LGE, axis=2).reshape(layers * entries, -1)
    held_NR = held_LER.reshape(-1, held_LER.shape[2])  # N: experts of all layers
    expert_SE = order_LGE.reshape(n_SE.shape) + experts * np.repeat(np.arange(layers), entries)[:, None]
    flat = [of_LGA.reshape(-1) for of_LGA in so_far]
    speed_A, columns = np.append(speed_A, 1.0), len(speed_A) + 1
    for nth in range(np.count_nonzero(n_SE, axis=1).max(initial=0)):
        n_S = n_SE[:, nth]
        for those_S, give in ((n_S >= 2 * MIN_PIECE, _level), ((n_S > 0) & (n_S < 2 * MIN_PIECE), _turns)):
            if len(at_S := np.flatnonzero(those_S)):
                held_SR = held_NR[expert_SE[at_S, nth]]
                _add(n_S[at_S, None], columns * at_S[:, None] + held_SR, speed_A[held_SR], give, flat)


def _add(
    n_S1: Floats, cells_SR: Ints, speed_SR: Floats, give: Callable[[Floats, Floats, Floats], _Given], flat: list[Floats]
) -> None:
    """Give `n_S1` rows of one expert of each step to its replicas, which are on different actors."""
    rows, distinct, whole = flat
    rows_SR = rows[cells_SR]
    given_SR, distinct_SR, most_SR = give(n_S1, rows_SR / speed_SR, speed_SR)
    whole[cells_SR] = np.maximum(whole[cells_SR], rows_SR + most_SR)
    rows[cells_SR] = rows_SR + given_SR
    distinct[cells_SR] += distinct_SR


def _turns(n_S1: Floats, cost_SR: Floats, speed_SR: Floats) -> _Given:
    """All rows to one replica: those that would be done at nearly the same time take turns."""
    done_SR = cost_SR + n_S1 / speed_SR
    near_SR = done_SR <= NEAR * done_SR.min(axis=1, keepdims=True)
    turns_SR = near_SR / near_SR.sum(axis=1, keepdims=True)
    return turns_SR * n_S1, turns_SR, near_SR * n_S1


def _level(n_S1: Floats, cost_SR: Floats, speed_SR: Floats) -> _Given:
    """Fill the replicas like water: those that take rows are done at the same time, the others no sooner."""
    steps, replicas = cost_SR.shape
    row_S1 = replicas * np.arange(steps)[:, None]
    order_SR = cost_SR.argsort(axis=1, kind="stable") + row_S1
    cost, speed = cost_SR.ravel()[order_SR], speed_SR.ravel()[order_SR]
    level = (n_S1 + (cost * speed).cumsum(axis=1)) / speed.cumsum(axis=1)
    nth_R = np.arange(replicas)
    open_SR = (level > cost) & (nth_R < n_S1 // MIN_PIECE)
    last_S1 = np.where(open_SR, nth_R, 0).max(axis=1, keepdims=True)
    filled_S1 = level.ravel()[last_S1 + row_S1]
    taken = np.where(nth_R <= last_S1, np.maximum(filled_S1 - cost, 0.0) * speed, 0.0)
    given_SR = np.empty_like(taken)
    given_SR.ravel()[order_SR] = taken
    return given_SR, (given_SR > 0).astype(np.float64), given_SR
