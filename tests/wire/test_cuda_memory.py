"""On which card a peer's memory is opened."""

from __future__ import annotations

import pytest
import torch

from moeray.wire.cuda_memory import device_named
from moeray.wire.device_memory import DeviceMemoryError

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("visible", "own", "reaches", "where"),
    [
        ({"GPU-a": FIRST}, FIRST, False, FIRST),  # both have a part of one card, which is all that Ray shows them
        ({"GPU-b": FIRST, "GPU-a": SECOND}, SECOND, False, SECOND),  # numbered otherwise than at the peer's
        ({"GPU-b": FIRST, "GPU-a": SECOND}, FIRST, True, SECOND),
        ({"GPU-b": FIRST, "GPU-a": SECOND}, FIRST, False, "out of reach"),
        ({"GPU-b": FIRST}, FIRST, True, "not visible here"),
        ({}, FIRST, True, "not visible here"),
    ],
)
def test_a_card_is_the_same_by_its_uuid(visible, own, reaches, where):
    def asked(mine, other):
        assert (mine, other) == (own, visible["GPU-a"])
        return reaches

    if isinstance(where, str):
        with pytest.raises(DeviceMemoryError, match=f"GPU-a is {where}"):
            device_named("GPU-a", visible, own, asked)
    else:
        assert device_named("GPU-a", visible, own, asked) == where
