"""The kernel for decoding sequences against plain attention in fp64."""

from __future__ import annotations

import pytest
import torch

from moeray.model import kernels
from moeray.model.kernels.attention import decode
from moeray.model.kernels.native import Instructions, best_instructions
from tests.model.attention_problem import CONTEXTS, EXTRAS, SHAPES, Problem

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the kernels were not compiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention(shape, extras, dtype):
    problem = Problem(shape, dtype, **extras)
    expected = problem.expected()
    for instructions in Instructions:
        if instructions <= best_instructions():
            error = (
                problem.solve(decode, instructions=instructions).double() - expected
            ).abs().max() / expected.abs().max()
            assert error < (2e-6 if dtype is torch.float32 else 6e-3), instructions


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_result_does_not_depend_on_the_others_or_on_threads(shape):
    problem = Problem(shape, torch.bfloat16)
    together, before = problem.solve(decode), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert torch.equal(problem.solve(decode), together)
    finally:
        torch.set_num_threads(before)
    for row in range(len(CONTEXTS)):
        assert torch.equal(problem.solve(decode, slice(row, row + 1))[0], together[row])


def test_blocks_of_an_odd_size():
    problem = Problem((4, 2, 16, 16, False), torch.float32, block_size=5)
    torch.testing.assert_close(problem.solve(decode).double(), problem.expected(), rtol=1e-5, atol=2e-6)


def test_queries_that_lie_transposed():
    problem = Problem((8, 2, 16, 16, False), torch.float32)
    expected = problem.solve(decode)
    problem.q = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(problem.solve(decode), expected)
