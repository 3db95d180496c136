"""Expert weights that are no numbers are named where they are read, and where a request meets them."""

from __future__ import annotations

import math
import re

import pytest
import torch

from moeray.actors.messages import request_tree
from moeray.errors import CheckpointError
from moeray.model.loading import open_bank, open_model
from moeray.types import ExpertId, FinishReason, GenerationRequest, SamplingParams
from moeray.wire.frame import Frame, Op
from tests.actors.test_router import until_end
from tests.checkpoints import make_tiny, spoil
from tests.fleet import Fleet
from tests.quantize import make_fp8
from tests.systems import tiny_config

CPU = torch.device("cpu")
W3 = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"


@pytest.mark.parametrize(
    ("family", "tensor", "of_parameter"),
    [
        ("mixtral", W3.format(2), "gate_up_proj"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", "down_proj_bias"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_expert_s_tensor_is_found_in_what_lies_there(tmp_path, family, tensor, of_parameter, value):
    width = 64
    folder = spoil(
        make_tiny(family, tmp_path / "m"), tensor, index=2 * width + 5 if "gpt" in family else 5, value=value
    )
    files = open_model(str(folder), None, node="here")
    name = f"{files.family.layers[1].name}.{of_parameter}"
    assert files.weights.not_finite(name, 2) == f"tensor {tensor} in file model.safetensors is not finite"
    assert files.weights.not_finite(name, 1) is None
    assert [files.weights.expert(name, expert).looks_finite() for expert in (1, 2)] == [True, False]


def test_a_scale_is_named_by_itself(tmp_path):
    folder = make_fp8(make_tiny("deepseek_v3", tmp_path / "m", dtype=torch.bfloat16), tmp_path / "q", block=(32, 32))[0]
    tensor = "model.layers.1.mlp.experts.0.down_proj.weight_scale_inv"
    files = open_model(str(spoil(folder, tensor, index=0)), None, node="here")
    found = files.weights.not_finite(f"{files.family.layers[1].name}.down_proj", 0)
    assert found == f"tensor {tensor} in file model.safetensors is not finite"


def test_what_is_read_at_load_is_refused_then(tmp_path):
    folder = spoil(make_tiny("mixtral", tmp_path / "m", dtype=torch.bfloat16), W3.format(2))
    config = tiny_config(folder, dtype="bfloat16", cache_dir=str(tmp_path), experts__quantization="int8")
    bank = open_bank(open_model(config.model, None, node="here"), config, CPU)
    bank.load([ExpertId(1, 1)])
    named = rf"tensor {W3.format(2)} in file model.safetensors is not finite \(expert 2\); fetch"
    for _ in range(2):  # nothing of it was kept
        with pytest.raises(CheckpointError, match=named):
            bank.load([ExpertId(1, 2)])


def test_the_request_that_meets_them_is_told_which(tmp_path, caplog):
    folder = spoil(make_tiny("mixtral", tmp_path / "m"), *(W3.format(expert) for expert in range(8)))
    with Fleet(folder, engine__prefill_chunk=4, engine__max_batch_tokens=4, engine__max_running=4) as fleet:
        channel = fleet.connect(fleet.add_router())
        asked = GenerationRequest("a", tuple(range(5, 15)), SamplingParams(max_tokens=4))
        channel.send(Frame(Op.SUBMIT, 1, meta=request_tree(asked)))
        end = until_end(channel)[-1]
        assert end.finish_reason is FinishReason.ERROR
        told = re.match(
            r"the logits of request a are not finite: tensor (\S+) in file model.safetensors is not finite "
            r"\(expert (\d) of layer 1\); fetch the checkpoint again",
            end.error,
        )
        assert told[1] == W3.format(told[2])
        assert end.error in caplog.text
