"""Actors that share a process open their models at the same time, as `generate --local` has them do."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moeray.model.experts import ExpertBank
from moeray.model.loading import open_model
from moeray.model.trunk import Trunk
from moeray.types import ExpertId
from tests.checkpoints import make_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_models_in_half_precision_opened_side_by_side_disturb_nobody(family, tmp_path, caplog):
    path = make_tiny(family, tmp_path / "model", dtype=torch.bfloat16)

    def open_experts() -> None:
        files = open_model(str(path), None, node="here")
        ExpertBank(files.family, files.weights, torch.bfloat16, CPU).load([ExpertId(max(files.family.layers), 0)])

    def open_trunk() -> None:
        files = open_model(str(path), None, node="here")
        Trunk.load(files.checkpoint, files.family, files.weights, torch.bfloat16, CPU)

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(4) as pool:
        for opened in [pool.submit(job) for job in (open_experts, open_trunk) * 8]:
            opened.result()
    assert not [record for record in caplog.records if "torch, slower" in record.getMessage()]
    assert torch.get_default_dtype() is torch.float32
