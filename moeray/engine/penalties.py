"""What moves a sequence's logits before a draw: the bias and the penalties, over the tokens that it has by then.

Which tokens there are, and how often, is kept with the sequence and brought up to date as it grows: a step costs what
is new, and tensor operations over the distinct tokens.

Shapes: V vocabulary, N distinct tokens. Logits are fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from moeray.types import SamplingParams


class Occurrences:
    """The distinct tokens of a sequence from `start` on, in the order of their first places, and how often each occurs.

    `ids_N`: int64 [N]. `counts_N`: fp64 [N], in which a penalty's arithmetic is Python's own.
    """

    def __init__(self, start: int) -> None:
        self._counted = start
        self._places: dict[int, int] = {}
        self.ids_N = torch.empty(0, dtype=torch.int64)
        self.counts_N = torch.empty(0, dtype=torch.float64)

    def follow(self, tokens: Sequence[int], device: torch.device) -> None:
        """Count those of `tokens`, all that the sequence has, that came since the last call; tensors go to `device`."""
        new = Counter(tokens[self._counted :])
        unseen = [token for token in new if token not in self._places]
        added = dict(zip(unseen, range(len(self._places), len(self._places) + len(unseen)), strict=True))
        zeros = torch.zeros(len(unseen), dtype=torch.float64, device=device)
        ids_N = torch.cat([self.ids_N.to(device), torch.tensor(unseen, dtype=torch.int64, device=device)])
        counts_N = torch.cat([self.counts_N.to(device), zeros])
        placed = [added[token] if token in added else self._places[token] for token in new]
        places = torch.tensor(placed, dtype=torch.int64, device=device)
        counts_N[places] += torch.tensor(list(new.values()), dtype=torch.float64, device=device)
        # Only now, that nothing can fail any more: whoever comes again after a failure counts the same.
        self._counted, self.ids_N, self.counts_N = len(tokens), ids_N, counts_N
        self._places |= added


class Penalties:
    """Of one sequence, whose first `num_prompt` tokens are its prompt. Repetition looks at prompt and output, presence
    and frequency at the output alone."""

    def __init__(self, params: SamplingParams, num_prompt: int) -> None:
        self._params = params
        self._all = Occurrences(0)
        self._output = Occurrences(num_prompt)

    @classmethod
    def of(cls, params: SamplingParams, num_prompt: int) -> Penalties | None:
        """None where these parameters leave the logits as they are."""
        p = params
        moves = p.logit_bias or p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
        return cls(params, num_prompt) if moves else None

    def apply(self, logits_V: Tensor, tokens: Sequence[int]) -> None:
        """Apply, in place and in this order, the bias and the repetition, presence and frequency penalties.

        `tokens`: all that the sequence has by now. No logit becomes inf.
        """
        if self._params.logit_bias:
            self._bias(logits_V)
        if self._params.repetition_penalty != 1.0:
            self._all.follow(tokens, logits_V.device)
            self._repetition(logits_V)
        if self._params.presence_penalty or self._params.frequency_penalty:
            self._output.follow(tokens, logits_V.device)
            self._presence_and_frequency(logits_V)

    def _bias(self, logits_V: Tensor) -> None:
        ids, bias = zip(*self._params.logit_bias, strict=True)
        device = logits_V.device
        logits_V.index_add_(0, torch.tensor(ids, device=device), torch.tensor(bias, dtype=torch.float32, device=device))

    def _repetition(self, logits_V: Tensor) -> None:
        ids_N, by = self._all.ids_N, self._params.repetition_penalty
        old_N = logits_V[ids_N]
        logits_V[ids_N] = torch.where(old_N > 0, old_N / by, old_N * by).clamp(max=torch.finfo(logits_V.dtype).max)

    def _presence_and_frequency(self, logits_V: Tensor) -> None:
        penalties_N = self._params.presence_penalty + self._params.frequency_penalty * self._output.counts_N
        logits_V[self._output.ids_N] -= penalties_N.float()
