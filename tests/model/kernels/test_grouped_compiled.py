"""The Triton kernel compiled for GPUs that need not be there: which instructions come out of it."""

from __future__ import annotations

import os
import re

import pytest
import torch

from moeray.model.kernels.cuda import launch_arguments
from moeray.model.kernels.layout import Activation, Format, Layer, Matrix
from moeray.model.kernels.tiles import CANDIDATES, DEFAULTS

pytest.importorskip("triton", reason="triton is not installed; pip install 'moeray[gpu]'")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
LEAST_SHARED = 99 << 10  # bytes of shared memory of a program, on the GPUs that have the least (8.6, 8.9)
PRODUCTS = {80: r"mma\.sync\.aligned\.m16n8k16", 90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16"}
BYTES = {Format.BF16: 2, Format.INT8: 1, Format.FP8: 1, Format.MXFP4: 0.5}
SCALES = {Format.BF16: 0, Format.INT8: 4, Format.FP8: 8 * 4, Format.MXFP4: 1024 // 32}
SHIFT = {Format.FP8: 7}


def compiled(form, tile, capability, upwards=True, dtype=torch.bfloat16):
    """The kernel for gated experts of 1024 x 512, as a launch would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moeray.model.kernels.grouped import experts_kernel

    def matrix(inputs, outputs):
        shift = SHIFT.get(form, 0)
        return Matrix(form, inputs, outputs, int(inputs * BYTES[form]), SCALES[form], shift, shift)

    layer = Layer(matrix(1024, 512), matrix(512, 1024), Activation(1, 0, float("inf"), 0), 1)
    scalars, constants = launch_arguments(tile, layer, dtype, upwards=upwards, biased=False)
    names, rows = experts_kernel.arg_names, {torch.bfloat16: "*bf16"}[dtype]
    types = {"tiles": "*i64", "x": rows, "y": rows} | dict.fromkeys(constants, "constexpr")
    values = dict(zip(names[3:], scalars, strict=False))
    types |= {name: "fp32" if isinstance(value, float) else "i32" for name, value in values.items()}
    aligned = {"tiles", "x", "y"} | {n for n, value in values.items() if type(value) is int and value % 16 == 0}
    source = ASTSource(
        experts_kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(("form", "rows", "capability"), [
    (Format.BF16, 16, 80), (Format.FP8, 16, 90),
    *(pytest.param(form, rows, capability, marks=pytest.mark.slow)
      for form in BYTES for rows in CANDIDATES for capability in PRODUCTS),
])  # fmt: skip
def test_one_kind_of_product_for_any_number_of_rows_and_nothing_spilled(form, rows, capability, monkeypatch, tmp_path):
    """Tensor cores multiply all of it by the same instruction, which is why a row's bits do not depend on the tile; and
    the weights are fetched ahead, asynchronously."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for upwards in (True, False) if rows > 16 else (True,):
        made = compiled(form, DEFAULTS[rows], capability, upwards)
        ptx = made.asm["ptx"]
        products = set(re.findall(r"(?:mma\.sync|wgmma\.mma_async)\.[\w.]*k\d+", ptx))
        assert products
        assert all(re.fullmatch(PRODUCTS[capability], product) for product in products)
        assert "cp.async.cg.shared.global" in ptx
        assert ".local" not in ptx
        assert made.metadata.shared <= LEAST_SHARED
