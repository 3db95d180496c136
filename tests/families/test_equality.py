"""Greedy fp32 tokens equal transformers', for every family, with ragged prompts packed into the same steps."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeray.model import kernels
from tests.checkpoints import FAMILIES, FURTHER_FAMILIES, make_tiny
from tests.systems import GREEDY24, LocalSystem, tiny_config, tokens_of

LENGTHS = (3, 41, 17, 64, 1)


def prompts_of(vocab: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.inference_mode()
def reference(model, prompt: list[int], count: int = 24) -> list[int]:
    """transformers' own greedy generation, one prompt at a time."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES])
def test_tokens_equal_transformers(family, tmp_path):
    path = make_tiny(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = prompts_of(model.config.vocab_size)
    # Small chunks: every long prompt is computed in pieces, beside the others' decodes.
    config = tiny_config(path, engine__prefill_chunk=16, engine__max_batch_tokens=48, engine__max_running=48)
    with LocalSystem(config) as system:
        ours = [tokens_of(outputs) for outputs in system.generate(prompts, GREEDY24)]
    for prompt, tokens in zip(prompts, ours, strict=True):
        assert tokens == reference(model, prompt), f"{family}, prompt of {len(prompt)} tokens"


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "phimoe", "deepseek_v2", "deepseek_v3"])
def test_every_kernel_of_the_trunk_gives_these_tokens(family, kernel, tmp_path):
    """Plain, with sinks and windows, with a mask's window alone, with latents."""
    if kernel == "native" and not kernels.available():
        pytest.skip("the kernels were not compiled")
    path = make_tiny(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = prompts_of(model.config.vocab_size)
    config = tiny_config(path, engine__prefill_chunk=16, engine__attention=kernel, engine__linear=kernel)
    with LocalSystem(config) as system:
        ours = [tokens_of(outputs) for outputs in system.generate(prompts, GREEDY24)]
    assert ours == [reference(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_two_experts_changes_the_tokens(family, tmp_path):
    """The equality above would notice a dispatch to the wrong expert."""
    path = make_tiny(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = prompts_of(model.config.vocab_size)
    expected = [reference(model, prompt) for prompt in prompts]
    for module in model.modules():
        if hasattr(module, "has_gate") and hasattr(module, "num_experts"):
            for parameter in module.parameters(recurse=False):
                parameter.data[[0, 1]] = parameter.data[[1, 0]]
    swapped = [reference(model, prompt) for prompt in prompts]
    assert swapped != expected
