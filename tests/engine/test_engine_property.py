"""Random arrivals, aborts, preemptions, shared prefixes, resumes, failing steps: each output equals the lone one."""

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeray.engine.engine import Engine
from moeray.errors import MoerayError, QueueFullError
from moeray.settings.engine import EngineConfig
from moeray.types import FinishReason, GenerationRequest, SamplingParams
from tests.engine.history_runner import VOCAB, Collected, HistoryRunner, alone, scores_alone

MAX_CONTEXT = 60


def _sampling(rng: random.Random) -> SamplingParams:
    greedy, max_tokens = rng.random() < 0.3, rng.randint(1, 24)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, min(9, max_tokens)]),
        temperature=0.0 if greedy else rng.choice([0.3, 1.0, 1.5]),
        top_p=rng.choice([1.0, 0.8]),
        top_k=rng.choice([0, 0, 5]),
        min_p=rng.choice([0.0, 0.05]),
        seed=rng.randrange(1 << 40),
        frequency_penalty=rng.choice([0.0, 0.4]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logprobs=rng.choice([None, 2]),
        stop_token_ids=rng.choice([(), (7,)]),
        ignore_eos=rng.random() < 0.5,
        prompt_logprobs=rng.choice([None, None, 0, 2]),
    )


def _request(rng: random.Random, number: int, prefixes: list[tuple[int, ...]], limit: int) -> GenerationRequest:
    """A prompt that may share a prefix with others; one in four resumes an earlier attempt in its middle, or in that of
    its prompt, where this is scored."""
    tail = tuple(rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 12)))
    prompt = ((rng.choice(prefixes) if rng.random() < 0.7 else ()) + tail)[: limit - 1]
    request = GenerationRequest(f"r{number}", prompt, _sampling(rng))
    if request.sampling.prompt_logprobs is not None and rng.random() < 0.25:
        return replace(request, prompt_scored=rng.randrange(len(prompt)), attempt=1)
    if rng.random() < 0.25:
        generated, _ = alone(request, limit)
        done = tuple(generated[: rng.randint(0, len(generated))])
        return GenerationRequest(request.request_id, prompt, request.sampling, done, attempt=1)
    return request


class World:
    """An engine under random load, with the requests that must finish in it."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 8])
        num_blocks = rng.randint(-(-24 // block_size), 120 // block_size)
        budget = rng.choice([8, 16, 64])
        self.config = EngineConfig(
            max_running=rng.randint(1, 8),
            max_waiting=rng.choice([3, 100]),
            max_batch_tokens=budget,
            prefill_chunk=rng.choice([1, 4, 16]),
            block_size=block_size,
            prefix_cache=rng.random() < 0.8,
        )
        self.limit = min(MAX_CONTEXT, num_blocks * block_size)
        fail_at = frozenset(rng.sample(range(1, 60), 4)) if rng.random() < 0.4 else frozenset()
        self.runner = HistoryRunner(num_blocks, block_size, MAX_CONTEXT, fail_at)
        self.engine = Engine(self.config, self.runner)
        self.prefixes = [tuple(rng.randrange(1, VOCAB) for _ in range(rng.randint(4, 20))) for _ in range(3)]
        self.live: dict[str, GenerationRequest] = {}
        self.collected = Collected()
        self.latest: GenerationRequest | None = None
        self.refused = 0
        self.streaming: set[str] = set()

    def arrive(self, number: int) -> None:
        """One in four is a further choice for the prompt that came before it."""
        request = _request(self.rng, number, self.prefixes, self.limit)
        if self.latest is not None and self.rng.random() < 0.25:
            request = replace(request, prompt_ids=self.latest.prompt_ids, output_ids=self.latest.output_ids)
        self.latest = request
        try:
            self.engine.submit(request)
        except QueueFullError:
            self.refused += 1
            return
        self.live[request.request_id] = request

    def abort(self) -> None:
        open_ids = [key for key in self.live if key not in self.collected.reasons]
        if open_ids:
            victim = self.rng.choice(open_ids)
            assert self.engine.abort(victim)
            assert not self.engine.abort(victim)
            del self.live[victim]
            self.collected.tokens.pop(victim, None)
            self.collected.scores.pop(victim, None)

    def step(self) -> None:
        before, preemptions = len(self.runner.batches), self.engine.stats().preemptions
        try:
            outputs = self.engine.step()
        except MoerayError:
            self.engine.check()
            self.streaming &= {entry.seq.request_id for entry in self.runner.batches[-1].entries}  # less the preempted
            return
        assert not {output.request_id for output in outputs} - set(self.live)
        self.collected.take(outputs)
        self.engine.check()
        for batch in self.runner.batches[before:]:
            self.check_budget(batch, self.engine.stats().preemptions - preemptions)
            self.check_common(batch)
        self.streaming = {output.request_id for output in outputs if output.token_ids and not output.finish_reason}

    def check_budget(self, batch, preemptions: int) -> None:
        """While a sequence streams (it got a token from the step before), prefills stay within their chunk. One that
        was preempted for this step may be back in it, and computes again what was not kept."""
        streams = [entry for entry in batch.entries if entry.seq.request_id in self.streaming]
        decodes = [entry for entry in streams if entry.count == 1]
        assert batch.num_tokens <= self.config.max_batch_tokens
        assert len(batch.entries) <= self.config.max_running
        assert len(streams) - len(decodes) <= preemptions
        if decodes:
            assert batch.num_tokens - len(decodes) <= self.config.prefill_chunk + self.resumed_decodes(batch)

    def check_common(self, batch) -> None:
        """No two compute the same block where both could share it."""
        size, computed = self.config.block_size, []
        for entry in batch.entries:
            end = (entry.start // size + 1) * size
            if entry.seq.sampling.prompt_logprobs is not None:
                continue  # it needs the logits of each row
            if self.config.prefix_cache and end < entry.seq.num_tokens - entry.samples:
                computed.append(tuple(entry.seq.tokens[:end]))
        assert len(set(computed)) == len(computed)

    def resumed_decodes(self, batch) -> int:
        """One-token spans that are no stream yet: a failed step's, or a prompt cached but for its last token."""
        return sum(entry.count == 1 and entry.seq.request_id not in self.streaming for entry in batch.entries)

    def run(self, requests: int) -> None:
        number = 0
        while number < requests or self.engine.has_work:
            while number < requests and self.rng.random() < 0.5:
                self.arrive(number)
                number += 1
            if self.rng.random() < 0.08:
                self.abort()
            self.step()
            assert len(self.runner.batches) < 6000, f"no end in sight: {self.engine.stats()}"

    def check_outputs(self) -> None:
        assert self.engine.stats().kv_blocks_used == 0
        assert set(self.collected.reasons) == set(self.live)
        for key, request in self.live.items():
            tokens, reason = alone(request, self.limit)
            assert self.collected.tokens[key] == tokens, key
            assert self.collected.reasons[key] is reason, key
            if tokens and reason is FinishReason.STOP:
                assert len(request.output_ids) + len(tokens) > request.sampling.min_tokens, key
            wanted = request.sampling.prompt_logprobs is not None and not request.output_ids
            assert self.collected.scores[key] == (scores_alone(request)[request.prompt_scored :] if wanted else []), key


@settings(max_examples=60, deadline=None, derandomize=False)
@given(st.integers(0, 1 << 32), st.integers(1, 14))
@example(2156, 14)  # preempted and back in the same step
def test_any_load_gives_the_lone_output(seed, requests):
    world = World(seed)
    world.run(requests)
    world.check_outputs()


def test_the_random_loads_reach_every_corner():
    """The property would say little if no load preempted, shared, refused, failed or ended by each reason."""
    seen = {"preemptions": 0, "hits": 0, "refused": 0, "failed": 0}
    reasons = set()
    for seed in range(40):
        world = World(seed)
        world.run(16)
        world.check_outputs()
        stats = world.engine.stats()
        seen["preemptions"] += stats.preemptions
        seen["hits"] += stats.prefix_hit_tokens
        seen["refused"] += world.refused
        seen["failed"] += len(world.runner.batches) - stats.steps
        reasons |= set(world.collected.reasons.values())
    assert all(count > 5 for count in seen.values()), seen
    assert {reason.value for reason in reasons} == {"stop", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_soak(seed):
    world = World(seed)
    world.run(40)
    world.check_outputs()
