"""Attention of decoding sequences over a paged cache in Triton, for GPUs, after Flash-Decoding (Dao et al., 2023).

A sequence's keys are cut into parts that are attended to at the same time, and whose results are merged by a second
kernel. Where they are cut depends on the sequence alone, so its result does not depend on the others.

B sequences, H query heads of a tile, K keys of a step, P parts, D numbers of a head. Importing this needs triton.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _product(a, b, OPERAND: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision="ieee")


@triton.jit
def _tile(start_R, there_R, number_D, size):
    """[R, D]: of each row that is there, from its start on, the numbers below `size`; 0 elsewhere."""
    mask = there_R[:, None] & (number_D < size)[None, :]
    return tl.load(start_R[:, None] + number_D[None, :], mask=mask, other=0)


@triton.jit
def _columns(start_R, there_R, number_D, size):
    """The same as [D, R]."""
    mask = there_R[None, :] & (number_D < size)[:, None]
    return tl.load(start_R[None, :] + number_D[:, None], mask=mask, other=0)


@triton.jit
def _scores(
    q_HD, more_HD, keys_K, there_K, main_D, rest_D, k_size, scale, softcap,
    REST: tl.constexpr, CAPPED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """[H, K]: queries times the keys that are there."""
    scores_HK = _product(q_HD, _columns(keys_K, there_K, main_D, k_size), OPERAND)
    if REST:
        scores_HK += _product(more_HD, _columns(keys_K, there_K, rest_D, k_size), OPERAND)
    scores_HK *= scale
    if CAPPED:
        scores_HK = softcap * (2 * tl.sigmoid(2 * scores_HK / softcap) - 1)  # tanh
    return tl.where(there_K[None, :], scores_HK, NOTHING)


@triton.jit
def attend_kernel(
    q, k, v, tables, first, end, sums, maxima, weights, scale, softcap, repeats, k_size, v_size,
    q_sequence, q_head, k_slot, k_group, v_slot, v_group, table_step,
    HEADS: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    VALUES: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One part of one sequence's keys, for up to HEADS heads that share keys: sums [B, heads, P, v_size] of
    exp(score - maximum) times the value, maxima and weights (sums of the exponentials) [B, heads, P].

    Queries and keys are MAIN numbers long and up to REST more (none where REST is 0). A part is a number of steps of
    KEYS keys, at least LEAST of them. Heads of a tile belong to one group of `repeats`.
    """
    sequence, part, parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    tiles = tl.cdiv(repeats, HEADS)
    group = tl.program_id(1) // tiles
    within_H = tl.program_id(1) % tiles * HEADS + tl.arange(0, HEADS)
    seen_H = within_H < repeats
    head_H = group * repeats + within_H
    heads = tl.num_programs(1) // tiles * repeats

    first_key, end_key = tl.load(first + sequence), tl.load(end + sequence)
    steps = tl.maximum(tl.cdiv(tl.cdiv(end_key - first_key, KEYS), parts), LEAST)
    begin = first_key + part * steps * KEYS
    stop = tl.minimum(begin + steps * KEYS, end_key)

    main_D, rest_D, value_D = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1), tl.arange(0, VALUES)
    queries_H = q + sequence * q_sequence + head_H * q_head
    q_HD = _tile(queries_H, seen_H, main_D, k_size)
    more_HD = _tile(queries_H, seen_H, rest_D, k_size) if REST else q_HD

    maximum_H = tl.full((HEADS,), NOTHING, tl.float32)
    weight_H = tl.zeros((HEADS,), tl.float32)
    sums_HD = tl.zeros((HEADS, VALUES), tl.float32)
    for at in range(begin, stop, KEYS):
        key_K = at + tl.arange(0, KEYS)
        there_K = key_K < stop
        block_K = tl.load(tables + sequence * table_step + key_K // BLOCK, mask=there_K, other=0)
        slot_K = block_K * BLOCK + key_K % BLOCK
        keys_K = k + slot_K * k_slot + group * k_group
        scores_HK = _scores(
            q_HD, more_HD, keys_K, there_K, main_D, rest_D, k_size, scale, softcap, REST, CAPPED, OPERAND
        )
        raised_H = tl.maximum(maximum_H, tl.max(scores_HK, 1))
        p_HK = tl.exp(scores_HK - raised_H[:, None])
        lowered_H = tl.exp(maximum_H - raised_H)
        v_KD = _tile(v + slot_K * v_slot + group * v_group, there_K, value_D, v_size)
        sums_HD = sums_HD * lowered_H[:, None] + _product(p_HK.to(v_KD.dtype), v_KD, OPERAND)
        weight_H = weight_H * lowered_H + tl.sum(p_HK, 1)
        maximum_H = raised_H

    place_H = (sequence * heads + head_H) * parts + part
    tl.store(maxima + place_H, maximum_H, mask=seen_H)
    if begin < stop:
        tl.store(weights + place_H, weight_H, mask=seen_H)
        places = sums + place_H[:, None].to(tl.int64) * v_size + value_D[None, :]
        tl.store(places, sums_HD, mask=seen_H[:, None] & (value_D < v_size)[None, :])


@triton.jit
def merge_kernel(
    sums, maxima, weights, sinks, y, v_size,
    PARTS: tl.constexpr, VALUES: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """y [B, heads, v_size] of what all parts of a sequence's keys came to. A sink is one more key, without a value."""
    head = tl.program_id(1)
    row = tl.program_id(0) * tl.num_programs(1) + head
    part_P, value_D = tl.arange(0, PARTS), tl.arange(0, VALUES)
    maximum_P = tl.load(maxima + row * PARTS + part_P)
    there_P = maximum_P > NOTHING
    maximum = tl.max(maximum_P, 0)
    if SINKS:
        sink = tl.load(sinks + head)
        maximum = tl.maximum(maximum, sink)
    lowered_P = tl.exp(maximum_P - maximum)
    weight = tl.sum(tl.load(weights + row * PARTS + part_P, mask=there_P, other=0) * lowered_P, 0)
    if SINKS:
        weight += tl.exp(sink - maximum)
    places = sums + (row * PARTS + part_P)[:, None].to(tl.int64) * v_size + value_D[None, :]
    sums_PD = tl.load(places, mask=there_P[:, None] & (value_D < v_size)[None, :], other=0)
    y_D = tl.sum(sums_PD * lowered_P[:, None], 0) / weight
    tl.store(y + row.to(tl.int64) * v_size + value_D, y_D.to(y.dtype.element_ty), mask=value_D < v_size)
