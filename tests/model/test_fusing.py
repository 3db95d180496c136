"""Norms, rotary positions and gates of transformers' families: the same numbers at less cost, or left alone."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3TopkRouter,
    apply_rotary_pos_emb_interleave,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as partial_rotary
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralTopKRouter
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb as halves

from moeray.model import kernels
from moeray.model.fusing import _Rotary, fuse
from moeray.model.kernels import RmsNorm

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the CPU kernels are not compiled")
DTYPES = [torch.float32, torch.bfloat16]


class CenteredRMSNorm(nn.Module):
    """By its name an RMS norm, which it is not."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def norm_of(kind, size, dtype):
    norm = kind(size).to(dtype).requires_grad_(False)
    norm.weight += torch.randn(size).to(dtype) / 3
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 64, 200, 1024])
@pytest.mark.parametrize("kind", [MixtralRMSNorm, GptOssRMSNorm, Gemma2RMSNorm])
def test_norms_of_each_form(kind, size, dtype):
    torch.manual_seed(size)
    norm = norm_of(kind, size, dtype)
    xs = [torch.randn(*shape, size).to(dtype) * 5 for shape in [(1, 1), (1, 37), (2, 3, 4)]]
    wide = torch.randn(1, 5, 3, 2 * size).to(dtype)[..., :size]  # as a head's part of a joint product lies
    wanted = [norm(x) for x in [*xs, wide]]
    fuse(norm, dtype)
    assert isinstance(norm.forward, RmsNorm)
    for x, theirs in zip([*xs, wide], wanted, strict=True):
        ours = norm(x)
        assert ours.shape == theirs.shape
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
        assert dtype is torch.float32 or (ours == theirs).float().mean() > 0.98


def test_rows_do_not_depend_on_each_other_or_on_the_number_of_threads():
    norm, x = RmsNorm(torch.rand(512), 1e-5, True), torch.randn(2048, 512)
    together = norm(x)
    assert torch.equal(torch.cat([norm(row[None]) for row in x]), together)


def test_no_rows():
    assert RmsNorm(torch.ones(8), 1e-5, True)(torch.empty(0, 8)).shape == (0, 8)
    assert kernels.rotate(torch.empty(1, 2, 0, 8), torch.empty(1, 0, 8), torch.empty(1, 0, 8)).shape == (1, 2, 0, 8)


def config_of(family):
    return AutoConfig.for_model(
        family, hidden_size=48, num_experts=16, num_local_experts=16, n_routed_experts=16, num_experts_per_tok=4,
        n_group=4, topk_group=2, moe_num_experts=16, moe_k=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family", "wide"),
    [
        (DeepseekV3TopkRouter, "deepseek_v3", True),
        (Glm4MoeTopkRouter, "glm4_moe", True),
        (MixtralTopKRouter, "mixtral", False),
    ],
)
def test_gates_that_compute_in_fp32_keep_their_weights_so(kind, family, wide):
    torch.manual_seed(0)
    gate = kind(config_of(family)).requires_grad_(False)
    gate.weight.copy_(torch.randn_like(gate.weight))
    gate.weight.data = gate.weight.data.bfloat16()
    x = torch.randn(32, 48).bfloat16()
    theirs = tree_leaves(gate(x))
    fuse(gate, torch.bfloat16)
    assert gate.weight.dtype is (torch.float32 if wide else torch.bfloat16)
    assert all(map(torch.equal, tree_leaves(gate(x)), theirs))


def test_a_gate_multiplies_by_the_kernels_and_stays_a_gate():
    torch.manual_seed(0)
    gate = MixtralTopKRouter(config_of("mixtral")).requires_grad_(False).bfloat16()
    gate.weight.copy_(torch.randn_like(gate.weight))
    plain, x = gate.weight.detach().clone(), torch.randn(32, 48).bfloat16()
    fuse(gate, torch.bfloat16)
    exact = F.linear(x.double(), plain.double())
    assert torch.equal(F.linear(x, gate.weight), kernels.NativeLinear(plain)(x))
    torch.testing.assert_close(F.linear(x, gate.weight).double(), exact, rtol=8e-3, atol=1e-2)
    assert type(gate.weight + 1) is torch.Tensor  # all else is torch's own
    assert torch.equal(F.linear(x.float(), gate.weight.float()), F.linear(x.float(), plain.float()))
    assert torch.equal(gate.state_dict()["weight"], plain)


class GatedRMSNorm(CenteredRMSNorm):
    """It wants more than a norm is given."""

    def forward(self, x, gate):
        return super().forward(x) * gate


class HashRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 32, dtype=torch.bfloat16))

    def forward(self, x, ids):
        return x.float() @ self.weight.float().T + ids


@pytest.mark.parametrize("kind", [CenteredRMSNorm, GatedRMSNorm])
def test_what_only_has_the_name_is_left_alone(kind):
    norm = kind(32)
    fuse(norm, torch.float32)
    assert not isinstance(norm.forward, RmsNorm)


def test_a_gate_that_wants_more_than_rows_is_left_alone():
    gate = HashRouter()
    fuse(gate, torch.bfloat16)
    assert gate.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "tokens", "size"), [(1, 1, 2), (16, 1, 64), (3, 7, 10), (4, 900, 128)])
def test_rotary_positions_have_torchs_bits(heads, tokens, size, dtype):
    torch.manual_seed(tokens)
    joint = torch.randn(1, tokens, 2 * heads + 1, size).to(dtype)
    q, k = (joint[:, :, heads:] * 3).transpose(1, 2), joint[:, :, :heads].transpose(1, 2)
    angles = torch.rand(1, tokens, size) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for ours, theirs in zip(_Rotary(halves)(q, k, cos, sin), halves(q, k, cos, sin), strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


@pytest.fixture
def fused(monkeypatch):
    """What a file's function is after a model from that file was fused."""

    def fuse_file(function):
        file = types.ModuleType("a_family")
        file.apply_rotary_pos_emb = function
        monkeypatch.setitem(sys.modules, file.__name__, file)
        fuse(type("Model", (nn.Module,), {"__module__": file.__name__})(), torch.float32)
        return file.apply_rotary_pos_emb

    return fuse_file


@pytest.mark.parametrize("function", [halves, partial_rotary])
def test_the_usual_function_is_replaced_once(fused, function):
    once = fused(function)
    assert isinstance(once, _Rotary)
    assert fused(once) is once


@pytest.mark.parametrize(
    "function", [apply_rotary_pos_emb_interleave, lambda q, k: (q, k), lambda q, k, cos, sin: q * cos[:, None]]
)
def test_other_functions_of_that_name_are_left_alone(fused, function):
    assert fused(function) is function


def test_what_the_kernel_does_not_know_goes_to_the_original():
    seen = []

    def original(q, k, cos, sin, unsqueeze_dim=1):
        seen.append(q.shape)
        return halves(q, k, cos, sin, unsqueeze_dim)

    rotary = _Rotary(original)
    q, cos = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 8)
    rotary(q, q, cos, cos)  # two sequences
    rotary(q[:1].double(), q[:1].double(), cos[:1].double(), cos[:1].double())
    rotary(q[:1].transpose(1, 2), q[:1].transpose(1, 2), cos[:1], cos[:1], unsqueeze_dim=2)
    rotary(q[:1], q[:1], cos[:1, :1], cos[:1, :1])  # one position for all
    rotary(q[:1], q[:1], cos[:1].expand(1, 3, 8)[:, :, ::1], cos[:1].mT.contiguous().mT)
    with torch.inference_mode(False), torch.enable_grad():
        rotary(
            torch.ones(1, 4, 3, 8, requires_grad=True), torch.ones(1, 4, 3, 8), torch.ones(1, 3, 8), torch.ones(1, 3, 8)
        )
    assert len(seen) == 6
    rotary(q[:1], q[:1], cos[:1], cos[:1])
    assert len(seen) == 6
