"""Why a step's logits are no numbers: it is computed again, and every expert's outputs are looked at.

T tokens of a step, D hidden size, K experts a token.
"""

from __future__ import annotations

import logging

from torch import Tensor

from moeray.engine.batch import Batch
from moeray.engine.trunk_runner import TrunkRunner
from moeray.errors import MoerayError
from moeray.model.dispatched import ExpertRows, Sum
from moeray.model.loading import ModelFiles
from moeray.types import ExpertId

log = logging.getLogger(__name__)


class Explainer:
    """Owned by the step loop, as the runner is. `rows`: what reaches the experts."""

    def __init__(self, runner: TrunkRunner, rows: ExpertRows, files: ModelFiles) -> None:
        self._runner = runner
        self._rows = rows
        self._files = files

    def __call__(self, batch: Batch) -> str | None:
        """The expert that turns numbers into something else, with its tensor where that is at hand; None where it is
        no expert's doing, or the step cannot be computed now."""
        at_fault: list[ExpertId] = []
        sound = True

        def experts(layer: int, x_TD: Tensor, ids_TK: Tensor, total: Sum) -> None:
            nonlocal sound
            rows_TKD = self._rows(layer, x_TD, ids_TK)
            total.of(rows_TKD)
            if sound and not at_fault:
                sound = bool(x_TD.isfinite().all())
                if sound and not (finite_TK := rows_TKD.isfinite().all(-1)).all():
                    at_fault.append(ExpertId(layer, int(ids_TK.to(finite_TK.device)[~finite_TK].min())))

        try:
            self._runner.compute(batch, experts)
        except MoerayError as error:
            log.warning("a step whose logits were not finite could not be looked into: %s", error)
        return self._describe(at_fault[0]) if at_fault else None

    def _describe(self, expert: ExpertId) -> str:
        moe = self._files.family.layers[expert.layer]
        who = f"expert {expert.expert} of layer {expert.layer}"
        for name in moe.parameters():
            if found := self._files.weights.not_finite(name, expert.expert):
                return f"{found} ({who}); fetch the checkpoint again"
        return (
            f"{who} overflows, or its tensors (of {moe.name}) are not finite; check the checkpoint, or set dtype to "
            "bfloat16 or float32"
        )
