"""Experts on the native kernels against the fp32 torch path: all families, stored forms, sizes and row counts."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from moeray.errors import ConfigError
from moeray.model.experts import ExpertBank
from moeray.model.int8 import Int8Cache
from moeray.model.kernels import available
from moeray.model.kernels.layout import Format
from moeray.model.kernels.native import Instructions, best_instructions
from moeray.model.loading import open_model
from moeray.types import ExpertId
from tests.checkpoints import FAMILIES, FURTHER_FAMILIES, make_tiny
from tests.quantize import make_fp8, make_mxfp4

pytestmark = pytest.mark.skipif(not available(), reason="the kernels were not compiled on this machine")
CPU = torch.device("cpu")
COUNTS = [1, 2, 3, 6, 7, 13, 40, 130]
TRANSPOSED = {"gpt_oss", "aria_text"}


def bank_of(path, dtype, kernel, cache=None):
    files = open_model(str(path), None, node="here")
    bank = ExpertBank(
        files.family, files.weights, dtype, CPU, kernel, Int8Cache.of(files.checkpoint, cache) if cache else None
    )
    layer = max(files.expert_counts())
    bank.load(ExpertId(layer, expert) for expert in range(files.expert_counts()[layer]))
    return bank, layer, files.checkpoint.config.hidden_size


def rows_for(hidden, count, seed=0):
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found, exact):
    return float((found.float() - exact).norm() / exact.norm())


def assert_near(path, dense, counts=COUNTS, rounding=3e-3):
    """The native bank's outputs are those of the dense checkpoint in fp32 but for rounding at the end."""
    native, layer, hidden = bank_of(path, torch.bfloat16, "native")
    exact, _, _ = bank_of(dense, torch.float32, "torch")
    x, experts = rows_for(hidden, sum(counts)), list(range(len(counts)))
    found = native.forward(layer, x, experts, counts)
    assert found.dtype is torch.bfloat16
    assert error(found, exact.forward(layer, x.float(), experts, counts)) < rounding


@pytest.mark.parametrize("family", [f for f in [*FAMILIES, *FURTHER_FAMILIES] if f not in TRANSPOSED])
def test_every_family(family, tmp_path):
    path = make_tiny(family, tmp_path / family, dtype=torch.bfloat16)
    assert_near(path, path)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(96, 64), (104, 72)])
def test_a_row_has_the_same_bits_alone_and_beside_others(int8, hidden, width, tmp_path):
    """However its products with the weights are ordered, which goes by how many rows there are."""
    path = make_tiny(
        "mixtral", tmp_path / "model", dtype=torch.bfloat16, hidden_size=hidden, intermediate_size=width, head_dim=16
    )
    bank, layer, _ = bank_of(path, torch.bfloat16, "native", cache=tmp_path / "cache" if int8 else None)
    x = rows_for(hidden, 12)
    together = bank.forward(layer, x, [1], [12])
    for count in range(1, 9):
        assert torch.equal(bank.forward(layer, x[:count], [1], [count]), together[:count]), count


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_of_other_dtypes(dtype, tmp_path):
    path = make_tiny("mixtral", tmp_path / "model", dtype=dtype)
    assert_near(path, path)


@pytest.mark.parametrize(("hidden", "width"), [(72, 40), (104, 33), (576, 24), (64, 7)])
def test_sizes_that_fill_no_vector(hidden, width, tmp_path):
    path = make_tiny(
        "mixtral", tmp_path / "model", dtype=torch.bfloat16, hidden_size=hidden, intermediate_size=width, head_dim=16
    )
    assert_near(path, path)


@pytest.mark.parametrize("rows", [1, 5, 127, 128, 129, 300])
def test_rows_of_one_expert(rows, tmp_path):
    path = make_tiny("olmoe", tmp_path / "model", dtype=torch.bfloat16)
    assert_near(path, path, [rows])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("hidden", "width", "block"), [(64, 96, (128, 128)), (576, 192, (128, 128)), (72, 40, (32, 16))]
)
def test_fp8_blocks_ragged_too(hidden, width, block, fused, tmp_path):
    plain = make_tiny(
        "qwen3_moe", tmp_path / "plain", hidden_size=hidden, moe_intermediate_size=width, num_hidden_layers=1,
        mlp_only_layers=[],
    )  # fmt: skip
    assert_near(*make_fp8(plain, tmp_path, block=block, fused=fused))


@pytest.mark.parametrize("width", [64, 96, 160])
def test_mxfp4_with_biases_in_turns_and_a_clamped_gate(width, tmp_path):
    assert_near(*make_mxfp4(make_tiny("gpt_oss", tmp_path / "plain", intermediate_size=width), tmp_path))


def stored(form, tmp_path):
    if form == "mxfp4":
        return make_mxfp4(make_tiny("gpt_oss", tmp_path / "plain"), tmp_path)[0]
    if form == "fp8":
        return make_fp8(make_tiny("qwen3_moe", tmp_path / "plain"), tmp_path)[0]
    return make_tiny("mixtral", tmp_path / "plain", dtype=torch.bfloat16)


@pytest.mark.parametrize("form", ["bf16", "fp8", "mxfp4", "int8"])
def test_a_row_gives_the_same_bits_alone_and_among_others(form, tmp_path):
    cache = tmp_path / "cache" if form == "int8" else None
    bank, layer, hidden = bank_of(stored(form, tmp_path), torch.bfloat16, "native", cache=cache)
    x = rows_for(hidden, sum(COUNTS))
    together = bank.forward(layer, x, list(range(len(COUNTS))), COUNTS)
    first = 0
    for expert, count in enumerate(COUNTS):
        for r in range(first, first + count, 5):
            assert torch.equal(bank.forward(layer, x[r : r + 1], [expert], [1])[0], together[r])
        first += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["bf16", "fp8", "mxfp4", "int8"])
def test_every_instruction_set(form, dtype, tmp_path):
    cache = tmp_path / "cache" if form == "int8" else None
    bank, layer, hidden = bank_of(stored(form, tmp_path), torch.float32, "native", cache=cache)
    x, native = rows_for(hidden, 60), bank._kernels.of(layer)
    assert form not in ("fp8", "mxfp4") or native.form.up.format == Format[form.upper()]
    experts = [bank.hold(layer, [e]).experts[e].kernel for e in range(3)]
    sets = [i for i in Instructions if i <= best_instructions()]
    exact = native.forward(experts, x.float(), [2, 28, 30], sets[0])
    found = {i: native.forward(experts, x.to(dtype), [2, 28, 30], i) for i in sets}
    assert all(error(found[i], exact) < (1e-5 if dtype is torch.float32 else 4e-3) for i in sets)
    if Instructions.AVX512 in sets:
        assert torch.equal(found[Instructions.AVX512], found[Instructions.AVX2])
    if Instructions.AVX512_BF16 in sets and dtype is torch.float32:
        assert torch.equal(found[Instructions.AVX512_BF16], found[Instructions.AVX512])


@pytest.mark.parametrize(("hidden", "width"), [(72, 40), (104, 33), (576, 24), (200, 7), (64, 130)])
def test_int8_of_sizes_that_fill_no_vector(hidden, width, tmp_path):
    path = make_tiny(
        "mixtral", tmp_path / "model", dtype=torch.bfloat16, hidden_size=hidden, intermediate_size=width, head_dim=8
    )
    bank, layer, _ = bank_of(path, torch.bfloat16, "native", cache=tmp_path / "cache")
    exact, _, _ = bank_of(path, torch.float32, "torch", cache=tmp_path / "cache")
    x, experts = rows_for(hidden, sum(COUNTS)), list(range(len(COUNTS)))
    together = bank.forward(layer, x, experts, COUNTS)
    assert error(together, exact.forward(layer, x.float(), experts, COUNTS)) < 4e-3
    assert torch.equal(bank.forward(layer, x[-5:], [len(COUNTS) - 1], [5]), together[-5:])


def test_int8_is_made_once_kept_and_near(tmp_path):
    path, cache = make_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16), tmp_path / "cache"
    exact, layer, hidden = bank_of(path, torch.float32, "torch")
    x = rows_for(hidden, sum(COUNTS))
    wanted = exact.forward(layer, x.float(), list(range(8)), COUNTS)
    first, _, _ = bank_of(path, torch.bfloat16, "native", cache=cache)
    made = {file: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")}
    assert len(made) == 2 * 8
    again, _, _ = bank_of(path, torch.bfloat16, "torch", cache=cache)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")} == made
    assert first.nbytes == again.nbytes < 0.55 * bank_of(path, torch.bfloat16, "torch")[0].nbytes
    for bank in (first, again):
        assert 1e-3 < error(bank.forward(layer, x, list(range(8)), COUNTS), wanted) < 0.02


def test_int8_of_weights_written_anew_is_made_anew(tmp_path):
    path, cache = make_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16), tmp_path / "cache"
    bank_of(path, torch.bfloat16, "auto", cache=cache)
    file = path / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    bank_of(path, torch.bfloat16, "auto", cache=cache)
    assert len(list(cache.rglob("*.safetensors"))) == 2 * 2 * 8


def test_int8_leaves_quantised_weights_as_they_are(tmp_path):
    path, cache = stored("fp8", tmp_path), tmp_path / "cache"
    plain, layer, hidden = bank_of(path, torch.bfloat16, "native")
    int8, _, _ = bank_of(path, torch.bfloat16, "native", cache=cache)
    x = rows_for(hidden, 4)
    assert torch.equal(int8.forward(layer, x, [0], [4]), plain.forward(layer, x, [0], [4]))
    assert not cache.exists()


def test_float32_stays_on_torch_unless_told(tmp_path):
    path = make_tiny("mixtral", tmp_path / "model")
    assert bank_of(path, torch.float32, "auto")[0]._kernels.of(2) is None
    assert bank_of(path, torch.float32, "native")[0]._kernels.of(2) is not None


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_activations_are_known_by_their_values(act, tmp_path):
    path = make_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16, hidden_act=act)
    assert_near(path, path)


@pytest.mark.parametrize(("family", "settings", "reason"), [
    ("mixtral", {"hidden_act": "gelu"}, "activation"),
    ("mixtral", {"hidden_act": "relu"}, "activation"),
    ("gpt_oss", {}, "strides"),
])  # fmt: skip
def test_what_they_cannot_compute_runs_on_torch_and_says_so(family, settings, reason, tmp_path, caplog):
    path = make_tiny(family, tmp_path / "model", dtype=torch.bfloat16, **settings)
    with caplog.at_level(logging.WARNING):
        auto, layer, hidden = bank_of(path, torch.bfloat16, "auto")
    assert sum(reason in record.message for record in caplog.records) == 1
    x = rows_for(hidden, sum(COUNTS))
    on_torch = bank_of(path, torch.bfloat16, "torch")[0]
    experts = list(range(len(COUNTS)))
    assert torch.equal(auto.forward(layer, x, experts, COUNTS), on_torch.forward(layer, x, experts, COUNTS))
    with pytest.raises(ConfigError, match=rf"experts\.kernel: .*{reason}.*use auto or torch"):
        bank_of(path, torch.bfloat16, "native")
