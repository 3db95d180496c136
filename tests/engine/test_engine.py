"""The engine against a real paged runner: whatever the batch, each request's tokens are those it gets alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeray.engine.engine import Engine
from moeray.errors import MoerayError, QueueFullError, RequestError
from moeray.settings.engine import LEAST_CHUNK, EngineConfig
from moeray.types import FinishReason, GenerationRequest, SamplingParams
from tests.engine.history_runner import VOCAB, HistoryRunner

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def engine_of(num_blocks=64, block_size=4, eos=(), **config):
    settings = {"block_size": block_size, "max_batch_tokens": 32, "max_running": 8, "prefill_chunk": 8} | config
    runner = HistoryRunner(num_blocks, block_size, max_context=512)
    runner.eos_token_ids = eos
    return Engine(EngineConfig(**settings), runner), runner


def finish(engine, tokens=None):
    tokens = {} if tokens is None else tokens
    ends = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                ends[output.request_id] = output.finish_reason
        engine.check()
    return tokens, ends


def prefills(runner):
    """Prefill tokens of each step so far."""
    return [sum(e.count for e in batch.entries if e.count > 1 or e.start == 0) for batch in runner.batches]


def alone(request):
    engine, _ = engine_of(num_blocks=256, prefix_cache=False, max_batch_tokens=512, prefill_chunk=512)
    engine.submit(request)
    return finish(engine)[0][request.request_id]


def test_preemption_happens_and_changes_nothing():
    engine, _ = engine_of(num_blocks=10, block_size=4)
    requests = [GenerationRequest(f"r{i}", tuple(range(i, i + 9)), replace(GREEDY, max_tokens=16)) for i in range(4)]
    for request in requests:
        engine.submit(request)
    tokens, _ = finish(engine)
    assert engine.stats().preemptions > 0
    assert all(tokens[r.request_id] == alone(r) for r in requests)


def test_a_long_prompt_does_not_stall_running_streams():
    engine, runner = engine_of(num_blocks=2048, max_batch_tokens=512, prefill_chunk=64)
    runner.max_context = 8000
    engine, runner = (
        Engine(EngineConfig(block_size=4, max_batch_tokens=512, max_running=8, prefill_chunk=64), runner),
        runner,
    )
    for i in range(4):
        engine.submit(GenerationRequest(f"short{i}", (i + 1, 2, 3), replace(GREEDY, max_tokens=200)))
    while engine.stats().generation_tokens < 8:
        engine.step()
    engine.submit(GenerationRequest("long", tuple(i % VOCAB for i in range(4000)), GREEDY))
    runner.batches.clear()
    while engine.stats().running + engine.stats().waiting == 5 and engine.stats().prompt_tokens < 4000:
        outputs = engine.step()
        assert sum(len(o.token_ids) for o in outputs if o.request_id != "long") == 4
    assert max(prefills(runner)) <= 64


def test_prompts_take_less_of_steps_that_are_to_last_no_longer():
    """No step is that short, so they take as little as they ever do, while anything decodes."""
    engine, runner = engine_of(num_blocks=512, max_batch_tokens=256, prefill_chunk=64, prefix_cache=False)
    engine.keep_to(1e-9)
    engine.submit(GenerationRequest("short", (1, 2, 3), replace(GREEDY, max_tokens=40)))
    engine.step()
    engine.submit(GenerationRequest("long", tuple(i % VOCAB for i in range(300)), GREEDY))
    tokens, _ = finish(engine)
    beside = [sum(e.count for e in batch.entries if e.count > 1) for batch in runner.batches[1:] if batch.num_decodes]
    assert beside[:4] == [64, 32, LEAST_CHUNK, LEAST_CHUNK]
    assert tokens["long"] == alone(GenerationRequest("long", tuple(i % VOCAB for i in range(300)), GREEDY))


def test_what_is_pending_and_what_was_waited_for_is_counted():
    engine, _ = engine_of(num_blocks=256, max_batch_tokens=32, prefill_chunk=8, prefix_cache=False)
    engine.submit(GenerationRequest("first", tuple(range(3, 23)), GREEDY))
    assert engine.stats().pending_tokens == 20
    engine.step()
    engine.submit(GenerationRequest("second", tuple(range(5, 25)), GREEDY))
    assert engine.stats().pending_tokens == 20
    engine.step()
    stats = engine.stats()
    assert (stats.pending_tokens, stats.prefill_tokens, stats.decode_tokens) == (12, 28, 1)
    assert 0 < stats.decode_seconds_total < stats.prefill_seconds_total
    finish(engine)
    stats = engine.stats()
    assert (stats.pending_tokens, stats.prefill_tokens, stats.decode_tokens) == (0, 40, 2 * (GREEDY.max_tokens - 1))
    assert stats.decode_seconds_total > stats.step_seconds_total - stats.prefill_seconds_total


def test_a_shared_prefix_is_computed_once():
    engine, runner = engine_of()
    prompt = tuple(i % VOCAB for i in range(33))
    engine.submit(GenerationRequest("a", prompt, GREEDY))
    first, _ = finish(engine)
    computed = sum(prefills(runner))
    engine.submit(GenerationRequest("b", prompt, GREEDY))
    second, _ = finish(engine)
    assert second["b"] == first["a"]
    assert sum(prefills(runner)) - computed <= 4
    assert engine.stats().prefix_hit_tokens == 32


@pytest.mark.parametrize("done", [0, 1, 5, 11])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_resumed_request_goes_on_as_if_nothing_had_happened(done, temperature):
    sampling = replace(GREEDY, temperature=temperature, seed=3, frequency_penalty=0.3)
    whole = alone(GenerationRequest("x", (4, 5, 6), sampling))
    engine, _ = engine_of()
    engine.submit(GenerationRequest("x", (4, 5, 6), sampling, output_ids=tuple(whole[:done]), attempt=1))
    tokens, _ = finish(engine)
    assert tokens["x"] == whole[done:]


def test_an_end_token_stops_and_can_be_ignored():
    whole = alone(GenerationRequest("x", (7, 8), GREEDY))
    engine, _ = engine_of(eos=(whole[3],))
    first = whole.index(whole[3])
    engine.submit(GenerationRequest("stops", (7, 8), GREEDY))
    engine.submit(GenerationRequest("goes on", (7, 8), replace(GREEDY, ignore_eos=True)))
    tokens, ends = finish(engine)
    assert tokens == {"stops": whole[: first + 1], "goes on": whole}
    assert ends == {"stops": FinishReason.STOP, "goes on": FinishReason.LENGTH}


def test_a_step_that_fails_can_be_run_again(monkeypatch):
    engine, runner = engine_of()
    engine.submit(GenerationRequest("x", tuple(range(20)), GREEDY))
    run, calls = runner.run, []

    def fails_at_first(batch):
        calls.append(1)
        if len(calls) % 2:
            raise MoerayError("an expert is gone")
        return run(batch)

    monkeypatch.setattr(runner, "run", fails_at_first)
    tokens = []
    while engine.has_work:
        try:
            tokens += [t for output in engine.step() for t in output.token_ids]
        except MoerayError:
            engine.check()
    assert tokens == alone(GenerationRequest("x", tuple(range(20)), GREEDY))


def test_what_cannot_be_served_is_refused():
    engine, _ = engine_of(num_blocks=4, block_size=4, max_waiting=1, max_running=1)
    with pytest.raises(RequestError, match="16") as error:
        engine.submit(GenerationRequest("long", tuple(i % VOCAB for i in range(40)), GREEDY))
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(RequestError):
        engine.submit(GenerationRequest("empty", (), GREEDY))
    for name in "ab":  # the first waits for the next step alone
        engine.submit(GenerationRequest(name, (1,), GREEDY))
    with pytest.raises(QueueFullError) as full:
        engine.submit(GenerationRequest("c", (1,), GREEDY))
    assert full.value.retry_after_s > 0
