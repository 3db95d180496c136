"""Where nothing was compiled, Python does the same work."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from moeray.compiled import compiled

WITHOUT = """
import sys, threading
from pathlib import Path
PARTS = tuple(f"moeray.{room}._native" for room in ("actors", "dispatch", "wire", "model.kernels"))
sys.modules.update(dict.fromkeys(PARTS))  # importing one of them fails
import torch
from moeray.actors.rows import RowServer
from moeray.dispatch import planner
from moeray.dispatch.planner import Planner
from moeray.dispatch.view import Usable
from moeray.model.experts import ExpertBank
from moeray.model.kernels import available
from moeray.model.loading import open_model
from moeray.recorder import Recorder
from moeray.types import ExpertId
from moeray.wire import row_message
from moeray.wire.rows import Forward, put_rows
from tests.checkpoints import make_tiny
from tests.wire.support import Host

assert planner.native is row_message.native is None and not available()
folder = Path(sys.argv[1])
files = open_model(str(make_tiny("mixtral", folder / "m", dtype=torch.bfloat16)), None, node="here")
bank = ExpertBank(files.family, files.weights, torch.bfloat16, torch.device("cpu"))
bank.load(ExpertId(0, e) for e in range(8))
server = RowServer(torch.device("cpu"), Recorder(group="experts"))
server.use(bank)
x_TD, ids_TK = torch.randn(5, 64).bfloat16(), torch.tensor([[0, 3], [1, 2], [7, 0], [3, 1], [0, 7]])
now = Usable(replicas={0: {e: ("a",) for e in range(8)}})
(share,) = Planner().plan(now, 0, ids_TK).shares
host = Host(folder)
near, far = host.pair("unix")
near.send_rows(Forward(1, 0, 0, share.experts, share.counts, x_TD, share.tokens, share.token_of_row))
server.serve(far.recv(10), far)
out_TKD = torch.zeros(5, 2, 64, dtype=torch.bfloat16)
assert put_rows(near.recv(10).tensors, share.rows, out_TKD)
for t in range(5):
    for k in range(2):
        exact = bank.forward(0, x_TD[t : t + 1], [int(ids_TK[t, k])], [1])[0]
        assert torch.allclose(out_TKD[t, k].float(), exact.float(), rtol=2e-2, atol=2e-2)
near.close()
host.close()
print("done")
"""


def test_a_forward_without_any_compiled_part(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.endswith("done\n"), ran.stderr


def test_a_part_that_is_not_there_is_told_once(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "moeray.nowhere._native", None)
    with caplog.at_level(logging.WARNING):
        assert compiled("moeray.nowhere._native") is None
        assert compiled("moeray.nowhere._native") is None
    (told,) = [record for record in caplog.records if "nowhere" in record.message]
    assert "install moeray again" in told.message


@pytest.mark.parametrize("part", ["dispatch", "wire", "model.kernels"])
def test_each_part_loads_where_it_was_compiled(part):
    module = compiled(f"moeray.{part}._native")
    assert module is None or module.__file__.endswith(".so")
