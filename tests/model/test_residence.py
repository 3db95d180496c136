"""Weights that are brought into the page table before they are used."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from moeray.model.residence import _extent, fault_in
from moeray.model.safetensors_file import SafetensorsFile
from tests.pages import CAN_FAULT_IN, in_page_table


@pytest.mark.skipif(not CAN_FAULT_IN, reason="the kernel does not know how")
def test_only_what_is_asked_for_is_brought_in(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1 << 20), "b": torch.ones(2 << 20)}, path)
    file = SafetensorsFile.open(path)
    a, b = file.tensor("a"), file.tensor("b")
    before = in_page_table(path)
    assert before < a.nbytes
    fault_in([a, torch.empty(0), torch.zeros(3)])
    assert a.nbytes <= in_page_table(path) < a.nbytes + b.nbytes
    fault_in([b])
    assert in_page_table(path) >= a.nbytes + b.nbytes


@pytest.mark.parametrize(
    ("view", "elements"),
    [
        (lambda t: t, 24),
        (lambda t: t.t(), 24),
        (lambda t: t[1], 6),
        (lambda t: t[:, 2], 19),
        (lambda t: t[1:3, 1:3], 8),
        (lambda t: t[0, 0], 1),
    ],
)
def test_a_view_reaches_from_its_first_element_to_its_last(view, elements):
    assert _extent(view(torch.zeros(4, 6))) == 4 * elements
