"""Experts on the Triton kernel against the fp32 torch path: on a GPU, else in triton's interpreter."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from moeray.errors import CheckpointError, ConfigError
from moeray.model.expert_tensor import ExpertTensor
from moeray.model.experts import ExpertBank
from moeray.model.family import ExpertsLayer
from moeray.model.formats import Plain
from moeray.model.int8 import Int8Cache
from moeray.model.kernels.cuda import TritonLayer
from moeray.model.loading import open_model
from moeray.types import ExpertId
from tests.checkpoints import make_tiny, spoil
from tests.model.kernels.on_triton import DEVICE, INTERPRETED, needs_triton
from tests.quantize import make_fp8, make_mxfp4

pytestmark = needs_triton
COUNTS = [3, 0, 1, 17, 5]  # rows of experts: none, one, more than the smallest tile has
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 0.02 if INTERPRETED else 6e-3}  # it cuts off


def bank_of(path, dtype, kernel="triton", device=DEVICE, cache=None):
    files = open_model(str(path), None, node="here")
    int8 = Int8Cache.of(files.checkpoint, cache) if cache else None
    bank = ExpertBank(files.family, files.weights, dtype, device, kernel, int8)
    layer = max(files.expert_counts())
    bank.load(ExpertId(layer, expert) for expert in range(len(COUNTS)))
    return bank, layer, files.checkpoint.config.hidden_size


def rows_for(hidden, count, dtype=torch.bfloat16):
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)


def forward(bank, layer, x, experts, counts):
    return bank.forward(layer, x.to(DEVICE), experts, counts).cpu()


def assert_near(path, dense, dtype=torch.bfloat16, counts=COUNTS, more=0.0, cache=None):
    """The outputs are those of the dense checkpoint in fp32, but for rounding to `dtype` (and `more`)."""
    bank, layer, hidden = bank_of(path, dtype, cache=cache)
    assert bank._kernels.of(layer) is not None
    exact, _, _ = bank_of(dense, torch.float32, "torch", torch.device("cpu"))
    x, experts = rows_for(hidden, sum(counts), dtype), list(range(len(counts)))
    found = forward(bank, layer, x, experts, counts)
    assert found.dtype is dtype
    wanted = exact.forward(layer, x.float(), experts, counts)
    assert float((found.float() - wanted).norm() / wanted.norm()) < ROUNDING[dtype] + more


@pytest.mark.parametrize(("stored", "dtype"), [
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
])  # fmt: skip
def test_plain_weights_of_any_dtype_for_rows_of_any(stored, dtype, tmp_path):
    path = make_tiny("mixtral", tmp_path / "model", dtype=stored)
    assert_near(path, path, dtype)


@pytest.mark.parametrize(("hidden", "width"), [(72, 40), (104, 33), (64, 7)])
def test_sizes_that_fill_no_tile(hidden, width, tmp_path):
    path = make_tiny(
        "mixtral", tmp_path / "model", dtype=torch.bfloat16, hidden_size=hidden, intermediate_size=width, head_dim=8
    )
    assert_near(path, path)


@pytest.mark.parametrize("rows", [1, 16, 65, 150])
def test_rows_of_one_expert(rows, tmp_path):
    path = make_tiny("olmoe", tmp_path / "model", dtype=torch.bfloat16)
    assert_near(path, path, counts=[0, rows])


def test_no_rows_at_all(tmp_path):
    bank, layer, hidden = bank_of(make_tiny("olmoe", tmp_path / "model", dtype=torch.bfloat16), torch.bfloat16)
    assert forward(bank, layer, rows_for(hidden, 0), [1, 2], [0, 0]).shape == (0, hidden)


@pytest.mark.parametrize(("hidden", "width", "block", "fused", "dtype"), [
    (144, 192, (128, 128), True, torch.bfloat16),
    (72, 40, (32, 16), True, torch.float32),
    (64, 96, (128, 128), False, torch.float16),
])  # fmt: skip
def test_fp8_blocks_ragged_too(hidden, width, block, fused, dtype, tmp_path):
    plain = make_tiny(
        "qwen3_moe", tmp_path / "plain", hidden_size=hidden, moe_intermediate_size=width, num_hidden_layers=1,
        mlp_only_layers=[],
    )  # fmt: skip
    assert_near(*make_fp8(plain, tmp_path, block=block, fused=fused), dtype)


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float32), (96, torch.bfloat16)])
def test_mxfp4_with_biases_in_turns_and_a_clamped_gate(width, dtype, tmp_path):
    assert_near(*make_mxfp4(make_tiny("gpt_oss", tmp_path / "plain", intermediate_size=width), tmp_path), dtype)


def test_transposed_weights(tmp_path):
    path = make_tiny("gpt_oss", tmp_path / "model", dtype=torch.bfloat16)
    assert_near(path, path)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_int8(family, tmp_path):
    path = make_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    assert_near(path, path, more=0.02, cache=tmp_path / "cache")


@pytest.mark.parametrize("family", ["phimoe", "glm4_moe"])
def test_other_families(family, tmp_path):
    path = make_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    assert_near(path, path)


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_activations(act, tmp_path):
    path = make_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16, hidden_act=act)
    assert_near(path, path)


class Ungated(nn.Module):
    has_gate = has_bias = is_transposed = False
    is_concatenated = True
    act_fn = nn.SiLU()


def test_experts_without_a_gate():
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) / 8 for shape in ((40, 72), (72, 40)))
    moe = ExpertsLayer(0, "experts", Ungated(), 1, {"up_proj": (1, 40, 72), "down_proj": (1, 72, 40)})
    layer = TritonLayer(moe, torch.float32, {})
    expert = layer.expert(*(ExpertTensor((Plain(weight.to(DEVICE)),)) for weight in (up, down)), {})
    x = torch.randn(5, 72, generator=generator)
    found = layer.forward([expert], x.to(DEVICE), [5]).cpu()
    torch.testing.assert_close(found, nn.functional.silu(x @ up.t()) @ down.t(), rtol=1e-4, atol=1e-5)


def stored(form, tmp_path):
    if form == "mxfp4":
        return make_mxfp4(make_tiny("gpt_oss", tmp_path / "plain"), tmp_path)[0]
    if form == "fp8":
        return make_fp8(make_tiny("qwen3_moe", tmp_path / "plain"), tmp_path)[0]
    return make_tiny("mixtral", tmp_path / "plain", dtype=torch.bfloat16)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="numpy's products add up otherwise in other shapes; needs a GPU")
@pytest.mark.parametrize("form", ["bf16", "fp8", "mxfp4", "int8"])
def test_a_row_gives_the_same_bits_alone_and_among_others(form, tmp_path):
    cache = tmp_path / "cache" if form == "int8" else None
    bank, layer, hidden = bank_of(stored(form, tmp_path), torch.bfloat16, cache=cache)
    counts = [1, 16, 70, 130, 2]
    x = rows_for(hidden, sum(counts))
    together = forward(bank, layer, x, list(range(5)), counts)
    first = 0
    for expert, count in enumerate(counts):
        for r in range(first, first + count, 5):
            assert torch.equal(forward(bank, layer, x[r : r + 1], [expert], [1])[0], together[r])
        first += count


def test_weights_that_are_no_numbers_are_refused_as_they_are_copied(tmp_path):
    tensor = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    path = spoil(make_tiny("mixtral", tmp_path, dtype=torch.bfloat16), tensor)
    with pytest.raises(CheckpointError, match=rf"tensor {tensor} in file model.safetensors is not finite \(expert 3\)"):
        bank_of(path, torch.bfloat16)


def test_experts_that_come_and_go(tmp_path):
    bank, layer, hidden = bank_of(stored("bf16", tmp_path), torch.bfloat16)
    x = rows_for(hidden, 2)
    before = forward(bank, layer, x, [0, 3], [1, 1])
    held = bank.hold(layer, [0, 3])
    bank.forget([ExpertId(layer, 0)])
    assert torch.equal(held(x.to(DEVICE), [1, 1]).cpu(), before)
    bank.load([ExpertId(layer, 0), ExpertId(layer, 7)])
    assert torch.equal(forward(bank, layer, x, [0, 3], [1, 1]), before)


def test_what_it_cannot_compute_runs_on_torch_and_says_so(tmp_path, caplog):
    path = make_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16, hidden_act="gelu")
    with pytest.raises(ConfigError, match=r"experts\.kernel: the triton kernels.*activation.*use auto or torch"):
        bank_of(path, torch.bfloat16)
    if DEVICE.type == "cuda":
        with caplog.at_level(logging.WARNING):
            bank, layer, _ = bank_of(path, torch.bfloat16, "auto")
        assert bank._kernels.of(layer) is None
        assert sum("activation" in record.message for record in caplog.records) == 1
