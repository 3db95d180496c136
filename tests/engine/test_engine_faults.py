"""One bad request among good ones, and what a wrong request is told."""

import pytest

from moeray.engine.engine import Engine
from moeray.errors import RequestError
from moeray.settings.engine import EngineConfig
from moeray.types import FinishReason, GenerationRequest, SamplingParams
from tests.engine.history_runner import VOCAB, HistoryRunner, alone, drain, scores_alone

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def engine_of(explain=lambda batch: None, **runner):
    config = EngineConfig(block_size=4, max_running=4, max_batch_tokens=32)
    return Engine(config, HistoryRunner(32, 4, 100, **runner), explain=explain)


def test_logits_that_are_no_numbers_end_their_request_alone():
    engine = engine_of(poison=VOCAB - 1)
    good = GenerationRequest("good", (1, 2, 3), GREEDY)
    engine.submit(good)
    engine.submit(GenerationRequest("bad", (*range(1, 9), VOCAB - 1), GREEDY, attempt=3))
    failures = []
    while not failures:
        failures = [output for output in engine.step() if output.error]
    assert [(f.request_id, f.attempt, f.finish_reason) for f in failures] == [("bad", 3, FinishReason.ERROR)]
    assert "bad" in failures[0].error
    rest = drain(engine)
    assert rest.tokens["good"] == alone(good, 100)[0][-len(rest.tokens["good"]) :]
    assert engine.stats().generation_tokens == 6
    assert engine.stats().kv_blocks_used == 0


def test_a_prompt_whose_scores_are_no_numbers_ends_alone():
    """In the middle of it, and with its blocks forgotten."""
    engine = engine_of(poison=VOCAB - 1)
    scored = SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=1)
    good = GenerationRequest("good", (1, 2, 3), scored)
    engine.submit(good)
    engine.submit(GenerationRequest("bad", (*range(1, 28), VOCAB - 1, *range(1, 28)), scored))
    rest = drain(engine)
    assert rest.reasons == {"good": FinishReason.LENGTH, "bad": FinishReason.ERROR}
    assert rest.scores == {"good": scores_alone(good), "bad": []}
    assert rest.tokens["good"] == alone(good, 100)[0]
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("whys", [(None, "a tensor is bad"), ("a tensor is bad",), (None, None)])
def test_every_token_of_what_failed_is_asked_for_its_cause(whys):
    asked, answers = [], iter(whys)

    def explain(batch):
        asked.extend((entry.start, entry.count, entry.samples) for entry in batch.entries)
        return next(answers)

    engine = engine_of(explain, poison=VOCAB - 1)
    engine.submit(GenerationRequest("bad", (*([1] * 39), VOCAB - 1), GREEDY))
    outputs = []
    while not outputs:
        outputs = engine.step()
    assert asked == [(0, 32, False), (32, 8, True)][: len(whys)]
    assert outputs[0].error.endswith(whys[-1] or "set dtype to bfloat16 or float32")


def test_whoever_fails_is_told_of_its_own_request_alone():
    engine = engine_of(poison=VOCAB - 1)
    for name in ("one", "other"):
        engine.submit(GenerationRequest(name, (1, VOCAB - 1), GREEDY))
    errors = {output.request_id: output.error for output in engine.step()}
    assert errors.keys() == {"one", "other"}
    assert "other" not in errors["one"]
    assert "one" not in errors["other"]


def test_the_prefix_of_a_failed_request_is_not_shared():
    engine = engine_of(poison=VOCAB - 1)
    prompt = tuple(range(1, 17))
    engine.submit(GenerationRequest("first", prompt, GREEDY))
    drain(engine)
    engine.submit(GenerationRequest("bad", (*prompt, VOCAB - 1), GREEDY))
    assert drain(engine).reasons == {"bad": FinishReason.ERROR}
    hits = engine.stats().prefix_hit_tokens
    again = GenerationRequest("again", prompt, GREEDY)
    engine.submit(again)
    assert drain(engine).tokens["again"] == alone(again, 100)[0]
    assert engine.stats().prefix_hit_tokens == hits == 16


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (GenerationRequest("a", ()), "prompt"),
        (GenerationRequest("a", (1, VOCAB)), "prompt"),
        (GenerationRequest("a", (-1,)), "prompt"),
        (GenerationRequest("a", (1,), output_ids=(VOCAB,)), "output_ids"),
        (GenerationRequest("a", (1,), SamplingParams(logit_bias=((VOCAB, 1.0),))), "logit_bias"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(request_, param):
    engine = engine_of()
    with pytest.raises(RequestError) as refused:
        engine.submit(request_)
    assert refused.value.param == param
    assert not engine.has_work


def test_stats_count_what_happened():
    engine = engine_of()
    for name in ("a", "b"):
        engine.submit(GenerationRequest(name, tuple(range(1, 14)), GREEDY))
        assert engine.stats().waiting == 1
        drain(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.kv_blocks_total) == (0, 0, 0, 32)
    assert (stats.prompt_tokens, stats.generation_tokens) == (26, 12)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (26, 12)
    assert stats.steps == 12
    assert stats.step_seconds_total >= stats.last_step_seconds > 0.0
