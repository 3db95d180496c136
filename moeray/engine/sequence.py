"""One request inside a router: its tokens so far, how many of them have their KV in the cache, and where."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from moeray.engine.penalties import Penalties
from moeray.types import FinishReason, GenerationRequest, SamplingParams


class Status(StrEnum):
    """`WAITING` holds no blocks; `RUNNING` holds blocks; `FINISHED` is no longer the scheduler's."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The one mutable record of a request; the scheduler owns it, and none but it and the block manager changes it.

    `tokens` is prompt + output, the first `num_given` of them as submitted (with an earlier attempt's). `num_computed`
    counts the leading tokens whose KV is in the cache, in the blocks of `block_table`. `prefix` names those of its
    blocks that the block manager has sealed, `cached_tokens` counts prompt tokens that were never computed here
    because another request had done so. `prefix_hashes` are of its tokens up to the end of each of its leading full
    blocks, as far as they were asked for. `penalties`: what its next draw makes of the tokens before it, None for
    nothing. `num_scored` counts the leading tokens that were told how likely they make the prompt's next one, which are
    all that have one where nobody asked. `enders` end it.
    """

    def __init__(self, request: GenerationRequest, eos_token_ids: Collection[int] = ()) -> None:
        self.request_id: str = request.request_id
        self.origin: str = request.origin
        self.attempt: int = request.attempt
        self.sampling: SamplingParams = request.sampling
        self.tokens: list[int] = [*request.prompt_ids, *request.output_ids]
        self.num_prompt: int = len(request.prompt_ids)
        self.num_given: int = len(self.tokens)
        self.penalties = Penalties.of(request.sampling, self.num_prompt)
        self.status = Status.WAITING
        self.num_computed = 0
        self.block_table: list[int] = []
        self.prefix: list[int] = []
        self.prefix_hashes: list[int] = []
        self.cached_tokens: int | None = None
        self.num_scored = self.num_prompt - 1
        if request.sampling.prompt_logprobs is not None and not request.output_ids:
            self.num_scored = min(request.prompt_scored, self.num_scored)
        self._eos = frozenset(eos_token_ids)
        self.enders = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            self.enders |= self._eos

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to compute before the next token can be drawn; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def reusable(self) -> int:
        """So many leading tokens need not be computed here if their KV is found: the last one makes the next token, and
        none gives a log probability without being computed."""
        return self.num_scored if self.num_scored < self.num_prompt - 1 else self.num_tokens - 1

    @property
    def barred(self) -> frozenset[int]:
        """Tokens that may not be drawn next, since it is too short to end. As in vLLM, the model's own end is one of
        them even where it would end nothing."""
        return self.enders | self._eos if self.num_output < self.sampling.min_tokens else frozenset()

    def append(self, token: int) -> None:
        """Take a drawn token; its KV is computed by the next step."""
        self.tokens.append(token)

    def ended(self, max_context: int) -> FinishReason | None:
        """Why generation is over, if it is: the newest output token ends it, or there is no room for another."""
        if self.num_output and self.tokens[-1] in self.enders:
            return FinishReason.STOP
        if self.num_output >= self.sampling.max_tokens or self.num_tokens >= max_context:
            return FinishReason.LENGTH
        return None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.status.value}, {self.num_prompt}+{self.num_output} tokens, "
            f"{self.num_computed} computed, blocks {self.block_table})"
        )
