"""The kernel for decoding sequences against plain attention in fp64."""

from __future__ import annotations

import pytest
import torch

from moeray.model import kernels
from moeray.model.kernels.attention import decode
from moeray.model.kernels.native import Instructions, best_instructions

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the kernels were not compiled")

CONTEXTS = (1, 15, 16, 17, 256, 257, 300, 513)
SHAPES = [  # heads, key/value heads, key size, value size, whether values are the beginning of keys
    (16, 8, 64, 64, False),
    (4, 2, 24, 16, False),
    (7, 7, 28, 20, False),
    (20, 1, 40, 32, True),
    (36, 2, 16, 16, False),
    (18, 1, 576, 512, True),
]
EXTRAS = [
    {},
    {"softcap": 20.0},
    {"sinks_H": True},
    {"window": 37},
    {"softcap": 5.0, "sinks_H": True, "window": 300},
]


class Problem:
    def __init__(self, shape, dtype, block_size=16, softcap=None, sinks_H=None, window=None):
        heads, groups, k_size, v_size, shared = shape
        generator = torch.Generator().manual_seed(0)

        def random(*sizes):
            return torch.randn(sizes, generator=generator)

        count, width = len(CONTEXTS), -(-max(CONTEXTS) // block_size)
        self.q = (2 * random(count, heads, k_size)).to(dtype)
        self.k = random(count * width * block_size, groups, k_size).to(dtype)
        self.v = self.k[..., :v_size] if shared else random(len(self.k), groups, v_size).to(dtype)
        self.tables = torch.randperm(count * width, generator=generator).view(count, width)
        self.end = torch.tensor(CONTEXTS)
        self.first = torch.zeros_like(self.end) if window is None else (self.end - window).clamp(min=0)
        self.block_size = block_size
        self.options = {
            "scale": k_size**-0.5,
            "softcap": softcap,
            "sinks_H": None if sinks_H is None else 3 * random(heads),
        }

    def solve(self, rows=slice(None), instructions=None):
        return decode(
            self.q[rows], self.k, self.v, self.tables[rows], self.first[rows], self.end[rows], self.block_size,
            **self.options, instructions=instructions,
        )  # fmt: skip

    def expected(self):
        return torch.stack([self._expected(b) for b in range(len(self.q))])

    def _expected(self, b):
        at = torch.arange(int(self.first[b]), int(self.end[b]))
        slots = self.tables[b, at // self.block_size] * self.block_size + at % self.block_size
        repeats = self.q.shape[1] // self.k.shape[1]
        k_HLD, v_HLD = (x[slots].double().transpose(0, 1).repeat_interleave(repeats, 0) for x in (self.k, self.v))
        scores = (k_HLD @ self.q[b].double()[..., None])[..., 0] * self.options["scale"]
        if self.options["softcap"]:
            scores = self.options["softcap"] * torch.tanh(scores / self.options["softcap"])
        if self.options["sinks_H"] is not None:
            scores = torch.cat([scores, self.options["sinks_H"].double()[:, None]], -1)
        p_HL = scores.softmax(-1)[:, : len(at)]
        return (p_HL[:, None] @ v_HLD)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention(shape, extras, dtype):
    problem = Problem(shape, dtype, **extras)
    expected = problem.expected()
    for instructions in Instructions:
        if instructions <= best_instructions():
            error = (problem.solve(instructions=instructions).double() - expected).abs().max() / expected.abs().max()
            assert error < (2e-6 if dtype is torch.float32 else 6e-3), instructions


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_result_does_not_depend_on_the_others_or_on_threads(shape):
    problem = Problem(shape, torch.bfloat16)
    together, before = problem.solve(), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert torch.equal(problem.solve(), together)
    finally:
        torch.set_num_threads(before)
    for row in range(len(CONTEXTS)):
        assert torch.equal(problem.solve(slice(row, row + 1))[0], together[row])


def test_blocks_of_an_odd_size():
    problem = Problem((4, 2, 16, 16, False), torch.float32, block_size=5)
    torch.testing.assert_close(problem.solve().double(), problem.expected(), rtol=1e-5, atol=2e-6)


def test_queries_that_lie_transposed():
    problem = Problem((8, 2, 16, 16, False), torch.float32)
    expected = problem.solve()
    problem.q = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(problem.solve(), expected)
