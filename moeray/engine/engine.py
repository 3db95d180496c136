"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from moeray.engine.batch import Batch, Entry
from moeray.engine.blocks import BlockManager
from moeray.engine.runner import Runner
from moeray.engine.sampler import LogitsError, Sampler, check_scores
from moeray.engine.scheduler import Scheduler
from moeray.engine.sequence import Sequence
from moeray.errors import RequestError
from moeray.settings.engine import EngineConfig
from moeray.types import FinishReason, GenerationRequest, TokenOutput

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where the engine stands; totals count from its start.

    `prefix_hit_tokens` of `prefix_query_tokens` prompt tokens came from the prefix cache. `prompt_tokens` counts
    prompts whose prefill is done, `pending_tokens` those that are still to be computed. `decode_seconds_total` is what
    decoding sequences, all added up, waited for their `decode_tokens`; `prefill_tokens` were computed in steps with
    prefills, `prefill_seconds_total` long. `running` counts those, too, that only wait for a prefix that another one
    computes. Durations are in seconds.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_cache_usage_ratio: float
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    pending_tokens: int
    decode_tokens: int
    decode_seconds_total: float
    prefill_tokens: int
    prefill_seconds_total: float
    steps: int
    step_seconds_total: float
    last_step_seconds: float


class Engine:
    """Single-threaded: the loop that calls `step` is its owner, and makes every other call but `stats`.

    `explain`: asked of tokens whose logits are not finite; says why, and how to mend it, where it knows.
    """

    def __init__(
        self, config: EngineConfig, runner: Runner, sampler: Sampler | None = None,
        explain: Callable[[Batch], str | None] = lambda batch: None,
    ) -> None:  # fmt: skip
        self._runner = runner
        self._explain = explain
        self._most_tokens = config.max_batch_tokens
        self._blocks = BlockManager(runner.num_blocks, config.block_size, config.prefix_cache)
        self._scheduler = Scheduler(config, self._blocks, runner.max_context)
        self._sampler = sampler or Sampler()
        self._steps = 0
        self._step_seconds = 0.0
        self._last_step_seconds = 0.0
        self._decode_tokens = 0
        self._decode_seconds = 0.0
        self._prefill_tokens = 0
        self._prefill_seconds = 0.0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestError where it cannot be served as asked, QueueFullError where later can."""
        self._check_ids(request)
        self._scheduler.add(Sequence(request, self._runner.eos_token_ids))

    def keep_to(self, step_s: float | None) -> None:
        """From now on, prompts take fewer tokens of steps beside decodes that would last longer; None: never."""
        self._scheduler.pace.keep_to(step_s)

    def abort(self, request_id: str) -> bool:
        """End a request and free its blocks now; False when it is not here."""
        return self._scheduler.abort(request_id)

    def take_begun(self) -> list[str]:
        """The requests whose first step has begun since this was last asked."""
        return self._scheduler.take_begun()

    def step(self) -> list[TokenOutput]:
        """Compute one batch and return what came of it.

        An error of the runner passes through and no request is lost: the next step computes the same tokens again.
        A request whose logits are not finite ends with an error; those beside it get their tokens a step later.
        """
        if ended := self._scheduler.take_ended():
            return ended
        batch = self._scheduler.schedule()
        if batch is None:
            return []
        began = time.perf_counter()
        logits, scores = self._runner.run(batch)
        try:
            check_scores(batch, scores)
            tokens = self._sampler.sample(logits, batch.sampled)
        except LogitsError as error:
            return self._fail(error, [entry for entry in batch.entries if entry.seq.request_id in error.request_ids])
        outputs = self._scheduler.postprocess(batch, tokens, scores)
        self._time(batch, time.perf_counter() - began)
        return outputs

    def _fail(self, error: LogitsError, entries: list[Entry]) -> list[TokenOutput]:
        why, failed = self._why(entries[0]), [entry.seq for entry in entries]
        log.error("%s", LogitsError(error.request_ids, why))
        for seq in failed:
            self._scheduler.abort(seq.request_id, keep_prefix=False)
        told = {seq: str(LogitsError((seq.request_id,), why)) for seq in failed}  # nobody is told of others' requests
        return [
            TokenOutput(seq.request_id, seq.attempt, (), finish_reason=FinishReason.ERROR, error=error)
            for seq, error in told.items()
        ]

    def _why(self, entry: Entry) -> str | None:
        """By its sequence's tokens up to there once more, of which any may have been the first to go wrong."""
        seq, end = entry.seq, entry.start + entry.count
        for start in range(seq.cached_tokens or 0, end, self._most_tokens):
            count = min(self._most_tokens, end - start)
            if why := self._explain(Batch((Entry(seq, start, count, entry.samples and start + count == end),))):
                return why
        return None

    def _time(self, batch: Batch, seconds: float) -> None:
        self._steps += 1
        self._step_seconds += seconds
        self._last_step_seconds = seconds
        decodes = batch.num_decodes
        prefilled = batch.num_tokens - decodes
        self._scheduler.pace.note(decodes, prefilled, seconds)
        self._decode_tokens += decodes
        self._decode_seconds += decodes * seconds
        if prefilled:
            self._prefill_tokens += prefilled
            self._prefill_seconds += seconds

    def _check_ids(self, request: GenerationRequest) -> None:
        if not request.prompt_ids:
            raise RequestError("the prompt has no tokens; send at least one", param="prompt")
        vocab = self._runner.vocab_size
        given = {
            "prompt": request.prompt_ids,
            "output_ids": request.output_ids,
            "logit_bias": tuple(token for token, _ in request.sampling.logit_bias),
        }
        for param, ids in given.items():
            if ids and not (min(ids) >= 0 and max(ids) < vocab):
                wrong = next(token for token in ids if not 0 <= token < vocab)
                raise RequestError(f"{param} names token {wrong}; the model's tokens are 0 to {vocab - 1}", param=param)

    def stats(self) -> EngineStats:
        """A snapshot of counters; any thread may ask."""
        scheduler, blocks = self._scheduler, self._blocks
        used = blocks.used
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_blocks_used=used,
            kv_blocks_total=blocks.num_blocks,
            kv_cache_usage_ratio=used / blocks.num_blocks,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            pending_tokens=scheduler.pending_tokens,
            decode_tokens=self._decode_tokens,
            decode_seconds_total=self._decode_seconds,
            prefill_tokens=self._prefill_tokens,
            prefill_seconds_total=self._prefill_seconds,
            steps=self._steps,
            step_seconds_total=self._step_seconds,
            last_step_seconds=self._last_step_seconds,
        )

    def check(self) -> None:
        """Assert that the block accounts agree with the running sequences."""
        self._blocks.check(self._scheduler.running)
