"""Prompts' log probabilities equal transformers' log-softmax in fp32, however a prompt is cut."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeray.model import scoring
from moeray.types import SamplingParams
from tests.checkpoints import FAMILIES, FURTHER_FAMILIES, VOCAB, make_tiny
from tests.families.test_equality import LENGTHS, prompts_of, reference
from tests.systems import GREEDY24, LocalSystem, tiny_config, tokens_of

TOP = 3


@torch.inference_mode()
def reference_scores(model, prompt):
    """(log probability of each token from the second on, the values of the likeliest ones there)."""
    logprobs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0], logprobs.topk(TOP).values


def check(model, prompt, outputs, top=TOP):
    scores = [entry for output in outputs for entry in output.prompt_logprobs]
    chosen, best = reference_scores(model, prompt)
    assert len(scores) == len(prompt) - 1
    torch.testing.assert_close(torch.tensor([entry.logprob for entry in scores]), chosen, atol=2e-4, rtol=1e-4)
    values = torch.tensor([[value for _, value in entry.top] for entry in scores]).reshape(len(scores), top)
    torch.testing.assert_close(values, best[:, :top], atol=2e-4, rtol=1e-4)


QUICK = {"granitemoe", "deepseek_v3", "gpt_oss", "phimoe", "cohere2_moe", "gemma4_text"}
"""What differs behind the decoder: scaled and capped logits, a head with a bias, one that is the embedding."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in (*FAMILIES, *FURTHER_FAMILIES)],
)
def test_they_equal_transformers(family, tmp_path, monkeypatch):
    """In chunks, a few rows a piece, beside sequences that decode and prompts that nobody wants scored."""
    monkeypatch.setattr(scoring, "PIECE_BYTES", 5 * 4 * VOCAB)
    path = make_tiny(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = prompts_of(model.config.vocab_size)
    wanted = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, prompt_logprobs=TOP)
    config = tiny_config(path, engine__prefill_chunk=16, engine__max_batch_tokens=48, engine__max_running=48)
    with LocalSystem(config) as system:
        plain, scored = [GREEDY24] * len(prompts), [wanted] * len(prompts)
        outputs = system.generate([*prompts, *prompts], [*plain, *scored])
    for prompt, without, with_scores in zip(prompts, outputs[: len(prompts)], outputs[len(prompts) :], strict=True):
        assert tokens_of(without) == tokens_of(with_scores) == reference(model, prompt)
        assert not any(output.prompt_logprobs for output in without)
        check(model, prompt, with_scores)


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    path = make_tiny("granitemoe", tmp_path_factory.mktemp("granite") / "m")
    return path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"engine__max_batch_tokens": 1, "engine__max_running": 1},  # a row a step, as decodes have
        {"engine__max_batch_tokens": 7, "engine__max_running": 4},
        {"engine__block_size": 1},
        {"engine__overlap": "on"},
        {"engine__eager": True},
        {"engine__prefix_cache": False},
        {"engine__kv_blocks": 13, "engine__block_size": 8, "engine__max_batch_tokens": 16, "engine__max_running": 8},
    ],
    ids=lambda settings: ", ".join(f"{key[8:]}={value}" for key, value in settings.items()),
)
def test_they_do_not_depend_on_how_steps_are_made(granite, settings):
    """Twice, since the second time the prefix cache holds all of it, and with other prompts' choices in between."""
    path, model = granite
    prompts = prompts_of(model.config.vocab_size)
    wanted = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, prompt_logprobs=TOP)
    with LocalSystem(tiny_config(path, **settings)) as system:
        for _ in range(2):
            each = system.generate([*prompts, *prompts], [wanted, GREEDY24] * len(prompts))
            for prompt, outputs in list(zip([*prompts, *prompts], each, strict=True))[::2]:
                check(model, prompt, outputs)
                assert tokens_of(outputs) == reference(model, prompt, 8)


def test_a_scored_prompt_reads_nothing_from_the_prefix_cache_and_fills_it(granite):
    path, model = granite
    prompt = prompts_of(model.config.vocab_size)[LENGTHS.index(64)]
    wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    with LocalSystem(tiny_config(path)) as system:
        for sampling, cached in ((wanted, 0), (wanted, 0), (GREEDY24, 48)):
            (outputs,) = system.generate([prompt], sampling)
            assert outputs[-1].cached_tokens == cached
            if sampling is wanted:
                check(model, prompt, outputs, top=0)
