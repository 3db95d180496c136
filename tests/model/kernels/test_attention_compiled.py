"""The attention of decoding sequences in Triton compiled for GPUs that need not be there: what comes out of it."""

from __future__ import annotations

import os
import re

import pytest
import torch

from moeray.model.kernels.cuda_attention import attend_constants

pytest.importorskip("triton", reason="triton is not installed; pip install 'moeray[gpu]'")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
LEAST_SHARED = 99 << 10  # bytes of shared memory of a program, on the GPUs that have the least (8.6, 8.9)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def compiled(k_size, v_size, dtype, capability):
    """The kernel as a launch over a cache of 16 tokens a block would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moeray.model.kernels.flash_decoding import attend_kernel

    names = attend_kernel.arg_names
    constants, options = attend_constants(dtype, k_size, v_size, 16, capped=False)
    types = dict.fromkeys(names, "i32") | dict.fromkeys("qkv", POINTERS[dtype])
    types |= dict.fromkeys(("tables", "first", "end"), "*i64") | dict.fromkeys(("sums", "maxima", "weights"), "*fp32")
    types |= dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(constants, "constexpr")
    strides = {name for name in names if re.fullmatch("[qkv]_.*", name)}
    aligned = strides | {name for name, kind in types.items() if kind.startswith("*")}
    source = ASTSource(
        attend_kernel, types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("k_size", "v_size", "dtype"), [
    (64, 64, torch.float16), (128, 128, torch.bfloat16), (576, 512, torch.bfloat16), (256, 256, torch.float32),
    (576, 512, torch.float32),
])  # fmt: skip
def test_tensor_cores_keys_fetched_ahead_and_nothing_spilled(k_size, v_size, dtype, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compiled(k_size, v_size, dtype, capability)
    ptx = made.asm["ptx"]
    assert ("cp.async.cg.shared.global" in ptx) is (k_size * dtype.itemsize < 2048)
    assert ("mma.sync.aligned.m16n8k16" in ptx) is (dtype is not torch.float32)
    assert ".local" not in ptx
    assert made.metadata.shared <= LEAST_SHARED
