"""What lies between an expert's two products, on every instruction set; one input and one output, all weights 1."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch.nn import functional as F

from moeray.model.kernels import available
from moeray.model.kernels.layout import Activation, Expert, Format, Layer, Matrix, Outputs
from moeray.model.kernels.native import Instructions, best_instructions, forward

pytestmark = pytest.mark.skipif(not available(), reason="the kernels were not compiled on this machine")
SETS = [i for i in Instructions if available() and i <= best_instructions()]
NO_LIMIT = 3.0e38

SILU = Activation(1, 0, NO_LIMIT, 0)
GPT_OSS = Activation(1.702, 0, 7, 1)
GELU_TANH = Activation(2 * math.sqrt(2 / math.pi), 0.044715, NO_LIMIT, 0)


def between(activation, gated, x_R, instructions):
    """x [R] bf16 -> [R]"""
    one = torch.ones(1, dtype=torch.bfloat16)
    matrix = Matrix(Format.BF16, 1, 2 if gated else 1, 0)  # a row is as far from the next as from itself: the same
    layer = Layer(matrix, Matrix(Format.BF16, 1, 1, 0), activation, int(gated))
    everything = Outputs(one.data_ptr(), None, None, 0, 1)
    expert = Expert(everything, everything, everything)
    return forward(layer, [ctypes.addressof(expert)], [len(x_R)], x_R[:, None], 1, instructions)[:, 0]


def gpt_oss(x):
    gate, up = x.clamp(max=7), x.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(
    ("activation", "gated", "exact"),
    [
        (SILU, True, lambda x: F.silu(x) * x),
        (SILU, False, F.silu),
        (GPT_OSS, True, gpt_oss),
        (GELU_TANH, True, lambda x: F.gelu(x, approximate="tanh") * x),
        (GELU_TANH, False, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_it_is_the_activation_to_bf16s_rounding(activation, gated, exact, instructions):
    x = torch.cat(
        [torch.linspace(-12, 12, 3001), torch.tensor([0.0, -0.0, 1e-20, -1e-20, 80, -80, 300, 1e15])]
    ).bfloat16()
    expected = exact(x.double())
    found = between(activation, gated, x, instructions).double()
    assert (found - expected).abs().sub(2**-8 * expected.abs()).max() < 1e-6  # e^-80 is more than nothing


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [SILU, GPT_OSS, GELU_TANH])
def test_what_is_not_a_number_stays_and_what_is_infinite_is_as_everywhere(activation, gated, instructions):
    x = torch.tensor([math.nan, math.inf, -math.inf, 3.3e38, -3.3e38, 1.0] * 4).bfloat16()
    found, usual = (between(activation, gated, x, i) for i in (instructions, Instructions.PORTABLE))
    assert found.isnan()[::6].all()
    assert torch.equal(found.isnan(), usual.isnan())
    assert torch.equal(found.nan_to_num(0.0), usual.nan_to_num(0.0))
