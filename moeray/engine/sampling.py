"""The mathematics of drawing one token: pure functions of logits, parameters and a keyed uniform number.

Every function treats each row by itself, so that a row's outcome does not depend on the rows beside it.

Shapes: B rows, V vocabulary, R some of the rows, K candidates; W = N * _BLOCK, the vocabulary in whole blocks. Logits
are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeray.types import SamplingParams, TokenLogprobs

_MASK = (1 << 64) - 1
_BLOCK = 256  # tokens that are added up at once
_NUCLEUS = 1024  # candidates in which the nucleus of top-p is looked for before the whole vocabulary is sorted


class SampledToken(NamedTuple):
    """A drawn token; `logprobs` is None where the request did not ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def keyed_uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone, in steps of 2**-52."""
    return (_splitmix64(_splitmix64(seed & _MASK) ^ position) >> 12) * 2.0**-52


def likeliest(logits_RV: Tensor) -> list[int]:
    """The first of the highest logits of each row: the block that has it, then its place in the block. torch looks for
    a place one number at a time, and for a maximum at many."""
    vocab = logits_RV.shape[1]
    if vocab < _BLOCK:
        return [int(token) for token in logits_RV.argmax(-1)]
    blocks_RNB = logits_RV[:, : vocab // _BLOCK * _BLOCK].reshape(len(logits_RV), -1, _BLOCK)
    last_RB = logits_RV[:, vocab - _BLOCK :]
    best_RN = torch.cat([blocks_RNB.amax(-1), last_RB.amax(-1, keepdim=True)], -1)
    start_R1 = (best_RN.argmax(-1, keepdim=True) * _BLOCK).clamp(max=vocab - _BLOCK)
    chosen_RB = logits_RV.gather(1, start_R1 + torch.arange(_BLOCK, device=logits_RV.device))
    picked: list[int] = (start_R1 + chosen_RB.argmax(-1, keepdim=True))[:, 0].tolist()
    return picked


def draw(logits_RV: Tensor, params: Sequence[SamplingParams], uniform_R: Sequence[float]) -> list[int]:
    """One token a row by temperature, top-k, top-p and min-p; `uniform_R` picks it on the inverse CDF by token id.

    Every row's temperature is above 0.
    """
    device, vocab = logits_RV.device, logits_RV.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # In whole blocks, and in place from here on: each further pass over the vocabulary costs what the memory does.
    x_RW = logits_RV.new_empty(len(params), -(-vocab // _BLOCK) * _BLOCK)
    x_RW[:, vocab:] = -math.inf
    x_RV = x_RW[:, :vocab]
    # Less the maximum first: a tiny temperature then makes -inf of the rest, and never inf.
    torch.sub(logits_RV, logits_RV.amax(-1, keepdim=True), out=x_RV)
    if any(p.temperature != 1.0 for p in params):
        x_RV /= column([p.temperature for p in params])
    floor_R1 = column([math.log(p.min_p) if p.min_p else -math.inf for p in params])
    floor_R1 = torch.maximum(floor_R1, _top_floor(x_RV, params)[:, None])
    if bool((floor_R1 > -math.inf).any()):
        x_RV.masked_fill_(x_RV < floor_R1, -math.inf)
    return _pick(x_RW.exp_(), uniform_R)


def _pick(p_RW: Tensor, uniform_R: Sequence[float]) -> list[int]:
    """Where the sum of a row's numbers first exceeds `uniform_R` of all: the block, then the place in it. Sums are fp64
    but those of a block."""
    blocks_RNB = p_RW.view(len(p_RW), -1, _BLOCK)
    until_RN = blocks_RNB.sum(-1).cumsum(-1, dtype=torch.float64)
    aim_R1 = torch.tensor(uniform_R, dtype=torch.float64, device=p_RW.device)[:, None] * until_RN[:, -1:]
    # right=True finds the first entry above the aim, which therefore has a probability above 0.
    block_R1 = torch.searchsorted(until_RN, aim_R1, right=True)
    chosen_RB = blocks_RNB.gather(1, block_R1[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double()
    before_R1 = torch.where(block_R1 > 0, until_RN.gather(1, (block_R1 - 1).clamp(min=0)), 0.0)
    within_RB = before_R1 + chosen_RB.cumsum(-1)
    # Added up in another order, the block's last sum may miss the aim by a rounding: then its last possible token.
    last_R1 = _BLOCK - 1 - chosen_RB.flip(-1).gt(0).int().argmax(-1, keepdim=True)
    place_R1 = torch.minimum(torch.searchsorted(within_RB, aim_R1, right=True), last_R1)
    picked: list[int] = (block_R1 * _BLOCK + place_R1)[:, 0].tolist()
    return picked


def _top_floor(x_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The least scaled logit [R] that top-k and top-p keep; -inf where neither is set. Ties with it are kept."""
    floor_R = torch.full((x_RV.shape[0],), -math.inf, device=x_RV.device)
    vocab = x_RV.shape[1]
    by_width: dict[int, list[int]] = {}
    for row, p in enumerate(params):
        if 0 < p.top_k < vocab:
            # Rows are grouped by a width that follows from their own top-k alone.
            by_width.setdefault(min(1 << (p.top_k - 1).bit_length(), vocab), []).append(row)
        elif p.top_p < 1.0:
            by_width.setdefault(0, []).append(row)
    for width, rows in by_width.items():
        chosen = [params[row] for row in rows]
        index = torch.tensor(rows, device=x_RV.device)
        floor_R[index] = _top_k_floor(x_RV[index], chosen, width) if width else _top_p_floor(x_RV[index], chosen)
    return floor_R


def _top_k_floor(x_RV: Tensor, params: Sequence[SamplingParams], width: int) -> Tensor:
    """Top-k, then top-p of what top-k left."""
    top_RK = x_RV.topk(width).values
    k_R1 = torch.tensor([p.top_k for p in params], device=x_RV.device)[:, None]
    top_RK = top_RK.masked_fill(torch.arange(width, device=x_RV.device) >= k_R1, -math.inf)
    mass_RK = top_RK.double().exp()
    nucleus_R = _nucleus_size(mass_RK, mass_RK.sum(-1), params)
    keep_R = torch.minimum(nucleus_R, k_R1[:, 0])
    return top_RK.gather(1, keep_R[:, None] - 1)[:, 0]


def _top_p_floor(x_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Top-p of the whole vocabulary, which is sorted only for rows whose nucleus is wider than `_NUCLEUS`."""
    total_R = x_RV.exp().sum(-1, dtype=torch.float64)
    top_RK = x_RV.topk(min(_NUCLEUS, x_RV.shape[1])).values
    size_R = _nucleus_size(top_RK.double().exp(), total_R, params)
    floor_R = top_RK.gather(1, size_R[:, None] - 1)[:, 0]
    if x_RV.shape[1] > _NUCLEUS:
        wide = (size_R == _NUCLEUS).nonzero()[:, 0]
        if len(wide):
            sorted_RV = x_RV[wide].sort(-1, descending=True).values
            chosen = [params[row] for row in wide.tolist()]
            size_R = _nucleus_size(sorted_RV.double().exp(), total_R[wide], chosen)
            floor_R[wide] = sorted_RV.gather(1, size_R[:, None] - 1)[:, 0]
    return floor_R


def _nucleus_size(mass_RK: Tensor, total_R: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """How many of the sorted candidates stay: each before which less than top-p of the total lies. At least 1."""
    top_p_R1 = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=mass_RK.device)[:, None]
    before_RK = mass_RK.cumsum(-1) - mass_RK
    kept_RK = (before_RK < top_p_R1 * total_R[:, None]) | (top_p_R1 >= 1.0)
    return kept_RK.sum(-1).clamp_(min=1)


def report_logprobs(logits_RV: Tensor, chosen: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities under the model itself: of the chosen token and the `counts[r]` likeliest ones."""
    logprobs_RV = logits_RV.log_softmax(-1)
    picked = logprobs_RV.gather(1, torch.tensor(chosen, device=logits_RV.device)[:, None])[:, 0].tolist()
    width = min(max(counts), logits_RV.shape[1])
    values, ids = logprobs_RV.topk(width)
    pairs = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [
        TokenLogprobs(logprob, tuple(pair for pair in row[:count] if pair[1] > -math.inf))
        for logprob, row, count in zip(picked, pairs, counts, strict=True)
    ]
