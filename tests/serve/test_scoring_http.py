"""What evaluation clients make of an echoed prompt, through HTTP and a real model, is what transformers computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeray.serve.system import SystemBackend
from tests.checkpoints import make_tiny
from tests.fleet import Fleet, generated
from tests.serve.test_resume_http import serving

SMALL_STEPS = {"engine__max_batch_tokens": 8, "engine__max_running": 4}


@pytest.fixture(scope="module", params=["deepseek_v3", "granitemoe"])
def model(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp("http") / "m", tokenizer=True)


@pytest.fixture(scope="module")
def dense(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.inference_mode()
def likelihood(dense, ids, context):
    """(log-likelihood of the tokens behind the context, whether each of them is the likeliest)."""
    logprobs = dense(torch.tensor([ids])).logits[0].log_softmax(-1)[context - 1 : -1]
    following = torch.tensor(ids[context:])
    chosen = logprobs.gather(1, following[:, None])
    return float(chosen.sum()), bool((logprobs.argmax(-1) == following).all())


@torch.inference_mode()
def continued(dense, ids, count):
    """With so many of the likeliest tokens behind them."""
    out = dense.generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0].tolist()


def scored(choice, context):
    """As lm-evaluation-harness reads an answer (`LocalCompletionsAPI.parse_logprobs`)."""
    logprobs = choice.logprobs.token_logprobs[context:-1]
    top = choice.logprobs.top_logprobs[context:-1]
    return sum(logprobs), all(value == max(each.values()) for value, each in zip(logprobs, top, strict=True))


def test_likelihoods_of_continuations(model, dense):
    generator = torch.Generator().manual_seed(3)
    contexts = [torch.randint(6, 260, (n,), generator=generator).tolist() for n in (1, 5, 30, 90)]
    prompts = [*(continued(dense, ids, 5) for ids in contexts), *([*ids, 40, 41, 42] for ids in contexts)]
    lengths = [len(ids) for ids in contexts] * 2
    body = {"model": "m", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    expected = [likelihood(dense, ids, context) for ids, context in zip(prompts, lengths, strict=True)]
    with Fleet(model, **SMALL_STEPS) as fleet:
        fleet.add_router()
        with serving(fleet) as ai:
            # The second time what was computed at first is in the prefix cache.
            answers = [ai.completions.create(**body, seed=1234) for _ in range(2)]
    assert [greedy for _, greedy in expected] == [True] * 4 + [False] * 4
    for answer in answers:
        ours = [scored(choice, context) for choice, context in zip(answer.choices, lengths, strict=True)]
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_further_choices_have_the_scores_of_the_first(model):
    prompt = "Name three rivers. " * 6
    body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 4, "logprobs": 1, "echo": True}
    with Fleet(model, **SMALL_STEPS) as fleet:
        fleet.add_router()
        with serving(fleet) as ai:
            (alone,) = ai.completions.create(**body).choices
            several = ai.completions.create(**body, n=3)
    context = several.usage.prompt_tokens
    for choice in several.choices:
        assert choice.text == alone.text
        assert choice.logprobs.token_logprobs[0] is None
        ours, theirs = choice.logprobs.token_logprobs[1:], alone.logprobs.token_logprobs[1:]
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert ours[: context - 1] == several.choices[0].logprobs.token_logprobs[1:context]


def parts(answer, stream):
    """(text, log probabilities, offsets) of each choice."""
    found = {}
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            text, logprobs, offsets = found.get(choice.index, ("", [], []))
            logprobs = logprobs + choice.logprobs.token_logprobs
            found[choice.index] = text + choice.text, logprobs, offsets + choice.logprobs.text_offset
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_router_that_is_lost_in_the_middle_of_the_prompts_leaves_no_gap(model, stream):
    prompts = ["Name three rivers. " * count for count in (12, 20)]
    options = {"model": "m", "prompt": prompts, "temperature": 0, "max_tokens": 12, "logprobs": 1, "echo": True}

    def asked(on_output):
        class Watched(SystemBackend):
            async def generate(self, request):
                async for output in super().generate(request):
                    yield output
                    on_output(output)

        with serving(fleet, Watched) as ai:
            answer = ai.completions.create(**options, extra_body={"ignore_eos": True}, stream=stream)
            return parts(answer, stream)

    seen = []

    def replace_router(output):
        seen.append(output)
        if len(seen) == 5:
            fleet.kill(first)
            assert generated(first) == 0
            fleet.add_router()

    with Fleet(model, **SMALL_STEPS) as fleet:
        fleet.add_router()
        calm = asked(lambda output: None)
    with Fleet(model, **SMALL_STEPS) as fleet:
        first = fleet.add_router()
        disturbed = asked(replace_router)
        assert first not in fleet.routers
    for index, (text, logprobs, offsets) in calm.items():
        assert text.startswith(prompts[index])
        assert (disturbed[index][0], disturbed[index][2]) == (text, offsets)
        assert disturbed[index][1][0] is logprobs[0] is None
        assert disturbed[index][1][1:] == pytest.approx(logprobs[1:], abs=1e-3)
