"""Where a bank's experts come from, and the refusal of what is no number."""

from __future__ import annotations

from typing import Protocol

from moeray.errors import CheckpointError
from moeray.model.expert_tensor import ExpertTensor


class ExpertWeights(Protocol):
    """Slices of fused parameters, one expert's at a time, such as a `WeightMap`'s."""

    def expert(self, name: str, expert: int) -> ExpertTensor:
        """One expert's slice of the fused parameter `name`. Raises CheckpointError."""
        ...

    def not_finite(self, name: str, expert: int) -> str | None:
        """What of it is no number: the tensor and its file; None where nothing is."""
        ...


def refusal(weights: ExpertWeights, name: str, expert: int) -> CheckpointError:
    """For a slice that was found not to be finite."""
    found = weights.not_finite(name, expert) or f"a tensor of {name} is not finite"
    return CheckpointError(f"{found} (expert {expert}); fetch the checkpoint again")
