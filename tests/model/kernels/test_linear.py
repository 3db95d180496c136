"""The kernels' linear layer against fp64 products, on every instruction set that this machine has."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from moeray.compiled import compiled
from moeray.model.kernels import NativeLinear, available, linear, native
from moeray.model.kernels.native import Instructions, best_instructions

needs_kernels = pytest.mark.skipif(not available(), reason="the kernels were not compiled on this machine")
SETS = [i for i in Instructions if available() and i <= best_instructions()]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_kernels
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("weight_dtype", ROUNDING)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (72, 40), (3, 5), (100, 129), (33, 1000)])
def test_it_is_the_product(outputs, inputs, weight_dtype, instructions):
    weight, bias = random(outputs, inputs, dtype=weight_dtype), random(outputs, seed=1)
    layer = NativeLinear(weight, bias)
    for dtype, rounding in ROUNDING.items():
        for rows in (1, 2, 3, 5, 6, 7, 13, 129, 300):
            x = random(rows, inputs, dtype=dtype, seed=rows)
            expected = F.linear(x.double(), weight.double(), bias.double())
            found = layer(x, instructions)
            assert found.dtype is dtype
            assert (found.double() - expected).norm() <= rounding * expected.norm()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("size", [300, 320, 4096])
def test_a_row_does_not_depend_on_others_or_on_threads(instructions, dtype, size):
    layer, x = NativeLinear(random(100, size, dtype=torch.bfloat16)), random(140, size, dtype=dtype, seed=1)
    together = layer(x, instructions)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 40):  # the last are more than there are tiles
            torch.set_num_threads(threads)
            assert torch.equal(layer(x, instructions), together)
            assert all(torch.equal(layer(x[r : r + 1], instructions)[0], together[r]) for r in range(0, 140, 9))
            assert all(torch.equal(layer(x[5 : 5 + n], instructions), together[5 : 5 + n]) for n in (2, 3, 4, 5, 11))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(Instructions.AVX512 not in SETS, reason="needs AVX-512 to compare with")
def test_instruction_sets_with_fused_multiply_add_give_the_same_bits():
    layer = NativeLinear(random(100, 1030, dtype=torch.bfloat16), random(100))
    for rows in (1, 4, 17):
        x = random(rows, 1030, seed=rows)
        assert torch.equal(layer(x, Instructions.AVX512), layer(x, Instructions.AVX2))


@needs_kernels
def test_special_values_survive_rounding_to_bfloat16():
    x = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [3.4e38], [1.00390625], [-0.0]])
    found = linear(x.bfloat16(), torch.ones(1, 1))[:, 0]
    expected = x.bfloat16()[:, 0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[1:], expected[1:])
    wide = linear(torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8]]).bfloat16(), torch.ones(1, 2))[:, 0]
    assert torch.equal(wide, torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]).bfloat16())  # ties go to even


@needs_kernels
@pytest.mark.parametrize("instructions", SETS)
def test_sums_of_bfloat16_can_stay_in_fp32(instructions):
    weight, x = random(33, 1000, dtype=torch.bfloat16), random(9, 1000, dtype=torch.bfloat16, seed=1)
    found, expected = NativeLinear(weight)(x, instructions, torch.float32), F.linear(x.double(), weight.double())
    assert found.dtype is torch.float32
    assert (found.double() - expected).norm() <= ROUNDING[torch.float32] * expected.norm()


@needs_kernels
def test_leading_dimensions_views_and_no_rows():
    whole = random(40, 96, dtype=torch.bfloat16)
    view, x = whole[8:24, 16:80], random(2, 3, 64)
    assert torch.allclose(linear(x, view), F.linear(x, view.float()), atol=1e-4)
    assert linear(x[:0], view).shape == (0, 3, 16)


@needs_kernels
@pytest.mark.parametrize("weight", [random(8, 8).t()[:, ::2], torch.ones(4, 4, dtype=torch.int32)])
def test_other_weights_are_refused(weight):
    with pytest.raises(ValueError, match="contiguous rows"):
        NativeLinear(weight)


_FORKS = """
import os, torch
from moeray.compiled import compiled
from moeray.model.kernels import linear
w, x = torch.ones(512, 64), torch.ones(3, 64)
for _ in range(3):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os._exit(0 if bool((linear(x, w) == 64).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


@needs_kernels
def test_forks_of_a_process_that_has_loaded_them_compute_on_threads_of_their_own():
    subprocess.run([sys.executable, "-c", _FORKS], check=True, timeout=120)


def test_without_a_compiled_object_one_warning_names_the_mend(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "moeray.model.kernels._native", None)
    compiled.cache_clear()
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not available()
            assert not available()
        assert len(caplog.records) == 1
        assert "install moeray again where there is a C compiler" in caplog.text
        with pytest.raises(ValueError, match=r"kernels\.available"):
            linear(torch.ones(1, 1), torch.ones(1, 1))
    finally:
        compiled.cache_clear()
        native.library.cache_clear()
