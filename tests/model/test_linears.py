"""The trunk's linear layers by another kernel are the same layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from moeray.errors import ConfigError
from moeray.model import kernels
from moeray.model.linears import choose_linear, packs_bf16, use_linear

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="the kernels were not compiled")
needs_packing = pytest.mark.skipif(not packs_bf16(), reason="oneDNN packs no bf16 weights on this CPU")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(72, 80)
        self.k_proj = nn.Linear(72, 40, bias=False)
        self.v_proj = nn.Linear(72, 40)
        self.o_proj = nn.Linear(80, 72)

    def forward(self, x):
        return self.o_proj(self.q_proj(x) + torch.cat((self.k_proj(x), self.v_proj(x)), -1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 72)
        self.attention = Attention()
        self.gate_proj, self.up_proj = nn.Linear(72, 24, bias=False), nn.Linear(72, 24, bias=False)
        self.down_proj = nn.Linear(24, 72, bias=False)
        self.lm_head = nn.Linear(72, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x)
        x = x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))
        return self.lm_head(x)


def pair(dtype):
    torch.manual_seed(0)
    first, second = Model(), Model()
    second.load_state_dict(first.state_dict())
    return first.to(dtype).eval(), second.to(dtype).eval()


@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param("native", torch.float32, marks=needs_kernels),
        pytest.param("native", torch.bfloat16, marks=needs_kernels),
        pytest.param("onednn", torch.bfloat16, marks=needs_packing),
        ("torch", torch.bfloat16),
    ],
)
@torch.inference_mode()
def test_outputs_stay(kernel, dtype, rows):
    reference, model = pair(dtype)
    use_linear(model, kernel)
    ids = torch.randint(0, 50, (1, rows), generator=torch.Generator().manual_seed(1))
    near = {} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for _ in range(2):  # nothing of a call is left for the next
        torch.testing.assert_close(model(ids).float(), reference(ids).float(), **near)
        ids = ids.flip(1)


@needs_kernels
@torch.inference_mode()
def test_joined_layers_keep_one_copy_of_their_weights():
    _, model = pair(torch.bfloat16)
    use_linear(model, "native")
    q, k = model.attention.q_proj.weight, model.attention.k_proj.weight
    assert q.data_ptr() + q.nbytes == k.data_ptr()


@needs_packing
@torch.inference_mode()
def test_packed_weights_replace_the_plain_ones():
    _, model = pair(torch.bfloat16)
    use_linear(model, "onednn")
    assert model.attention.o_proj.weight.numel() == 0
    assert model.embed.weight.numel() > 0  # tied to the packed head, and looked up


@pytest.mark.parametrize(
    ("asked", "dtype", "device"),
    [
        ("onednn", torch.float32, CPU),
        ("onednn", torch.bfloat16, torch.device("cuda")),
        ("native", torch.bfloat16, torch.device("cuda")),
    ],
)
def test_what_cannot_be_is_refused(asked, dtype, device):
    with pytest.raises(ConfigError, match=r"engine\.linear"):
        choose_linear(asked, dtype, device)


@pytest.mark.skipif(packs_bf16(), reason="oneDNN packs bf16 on this CPU")
def test_what_this_cpu_cannot_pack_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.linear.*AVX-512"):
        choose_linear("onednn", torch.bfloat16, CPU)


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, CPU), (torch.bfloat16, torch.device("cuda"))])
def test_auto_leaves_torch_where_it_is_best_or_exact(dtype, device):
    assert choose_linear("auto", dtype, device) == "torch"


def test_auto_in_bf16_on_the_cpu_is_no_plain_layer():
    assert choose_linear("auto", torch.bfloat16, CPU) != "torch" or not kernels.available()


@needs_kernels
def test_logits_keep_the_sums_that_they_are(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=200, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).bfloat16().eval()
    use_linear(model, "native")
    with torch.inference_mode():
        ids = torch.arange(9)[None]
        logits, hidden = model(ids).logits, model.model(ids).last_hidden_state
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, hidden.float() @ model.lm_head.weight.float().T, rtol=1e-4, atol=1e-5)
