"""Which actor serves how many rows of a step: the dispatcher's choice of replicas (`dispatch.balance`), for many steps
and layers at once.

S = steps (G x L: entries of a token grid and layers), E = experts, A = actors, R = replicas of one expert at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeray.control.placement import Placement
from moeray.types import ExpertId

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MIN_PIECE = 16
"""An expert is split into pieces of at least so many rows, as by the dispatcher (a test compares)."""
NEAR = 1.1
"""Costs that differ by less take turns, as by the dispatcher (a test compares)."""


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
    held_LER = _held(placement, batches_GLE.shape[1:], actors)
    single_LE = (held_LER >= 0).sum(axis=2) == 1
    onto_LEA = np.where(single_LE[..., None], held_LER[:, :, :1] == np.arange(len(actors)), False).astype(np.float64)
    batches_LGE = batches_GLE.transpose(1, 0, 2).astype(np.float64)
    rows_LGA, distinct_LGA = batches_LGE @ onto_LEA, (batches_LGE > 0) @ onto_LEA
    whole_LGA = rows_LGA.copy()
    _share(batches_LGE, held_LER, single_LE, speed_A, Spread(rows_LGA, distinct_LGA, whole_LGA))
    return Spread(*(of_LGA.transpose(1, 0, 2) for of_LGA in (rows_LGA, distinct_LGA, whole_LGA)))


def _held(placement: Placement, shape: tuple[int, ...], actors: Mapping[str, int]) -> Ints:
    """The actors that host each expert, -1 where there are fewer than R."""
    layers, experts = shape
    hosts = [placement.replicas[ExpertId(layer, e)] for layer in range(layers) for e in range(experts)]
    counts = np.array([len(held) for held in hosts])
    there = np.arange(counts.max()) < counts[:, None]
    padded = np.full(there.shape, -1, np.int64)
    padded[there] = [actors[actor] for held in hosts for actor in held]
    return padded.reshape(layers, experts, -1)


def _share(batches_LGE: Floats, held_LER: Ints, single_LE: Bools, speed_A: Floats, so_far: Spread) -> None:
    """Add the rows of the experts with several replicas, in place."""
    layers, entries, experts = batches_LGE.shape
    waiting_LGE = np.where(single_LE[:, None], -1.0, batches_LGE)
    order_LGE = np.argsort(-waiting_LGE, axis=2, kind="stable")
    index_S = np.repeat(np.arange(layers), entries)
    flat = [of_LGA.reshape(layers * entries, -1) for of_LGA in so_far]
    for nth in range(experts - int(single_LE.sum(axis=1).min())):
        expert_S = order_LGE[:, :, nth].ravel()
        n_S = np.take_along_axis(waiting_LGE, order_LGE[:, :, nth : nth + 1], axis=2).ravel()
        at_S = np.flatnonzero(n_S > 0)
        if not len(at_S):
            return
        held_SR = held_LER[index_S[at_S], expert_S[at_S]]
        _add(n_S[at_S], at_S[:, None], held_SR, np.where(held_SR < 0, 0.0, speed_A[held_SR]), flat)


def _add(n_S: Floats, at_S1: Ints, held_SR: Ints, speed_SR: Floats, flat: list[Floats]) -> None:
    """Give `n_S` rows of one expert of each step to its replicas."""
    rows_SA, distinct_SA, whole_SA = flat
    there_SR = held_SR >= 0
    cost_SR = np.where(there_SR, rows_SA[at_S1, held_SR] / np.where(there_SR, speed_SR, 1.0), np.inf)
    turns_SR = _turns(n_S, cost_SR, speed_SR)
    split_SR = _level(n_S, cost_SR, speed_SR)
    big_S1 = n_S[:, None] >= 2 * MIN_PIECE
    given_SR = np.where(big_S1, split_SR, turns_SR * n_S[:, None])
    most_SR = np.where(big_S1, split_SR, np.where(turns_SR > 0, n_S[:, None], 0.0))
    step_S, nth_R = np.nonzero(given_SR)
    cell = at_S1[step_S, 0], held_SR[step_S, nth_R]  # an expert's replicas are on different actors: no cell comes twice
    whole_SA[cell] = np.maximum(whole_SA[cell], rows_SA[cell] + most_SR[step_S, nth_R])
    rows_SA[cell] += given_SR[step_S, nth_R]
    distinct_SA[cell] += np.where(big_S1, 1.0, turns_SR)[step_S, nth_R]


def _turns(n_S: Floats, cost_SR: Floats, speed_SR: Floats) -> Floats:
    """The part of the steps in which each replica takes all rows."""
    done_SR = cost_SR + np.divide(n_S[:, None], speed_SR, out=np.full_like(cost_SR, np.inf), where=speed_SR > 0)
    near_SR = done_SR <= NEAR * done_SR.min(axis=1, keepdims=True)
    turns_SR: Floats = near_SR / near_SR.sum(axis=1, keepdims=True)
    return turns_SR


def _level(n_S: Floats, cost_SR: Floats, speed_SR: Floats) -> Floats:
    """Fill the replicas like water: those that take rows are done at the same time, the others no sooner."""
    order_SR = np.argsort(cost_SR, axis=1, kind="stable")
    cost, speed = (np.take_along_axis(of_SR, order_SR, axis=1) for of_SR in (cost_SR, speed_SR))
    cost = np.where(speed > 0, cost, 0.0)
    level = (n_S[:, None] + np.cumsum(cost * speed, axis=1)) / np.cumsum(speed, axis=1)
    pieces = np.maximum(n_S // MIN_PIECE, 1)[:, None]
    open_SR = (speed > 0) & (level > cost) & (np.arange(cost.shape[1]) < pieces)
    last_S1 = open_SR.shape[1] - 1 - np.argmax(open_SR[:, ::-1], axis=1)[:, None]
    taken = np.maximum(np.take_along_axis(level, last_S1, axis=1) - cost, 0.0) * speed
    taken[np.arange(cost.shape[1]) > last_S1] = 0.0
    given_SR = np.zeros_like(taken)
    np.put_along_axis(given_SR, order_SR, taken, axis=1)
    return given_SR
