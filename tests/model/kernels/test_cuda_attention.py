"""The attention of decoding sequences in Triton against plain attention in fp64: on a GPU where there is one, else in
triton's interpreter."""

from __future__ import annotations

import random

import pytest
import torch

from moeray.model.kernels.cuda_attention import decode_on_gpu
from tests.checkpoints import make_tiny
from tests.families.decode_steps import decode_step, experts, load
from tests.model.attention_problem import CONTEXTS, EXTRAS, SHAPES, Problem
from tests.model.kernels.on_triton import DEVICE, INTERPRETED, needs_triton

pytestmark = needs_triton
ROUNDING = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2}  # it cuts off


@pytest.mark.parametrize(("dtype", "shape", "extras"), [
    *((torch.float32, shape, {}) for shape in SHAPES), *((torch.float32, SHAPES[1], extras) for extras in EXTRAS[1:]),
    *((torch.bfloat16, shape, EXTRAS[-1]) for shape in SHAPES), (torch.float16, SHAPES[1], {}),
], ids=str)  # fmt: skip
def test_it_is_attention(dtype, shape, extras):
    problem = Problem(shape, dtype, **extras).to(DEVICE)
    expected = problem.expected()
    error = (problem.solve(decode_on_gpu).double() - expected).abs().max() / expected.abs().max()
    assert error < ROUNDING[dtype]


def test_a_result_does_not_depend_on_the_others():
    problem = Problem(SHAPES[1], torch.bfloat16).to(DEVICE)
    together = problem.solve(decode_on_gpu)
    for row in range(len(CONTEXTS)):
        assert torch.equal(problem.solve(decode_on_gpu, slice(row, row + 1))[0], together[row])


def test_blocks_of_an_odd_size():
    problem = Problem((4, 2, 16, 16, False), torch.float32, block_size=5).to(DEVICE)
    torch.testing.assert_close(problem.solve(decode_on_gpu).double(), problem.expected(), rtol=1e-5, atol=2e-6)


def test_queries_that_lie_transposed():
    problem = Problem((8, 2, 16, 16, False), torch.float32).to(DEVICE)
    expected = problem.solve(decode_on_gpu)
    problem.q = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(problem.solve(decode_on_gpu), expected)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "deepseek_v3"])
def test_a_trunk_attends_with_it(family, tmp_path):
    path = make_tiny(family, tmp_path / "m", dtype=torch.float32)
    ours, theirs = (load(path, torch.float32, DEVICE, attention=kernel) for kernel in ("triton", "torch"))
    for count in (3, 3, 3, 1):  # on a GPU, the third step repeats the second
        seed = random.random()
        found, wanted = (
            trunk.forward(*decode_step(trunk, count, random.Random(seed)), experts) for trunk in (ours, theirs)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
