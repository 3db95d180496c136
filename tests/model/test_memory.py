"""What an actor's process holds: its slice of the checkpoint and little more, at a real model's shape."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

LIMIT, BASE = 1.2, 500_000_000

_MEASURE = """
import json, resource, sys
import torch
from moeray.model.loading import open_model
from moeray.model.experts import ExpertBank
from moeray.model.trunk import Trunk
from moeray.types import ExpertId
import transformers.models.granitemoe.modeling_granitemoe
what, path = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
files = open_model(path, None, node="here")
if what == "router":
    trunk = Trunk.load(files.checkpoint, files.family, files.weights, torch.bfloat16, torch.device("cpu"))
    slice_bytes = files.weights.trunk_bytes()
else:
    bank = ExpertBank(files.family, files.weights, torch.bfloat16, torch.device("cpu"))
    mine = [ExpertId(la, e) for la, n in files.expert_counts().items() for e in range(n // 2)]
    bank.load(mine)
    for la in files.expert_counts():
        experts = list(range(files.expert_counts()[la] // 2))
        bank.forward(la, torch.randn(len(experts), 1024).bfloat16(), experts, [1] * len(experts))
    slice_bytes = bank.nbytes
print(json.dumps({"rise": peak() - before, "peak": peak(), "slice": slice_bytes}))
"""


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """granite-1b-a400m's shape with a third of its layers: about 0.9 GB in bfloat16."""
    path = tmp_path_factory.mktemp("granite")
    config = GraniteMoeConfig(
        vocab_size=49155, hidden_size=1024, intermediate_size=512, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, num_local_experts=32, num_experts_per_tok=8, tie_word_embeddings=True,
        max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = GraniteMoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("what", ["router", "experts"])
def test_peak_memory_is_that_of_the_slice(granite, what):
    command = [sys.executable, "-c", _MEASURE, what, str(granite)]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    on_disk = sum(path.stat().st_size for path in granite.glob("*.safetensors"))
    assert 0 < result["slice"] < 0.75 * on_disk
    assert result["rise"] <= LIMIT * result["slice"] + BASE
