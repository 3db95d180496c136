"""Where there is no GPU, the tests of the Triton kernels run in triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TESTS = [Path(__file__).with_name(name) for name in ("test_triton.py", "test_cuda_attention.py")]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; pip install 'moeray[gpu]'")
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU, in this process")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this process")
@pytest.mark.parametrize("tests", TESTS, ids=lambda path: path.stem)
def test_in_a_process_of_its_own(tests, tmp_path):
    """triton decides when it is imported, so this process stays as it is."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=tests.parents[3],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
