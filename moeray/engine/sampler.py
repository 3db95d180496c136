"""From a step's logits to one token a sequence. A row's draw depends on its own logits, parameters and position."""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch import Tensor

from moeray.engine.batch import Batch
from moeray.engine.sampling import SampledToken, draw, keyed_uniform, likeliest, report_logprobs
from moeray.engine.sequence import Sequence
from moeray.errors import MoerayError
from moeray.types import SamplingParams, TokenLogprobs

_GREEDY_BELOW = 1e-5  # so small a temperature leaves the likeliest token alone, and overflows fp32 on the way


class LogitsError(MoerayError):
    """The model's logits of these requests are not numbers; nothing was drawn for any request of the step."""

    def __init__(self, request_ids: tuple[str, ...], why: str | None = None) -> None:
        """`why`: what is known of the cause, with how to mend it."""
        why = why or ("the weights or the dtype overflow; check the checkpoint, or set dtype to bfloat16 or float32")
        super().__init__(f"the logits of request {', '.join(request_ids)} are not finite: {why}")
        self.request_ids = request_ids


class Sampler:
    """Holds no state: draws are keyed by (seed, position), so that any router draws the same token."""

    def sample(self, logits: Tensor, seqs: list[Sequence]) -> list[SampledToken]:
        """Draw a token for each row of `logits` [B, V] (any float dtype), row i being the sequence `seqs[i]`.

        Order: logit bias, penalties, `min_tokens`, then the maximum at temperature 0, else temperature, top-k, top-p,
        min-p. -inf is an impossible token; NaN, inf or a row of -inf raises LogitsError.
        """
        if not seqs:
            return []
        logits_BV = logits.float()
        self._check(logits_BV.amax(-1), seqs)  # which NaN passes through
        tokens = self._draw(logits_BV, seqs)
        logprobs = self._logprobs(logits_BV, seqs, tokens)
        return [SampledToken(token, logprobs.get(row)) for row, token in enumerate(tokens)]

    def _check(self, best_B: Tensor, seqs: list[Sequence]) -> None:
        if not (finite := best_B.isfinite()).all():
            raise LogitsError(tuple(seq.request_id for seq, ok in zip(seqs, finite.tolist(), strict=True) if not ok))

    def _draw(self, logits_BV: Tensor, seqs: list[Sequence]) -> list[int]:
        if moved := [row for row, seq in enumerate(seqs) if seq.penalties is not None or seq.barred]:
            logits_BV = logits_BV.clone()
            for row in moved:
                _move(logits_BV[row], seqs[row])
        greedy = [row for row, seq in enumerate(seqs) if _greedy(seq.sampling)]
        drawn = [row for row, seq in enumerate(seqs) if not _greedy(seq.sampling)]
        tokens = [0] * len(seqs)
        if greedy:
            for row, token in zip(greedy, likeliest(_rows(logits_BV, greedy)), strict=True):
                tokens[row] = token
        if drawn:
            uniform = [keyed_uniform(seqs[row].sampling.seed, seqs[row].num_tokens) for row in drawn]
            params = [seqs[row].sampling for row in drawn]
            for row, token in zip(drawn, draw(_rows(logits_BV, drawn), params, uniform), strict=True):
                tokens[row] = token
        return tokens

    def _logprobs(self, logits_BV: Tensor, seqs: list[Sequence], tokens: list[int]) -> dict[int, TokenLogprobs]:
        wanted = {row: n for row, seq in enumerate(seqs) if (n := seq.sampling.logprobs) is not None}
        if not wanted:
            return {}
        rows = list(wanted)
        reports = report_logprobs(_rows(logits_BV, rows), [tokens[row] for row in rows], list(wanted.values()))
        return dict(zip(rows, reports, strict=True))


def _move(logits_V: Tensor, seq: Sequence) -> None:
    """In place: what the request makes of the model's logits before a draw."""
    if seq.penalties is not None:
        seq.penalties.apply(logits_V, seq.tokens)
    if barred := seq.barred:
        logits_V[torch.tensor(sorted(barred), device=logits_V.device)] = -math.inf


def check_scores(batch: Batch, scores: list[TokenLogprobs]) -> None:
    """Raises LogitsError for the requests whose scored rows have logits that are not numbers."""
    if not scores:
        return
    each = iter(scores)
    of_seq = [(entry.seq, list(islice(each, len(entry.scored)))) for entry in batch.entries]
    if failed := [seq.request_id for seq, told in of_seq if any(math.isnan(entry.logprob) for entry in told)]:
        raise LogitsError(tuple(failed))


def _greedy(params: SamplingParams) -> bool:
    return params.temperature < _GREEDY_BELOW


def _rows(logits_BV: Tensor, rows: list[int]) -> Tensor:
    """These, in order, without a copy where they are all."""
    return logits_BV if len(rows) == len(logits_BV) else logits_BV[torch.tensor(rows, device=logits_BV.device)]
