"""The log probabilities of a prompt's tokens as vLLM writes them."""

from __future__ import annotations

from collections.abc import Sequence

from moeray.serve.responses import PromptLogprob, PromptScores
from moeray.serve.tokens import Vocabulary
from moeray.types import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity


def prompt_scores(prompt_ids: Sequence[int], scores: Sequence[TokenLogprobs], vocabulary: Vocabulary) -> PromptScores:
    """One entry a token of the prompt, by token ids: its own and the likeliest; none for the first. `scores`: of the
    tokens from the second on."""
    entries: PromptScores = [None]
    for chosen, score in zip(prompt_ids[1:], scores, strict=True):
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(score.top, 1)}
        logprobs = {chosen: score.logprob, **dict(score.top)}
        entries.append(
            {
                token_id: PromptLogprob(
                    logprob=max(logprob, LOWEST_LOGPROB),
                    rank=ranks.get(token_id),
                    decoded_token=vocabulary.token(token_id).text,
                )
                for token_id, logprob in logprobs.items()
            }
        )
    return entries
