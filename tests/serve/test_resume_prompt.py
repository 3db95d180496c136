"""A prompt's log probabilities outlive the router that computes them: none is lost, none comes twice."""

from __future__ import annotations

import asyncio

import pytest

from moeray.types import GenerationRequest, SamplingParams
from tests.checkpoints import make_tiny
from tests.fleet import Fleet
from tests.serve.test_resume import Streams, backend_over, nothing
from tests.systems import tokens_of

PROMPT = tuple((7 * i) % 300 + 6 for i in range(300))
SMALL_STEPS = {"engine__max_batch_tokens": 2, "engine__max_running": 2}
REQUEST = GenerationRequest(
    "r", PROMPT, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, prompt_logprobs=2)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("deepseek_v3", tmp_path_factory.mktemp("resume") / "m")


def run(fleet, after, disturb):
    async def ask():
        async with backend_over(fleet) as backend:
            return (await Streams(backend, after, disturb).run([REQUEST]))[0]

    return asyncio.run(ask())


def scores_of(outputs):
    return [entry for output in outputs for entry in output.prompt_logprobs]


@pytest.fixture(scope="module")
def undisturbed(model):
    with Fleet(model) as fleet:
        fleet.add_router()
        return run(fleet, 1, nothing)


@pytest.mark.parametrize(("after", "in_prompt"), [(5, True), (len(PROMPT) // 2 + 10, False)])
def test_a_router_dies_in_the_middle_of_the_prompt_or_of_the_answer(model, undisturbed, after, in_prompt):
    def replace_router():
        fleet.kill(fleet.routers[0])
        fleet.add_router()

    with Fleet(model, **SMALL_STEPS) as fleet:
        fleet.add_router()
        outputs = run(fleet, after, replace_router)
    second = [output for output in outputs if output.attempt == 1]
    assert second
    assert bool(scores_of(second)) is in_prompt
    assert len(scores_of(second)) < len(PROMPT) - 1
    assert tokens_of(outputs) == tokens_of(undisturbed)
    ours, expected = scores_of(outputs), scores_of(undisturbed)
    assert len(ours) == len(expected) == len(PROMPT) - 1
    assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in expected], abs=1e-4)
    assert [t for e in ours for t, _ in e.top] == [t for e in expected for t, _ in e.top]
