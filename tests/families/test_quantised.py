"""Quantised checkpoints serve the tokens of their dense, dequantised twins."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_tiny
from tests.families.test_equality import prompts_of, reference
from tests.quantize import make_fp8, make_mxfp4
from tests.systems import GREEDY24, LocalSystem, tiny_config, tokens_of


def check(quantised, dense):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    prompts = prompts_of(model.config.vocab_size)
    with LocalSystem(tiny_config(quantised)) as system:
        ours = [tokens_of(outputs) for outputs in system.generate(prompts, GREEDY24)]
    assert ours == [reference(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("fused", [False, True])
def test_fp8_blocks_with_ragged_edges(fused, tmp_path):
    source = make_tiny("deepseek_v3", tmp_path / "source", hidden_size=192, moe_intermediate_size=576)
    check(*make_fp8(source, tmp_path / "fp8", block=(128, 128), fused=fused))


def test_mxfp4(tmp_path):
    source = make_tiny("gpt_oss", tmp_path / "source", hidden_size=192, intermediate_size=576)
    check(*make_mxfp4(source, tmp_path / "mxfp4"))
