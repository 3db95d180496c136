"""A frame's rows on their way through an expert actor, by themselves or with others of their layer.

Shapes: U tokens that were sent, R rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.errors import WireError
from moeray.model.experts import HeldExperts
from moeray.wire.device_rings import DeviceRings
from moeray.wire.device_rows import Placed, place
from moeray.wire.frame import Frame
from moeray.wire.row_message import Place
from moeray.wire.rows import Given

Rows = tuple[HeldExperts, list[int], list[int], Tensor, Tensor]
"""Experts, their numbers, rows of each, tokens [U, D] and each row's token [R], of one frame."""


@dataclass(eq=False, slots=True)
class Forward:
    """One frame's rows; `out_RD`, `placed`, `on_device` or `error` is what came of it. Times are of time.perf_counter.

    `given`: where the frame's tensors lie, if that is known. `place`: the channel's memory for so many bytes of
    outputs, if it has any. `placed`: memory that begins with the outputs, where they are no tensor. `rings`: by which
    the rows came on a device, where outputs go back; `on_device`: where these lie there.
    """

    frame: Frame
    given: Given | None
    place: Callable[[int], Place | None]
    held: HeldExperts
    arrived: float
    began: float = 0.0
    took: float = 0.0
    out_RD: Tensor | None = None
    placed: Place | None = None
    rings: DeviceRings | None = None
    on_device: Placed | None = None
    error: Exception | None = None

    @property
    def experts(self) -> list[int]:
        experts: list[int] = self.frame.meta["experts"]
        return experts

    @property
    def counts(self) -> list[int]:
        counts: list[int] = self.frame.meta["counts"]
        return counts

    def rows(self) -> Rows:
        """For `compute`. The row index is the checked copy: the peer may still write to where the frame's lies."""
        x_UD, token_of_row_R = self.frame.tensors
        if self.given is not None and self.given.rows:
            token_of_row_R = torch.frombuffer(bytearray(self.given.token_of_row), dtype=torch.int64)
        return self.held, self.experts, self.counts, x_UD, token_of_row_R

    def finish(self, out_RD: Tensor) -> None:
        """These are the outputs, on the device that computed them: put them where they go out from."""
        if self.rings is not None:
            try:
                self.on_device = place(self.rings, len(out_RD), out_RD, lambda to_RD: to_RD.copy_(out_RD))
            except WireError as error:  # this router's progress cannot be; the others' outputs are well
                self.error = error
        if self.on_device is None:
            self.out_RD = out_RD.cpu()

    def fits(self, other: Forward) -> bool:
        """Whether both can run as one."""
        mine, its = self.frame.tensors[0], other.frame.tensors[0]
        return self.frame.layer == other.frame.layer and mine.dtype is its.dtype and mine.shape[1] == its.shape[1]


def settle(batch: list[Forward]) -> None:
    """Wait until the outputs that stay on the device are there."""
    memories = {forward.rings.memory for forward in batch if forward.rings is not None and forward.on_device}
    for memory in memories:
        memory.settle()


def compute(frames: list[Rows], device: torch.device) -> list[Tensor]:
    """The outputs of each frame's rows on the device, [R, D]; the frames are of one layer and each expert runs once."""
    inputs = [x_UD.to(device)[token_of_row_R.to(device)] for _, _, _, x_UD, token_of_row_R in frames]
    held, _, counts, _, _ = frames[0]
    if len(frames) == 1:
        return [held(inputs[0], counts)]
    expert_R = torch.cat([torch.tensor(e).repeat_interleave(torch.tensor(c)) for _, e, c, _, _ in frames])
    order = expert_R.argsort(stable=True)
    _, merged = torch.unique_consecutive(expert_R[order], return_counts=True)
    every = held.with_those_of(other for other, _, _, _, _ in frames[1:])
    order = order.to(device)
    sorted_RD = every(torch.cat(inputs)[order], merged.tolist())
    out_RD = torch.empty_like(sorted_RD)
    out_RD[order] = sorted_RD
    return list(torch.split(out_RD, [len(x_RD) for x_RD in inputs]))
