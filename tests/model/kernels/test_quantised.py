"""Products over FP8 blocks and MXFP4 against fp64 ones of the decoded weights, on every instruction set."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from moeray.model.formats import Fp8Block, Int8, Mxfp4
from moeray.model.kernels import available
from moeray.model.kernels.experts import _outputs, _stored
from moeray.model.kernels.layout import Expert, Layer
from moeray.model.kernels.native import Instructions, best_instructions, forward

pytestmark = pytest.mark.skipif(not available(), reason="the kernels were not compiled on this machine")
SETS = [i for i in Instructions if available() and i <= best_instructions()]
IN_DIGITS = (Instructions.AVX512_VNNI, Instructions.AVX512_BF16)
PAIRED = [i for i in SETS if i >= Instructions.AVX512_BF16]
SMALLEST_NORMAL = 2.0**-126


def seeded():
    return torch.Generator().manual_seed(0)


def random_fp8(outputs, inputs, block=(128, 128)):
    """All numbers but NaN; scales of all sizes."""
    codes = torch.randint(0, 127, (outputs, inputs), generator=seeded()).to(torch.uint8)
    signs = torch.randint(0, 2, codes.shape, generator=seeded()).to(torch.uint8) * 128
    grid = (-(-outputs // block[0]), -(-inputs // block[1]))
    return Fp8Block((codes | signs).view(torch.float8_e4m3fn), 10 ** torch.empty(grid).uniform_(-5, 1), block)


def random_mxfp4(outputs, inputs):
    shape = (outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=seeded())
    return Mxfp4(blocks, torch.randint(110, 130, shape, dtype=torch.uint8, generator=seeded()))


def least_int8(instructions):
    """-128 comes of no rounding, and matrix tiles do without it."""
    return -127 if instructions is Instructions.AMX_BF16 else -128


def random_int8(outputs, inputs, instructions):
    """All numbers; scales of all sizes."""
    numbers = torch.randint(least_int8(instructions), 128, (outputs, inputs), generator=seeded()).to(torch.int8)
    return Int8(numbers, 10 ** torch.empty(outputs).uniform_(-5, 1), transposed=False)


def product(weight, x, instructions):
    """x [R, I] -> [R, O] fp32."""
    stored = _stored(weight, transposed=isinstance(weight, Mxfp4))
    layer, expert = Layer(down=stored.matrix), Expert(down=_outputs(stored, None, 0, 1))
    outputs = stored.matrix.outputs
    return forward(layer, [ctypes.addressof(expert)], [len(x)], x, outputs, instructions, torch.float32)


def decoded(weight, dtype):
    """[O, I]."""
    return weight.dense(dtype).t() if isinstance(weight, Mxfp4) else weight.dense(dtype)


WEIGHTS = [
    *(
        (random_fp8, size)
        for size in [(128, 256), (192, 576), (576, 192), (200, 72), (33, 600), (7, 40), (20, 7168), (33, 2368)]
    ),
    *((random_mxfp4, size) for size in [(128, 256), (40, 32), (33, 96), (7, 2880), (64, 192), (20, 8192)]),
    (lambda *size: random_fp8(*size, block=(32, 16)), (72, 40)),
    (lambda *size: random_fp8(*size, block=(64, 64)), (72, 200)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("make", "size"), WEIGHTS)
def test_it_is_the_product_and_a_row_depends_on_itself_alone(make, size, instructions, dtype):
    weight = make(*size)
    x = torch.randn(131, size[1], generator=seeded()).to(dtype)
    expected = x.double() @ decoded(weight, torch.float64).t()
    together = product(weight, x, instructions)
    assert (together.double() - expected).norm() <= 1e-6 * expected.norm()  # weights and products are exact
    for first, count in [(0, 1), (1, 1), *((4 * n, n) for n in range(2, 14))]:
        rows = slice(first, first + count)
        assert torch.equal(product(weight, x[rows], instructions), together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(
    "size", [(128, 256), (192, 576), (33, 200), (7, 40), (16, 1), (5, 8192), (9, 9000), (3, 40000)]
)
def test_int8_is_the_product_and_a_row_depends_on_itself_alone(size, instructions, dtype):
    weight = random_int8(*size, instructions)
    x = torch.randn(20, size[1], generator=seeded()).to(dtype)
    x[3] *= 1e30
    x[4] *= 1e-30
    x[5, 0] = 1000.0  # one far from the others
    x[6] = 0
    dense = weight.dense(torch.float64).t()
    together = product(weight, x, instructions)
    bound = 1e-5 * (x.double().abs() @ dense.abs())
    if dtype is torch.bfloat16 and instructions in IN_DIGITS:  # whole numbers, the largest about 2^14
        coarser = 2 ** max(0, math.ceil(math.log2(size[1] / 8192)))
        bound += x.double().abs().amax(1, keepdim=True) * 1.01 * 2**-15 * coarser * dense.abs().sum(0)
    assert ((together.double() - x.double() @ dense).abs() <= bound).all()
    for first, count in [(0, 1), (1, 1), (2, 2), (4, 4), (9, 5), (3, 6), (2, 7), (4, 10), (6, 11), (0, 13)]:
        rows = slice(first, first + count)
        assert torch.equal(product(weight, x[rows], instructions), together[rows])


@pytest.mark.parametrize("inputs", [64, 8192, 8200, 20000])
@pytest.mark.parametrize("instructions", SETS)
def test_int8_of_the_largest_sums(instructions, inputs):
    largest = torch.finfo(torch.bfloat16).max
    for value in (1.9921875, 1.984375, 1.0, -1.9921875, largest / 2**24, 2.0**-126):
        x = torch.full((2, inputs), value, dtype=torch.bfloat16)
        for number in (least_int8(instructions), 127):
            weight = Int8(torch.full((3, inputs), number, dtype=torch.int8), torch.ones(3), transposed=False)
            expected = torch.full((2, 3), value * number * inputs)
            assert torch.allclose(product(weight, x, instructions), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("instructions", SETS)
def test_int8_of_inputs_of_like_magnitude_is_exact(instructions):
    weight = random_int8(40, 300, instructions)
    weight = Int8(weight.weight, torch.ones(40), transposed=False)
    x = torch.randint(1, 128, (9, 300), generator=seeded()).to(torch.bfloat16)  # within 2^7 of each other
    assert torch.equal(product(weight, x, instructions), x.float() @ weight.weight.float().t())


@pytest.mark.skipif(Instructions.AVX512_BF16 not in SETS, reason="needs a CPU that has both")
def test_int8_in_whole_numbers_is_the_same_with_and_without_pairs():
    weight = random_int8(40, 300, Instructions.AVX512_BF16)
    x = torch.randn(20, 300, generator=seeded()).to(torch.bfloat16)
    assert torch.equal(*(product(weight, x, instructions) for instructions in IN_DIGITS))
    assert not torch.equal(*(product(weight, x, i) for i in (Instructions.AVX512, Instructions.AVX512_VNNI)))


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_int8_of_what_is_not_finite_is_not_finite_and_leaves_other_rows_alone(value, instructions):
    weight, x = random_int8(24, 100, instructions), torch.randn(8, 100, generator=seeded()).to(torch.bfloat16)
    clean = product(weight, x, instructions)
    x[5, 70] = value
    found = product(weight, x, instructions)
    assert not found[5, weight.weight[:, 70] != 0].isfinite().any()
    others = [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("instructions", SETS)
def test_every_e4m3_number_is_exact(instructions, rows):
    numbers = torch.arange(256).to(torch.uint8).repeat(64, 1).t().contiguous()  # row o: the number o, 64 times
    weight = Fp8Block(numbers.view(torch.float8_e4m3fn), torch.ones(2, 1), (128, 128))
    found = product(weight, torch.eye(64, dtype=torch.bfloat16)[:rows], instructions)
    expected = weight.dense(torch.float32)[:, 0]
    are_numbers = ~expected.isnan()
    assert int(are_numbers.sum()) == 254
    assert torch.equal(found[:, are_numbers], expected[are_numbers].expand(rows, -1))
    if instructions >= Instructions.AVX512_BF16:
        assert found[:, ~are_numbers].isnan().all()


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("instructions", SETS)
def test_every_mxfp4_number_is_exact_of_all_scales(instructions, rows):
    """But below the smallest normal number, which is 0 where the CPU multiplies pairs."""
    codes, scales = (v.flatten() for v in torch.meshgrid(torch.arange(16), torch.arange(255), indexing="ij"))
    codes = torch.where((codes & 7 > 3) & (scales > 252), 0, codes)  # 2 and more, which would be infinite
    blocks = (codes * 17).to(torch.uint8)[:, None, None].expand(-1, 2, 16).contiguous()
    weight = Mxfp4(blocks, scales.to(torch.uint8)[:, None].expand(-1, 2).contiguous())
    found = product(weight, torch.eye(64, dtype=torch.bfloat16)[:rows], instructions)
    expected = decoded(weight, torch.float32)[:, 0]
    if instructions >= Instructions.AVX512_BF16:
        expected = torch.where(expected.abs() < SMALLEST_NORMAL, 0, expected)
    assert math.isfinite(float(expected.abs().max()))
    assert torch.equal(found, expected.expand_as(found))


@pytest.mark.skipif(not PAIRED, reason="needs a CPU that multiplies pairs of bf16")
@pytest.mark.parametrize("instructions", PAIRED)
@pytest.mark.parametrize("rows", [1, 64])
def test_an_mxfp4_scale_that_is_nan_stays(rows, instructions):
    weight = random_mxfp4(16, 64)
    weight.scales[3, 1] = 255
    found = product(weight, torch.ones(rows, 64, dtype=torch.bfloat16), instructions)
    assert torch.equal(found.isnan(), (torch.arange(16) == 3).expand_as(found))
