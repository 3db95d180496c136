"""Where tests of Triton's kernels run: on a GPU where there is one, else in triton's interpreter.

The interpreter needs a process in which it was switched on before triton was imported: test_interpreter.py starts one.
"""

from __future__ import annotations

import os

import pytest
import torch

from moeray.model.kernels.cuda import available

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED) or not available(DEVICE),
    reason="needs triton, and a GPU or the process that test_interpreter.py starts",
)
