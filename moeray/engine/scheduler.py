"""Which tokens of which sequences the next step computes.

Sequences are served in the order they came. Every running sequence that decodes gets its one token; then prefills take
chunks of what is left of the step's budget. A sequence gets the blocks for all its tokens when it is admitted, so a
prefill never waits for blocks half-way; a decode that finds none preempts the sequence that was admitted last. The one
that was admitted first can preempt all others, so it always proceeds.

Only a sequence whose prefix is being computed by another lets those behind it go first: it waits until it can share
that prefix, so that what comes at the same time (the choices of one request, a burst with one prompt) is computed once.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Sized
from itertools import chain, islice

from moeray.engine.batch import Batch, Entry
from moeray.engine.blocks import BlockManager
from moeray.engine.pace import Pace
from moeray.engine.sampling import SampledToken
from moeray.engine.sequence import Sequence, Status
from moeray.errors import QueueFullError, RequestError
from moeray.logs import REQUESTS, log_names
from moeray.settings.engine import EngineConfig
from moeray.types import TokenLogprobs, TokenOutput

log = logging.getLogger(REQUESTS)


class Scheduler:
    """Owns all sequences of a router. `max_context` bounds prompt + output; the size of the cache bounds it too."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, max_context: int) -> None:
        self._config = config
        self._blocks = blocks
        self.pace = Pace(config.prefill_chunk)  # told by its owner how long steps took
        self._max_context = min(max_context, blocks.num_blocks * blocks.block_size)
        self._waiting: deque[Sequence] = deque()
        self._sharing: set[Sequence] = set()  # of those that wait, whose prefix one that runs computes
        self._running: list[Sequence] = []  # in order of admission
        self._ended: list[TokenOutput] = []  # over before they began; told by `take_ended`
        self._begun: list[str] = []  # admitted for the first time; told by `take_begun`
        self._by_id: dict[str, Sequence] = {}
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._ended)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that hold blocks, in order of admission."""
        return tuple(self._running)

    @property
    def num_running(self) -> int:
        """Those that hold blocks, and those that only wait for a prefix that one of these computes: nothing that is
        missing, places or blocks, would have them run sooner."""
        return len(self._running) + len(self._sharing)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - len(self._sharing)

    @property
    def pending_tokens(self) -> int:
        """Tokens of prompts that are still to be computed; of a prompt whose prefix another computes, none before it is
        known how much of it is left. Any thread may ask."""
        known = (*self._running, *(seq for seq in tuple(self._waiting) if seq not in self._sharing))
        return sum(seq.remaining for seq in known if seq.remaining > 1)

    # -- requests come and go -------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; a newer attempt at the same request replaces the older one.

        Raises QueueFullError, or RequestError where the prompt leaves no room for a token or the attempt is not newer.
        """
        known = self._by_id.get(seq.request_id)
        if known and known.attempt >= seq.attempt:
            raise RequestError(
                f"request {seq.request_id} is already here as attempt {known.attempt}; send a higher attempt than "
                f"{seq.attempt} or another id",
                param="request_id",
            )
        self._check_fit(seq)
        free = max(0, self._config.max_running - len(self._running))  # who waits for the next step alone
        if known is None and len(self._waiting) >= self._config.max_waiting + free:  # one that is known takes its place
            # About a second for each time that the running sequences have to be replaced before this one's turn.
            retry = max(1.0, len(self._waiting) / self._config.max_running)
            raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later", retry_after_s=retry)
        if known:
            self.abort(seq.request_id)
        self._enqueue(seq)

    def _check_fit(self, seq: Sequence) -> None:
        if seq.num_prompt >= self._max_context:
            raise RequestError(
                f"the context is {self._max_context} tokens but the prompt has {seq.num_prompt}, which leaves none for "
                "the answer; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )

    def _enqueue(self, seq: Sequence) -> None:
        reason = seq.ended(self._max_context)
        if reason is None:
            self._waiting.append(seq)
            self._by_id[seq.request_id] = seq
        else:  # a resumed request whose earlier attempt had come to its end
            self._ended.append(TokenOutput(seq.request_id, seq.attempt, (), finish_reason=reason))

    def take_ended(self) -> list[TokenOutput]:
        """The ends of requests that needed no step, each told once."""
        ended, self._ended = self._ended, []
        return ended

    def take_begun(self) -> list[str]:
        """The ids of requests that were admitted for the first time, each told once."""
        begun, self._begun = self._begun, []
        return begun

    def abort(self, request_id: str, keep_prefix: bool = True) -> bool:
        """End a request and free its blocks now; False when it is not here.

        `keep_prefix` False: its blocks hold nothing to rely on, and no other sequence may take them over.
        """
        before = len(self._ended)
        self._ended = [output for output in self._ended if output.request_id != request_id]
        seq = self._by_id.get(request_id)
        if seq is None:
            return len(self._ended) < before
        if seq.status is Status.WAITING:
            self._leave_queue(seq)
            self._drop(seq)
        else:
            self._finish(seq, keep_prefix)
        return True

    def _leave_queue(self, seq: Sequence) -> None:
        self._waiting.remove(seq)
        self._sharing.discard(seq)

    def _finish(self, seq: Sequence, keep_prefix: bool = True) -> None:
        self._running.remove(seq)
        self._blocks.free(seq, keep_prefix)
        self._drop(seq)

    def _drop(self, seq: Sequence) -> None:
        seq.status = Status.FINISHED
        del self._by_id[seq.request_id]

    # -- the next step --------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step's work, or None when there is none.

        Only block tables and statuses change: until `postprocess` the same work can be scheduled again.
        """
        decodes = self._decodes()
        prefills = self._prefills(self._prefill_budget(len(decodes)))
        entries = [Entry(seq, seq.num_computed, 1, True) for seq in decodes]
        entries += [Entry(seq, seq.num_computed, count, count == seq.remaining) for seq, count in prefills]
        return Batch(tuple(entries)) if entries else None

    def _decodes(self) -> list[Sequence]:
        """The sequences that decode, each with a block for its newest token; those admitted last may lose theirs."""
        decodes = []
        for seq in [seq for seq in self._running if seq.remaining == 1]:
            while seq.status is Status.RUNNING and not self._blocks.extend(seq):
                self._preempt(self._running[-1])
            if seq.status is Status.RUNNING:
                decodes.append(seq)
        return decodes

    def _preempt(self, victim: Sequence) -> None:
        """Back to the head of the queue; its KV is recomputed, or found again in the prefix cache."""
        assert self._running.pop() is victim
        self._blocks.free(victim)
        victim.status = Status.WAITING
        self._waiting.appendleft(victim)
        self.preemptions += 1
        log.info(
            "preempted behind %d tokens, since the KV cache is full", victim.num_output,
            extra=log_names(victim.request_id, victim.origin),
        )  # fmt: skip

    def _prefill_budget(self, decodes: int) -> int:
        left = self._config.max_batch_tokens - decodes
        return min(left, self.pace.chunk) if decodes else left

    def _prefills(self, budget: int) -> list[tuple[Sequence, int]]:
        """Split the budget over the prefills, admitting as long as some is left.

        Each in turn takes at most half of what is left, so that a short prompt is not stuck behind a long one; what
        nobody took goes to the oldest.
        """
        taken: list[tuple[Sequence, int]] = []
        prefilling = [seq for seq in self._running if seq.remaining > 1]
        candidates = chain(prefilling, self._admissions(prefilling))
        while budget and (seq := next(candidates, None)):
            count = min(seq.remaining, -(-budget // 2))
            taken.append((seq, count))
            budget -= count
        for i, (seq, count) in enumerate(taken):
            more = min(seq.remaining - count, budget)
            taken[i] = (seq, count + more)
            budget -= more
        return taken

    def _admissions(self, prefilling: list[Sequence]) -> Iterator[Sequence]:
        """Move those that wait to the running ones, as long as places and blocks for all their tokens are there.

        One whose next block is being computed by another stays until it can take it from the prefix cache. It keeps its
        place in the queue, and those behind it may go first: one long prefix would else keep all of them waiting. None
        of them computes what it waits for, since it would wait for the same, so they cannot hold it up in their turn.
        Who waits is asked anew at each step: nobody waits for a sequence that has ended or was preempted. No more are
        looked at than could run, so that a step costs no more behind a long queue.
        """
        pending = {block for seq in prefilling if (block := self._blocks.pending(seq))}
        for seq in tuple(islice(self._waiting, self._config.max_running)):
            if len(self._running) >= self._config.max_running:
                return
            if self._blocks.awaits(seq, pending):
                self._sharing.add(seq)
                continue
            self._sharing.discard(seq)
            # A block is left for each sequence that runs, or its next block would preempt the one just admitted.
            if not self._blocks.allocate(seq, spare=len(self._running)):
                return
            self._admit(seq)
            if block := self._blocks.pending(seq):
                pending.add(block)
            yield seq

    def _admit(self, seq: Sequence) -> None:
        self._leave_queue(seq)
        self._running.append(seq)
        seq.status = Status.RUNNING
        if seq.cached_tokens is None:  # not when it comes back from preemption and finds its own blocks again
            self._begun.append(seq.request_id)
            seq.cached_tokens = min(seq.num_computed, seq.num_prompt)
            self.prefix_query_tokens += seq.num_prompt
            self.prefix_hit_tokens += seq.cached_tokens

    # -- after the step -------------------------------------------------------------------------------------------

    def postprocess(
        self, batch: Batch, tokens: Sized[SampledToken], scores: Sized[TokenLogprobs] = ()
    ) -> list[TokenOutput]:
        """Take note of what the step computed and drew: one token for each of `batch.sampled`, in order, and `scores`
        for each row that is scored."""
        drawn, scored = iter(tokens), iter(scores)
        outputs = []
        for entry in batch.entries:
            told = tuple(islice(scored, len(entry.scored)))
            entry.seq.num_scored += len(told)
            entry.seq.num_computed += entry.count
            self._blocks.seal(entry.seq)
            if entry.samples:
                outputs.append(self._take_token(entry.seq, next(drawn), told))
            elif told:
                outputs.append(TokenOutput(entry.seq.request_id, entry.seq.attempt, (), prompt_logprobs=told))
        assert next(drawn, None) is None, "more tokens than sampled entries"
        assert next(scored, None) is None, "more scores than scored rows"
        return outputs

    def _take_token(self, seq: Sequence, drawn: SampledToken, told: tuple[TokenLogprobs, ...]) -> TokenOutput:
        if seq.num_tokens == seq.num_given:
            self.prompt_tokens += seq.num_prompt
        seq.append(drawn.token_id)
        self.generation_tokens += 1
        reason = seq.ended(self._max_context)
        if reason is not None:
            self._finish(seq)
        logprobs = () if drawn.logprobs is None else (drawn.logprobs,)
        return TokenOutput(
            seq.request_id, seq.attempt, (drawn.token_id,), logprobs, reason, cached_tokens=seq.cached_tokens or 0,
            prompt_logprobs=told,
        )  # fmt: skip
