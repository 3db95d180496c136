"""A layer whose tokens lie on a device, and stay there on their way to actors that share its memory.

What goes to others, or finds no room in a ring, takes the way through the host's memory: copied there once, and back.

Shapes: T tokens, K experts a token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from moeray.dispatch.plan import Share
from moeray.errors import WireError
from moeray.wire.channel import Channel
from moeray.wire.device_rows import KEY, index_on, named_in, place_tokens, take_outputs
from moeray.wire.frame import Frame, Op


def carries(channels: Iterable[Channel | None], device: torch.device) -> bool:
    """Whether rows of this device stay there on any of the channels."""
    rings = (channel.device for channel in channels if channel is not None)
    return any(each is not None and each.memory.device == device for each in rings)


class OnDevice:
    """x_TD: the tokens, contiguous; out_TKD: their outputs, with `outputs` once all have come."""

    def __init__(self, x_TD: Tensor, top_k: int) -> None:
        self.x_TD = x_TD
        self.out_TKD = x_TD.new_empty(len(x_TD), top_k, x_TD.shape[1])
        self._came_home: list[bytes] = []

    @cached_property
    def home_x_TD(self) -> Tensor:
        """The tokens in the host's memory."""
        return self.x_TD.cpu()

    @cached_property
    def home_out_TKD(self) -> Tensor:
        """For outputs that come there."""
        return torch.empty(self.out_TKD.shape, dtype=self.out_TKD.dtype)

    def send(self, channel: Channel, frame_id: int, layer: int, epoch: int, share: Share) -> bool:
        """Send the share's rows; False, with nothing sent, where they cannot stay on the device. Raises as `send`."""
        rings = channel.device
        if rings is None or rings.memory.device != self.x_TD.device:
            return False
        try:
            with rings.use():
                placed = place_tokens(rings, self.x_TD, share.tokens)
        except WireError:  # the peer claims to have read what was never written
            channel.close()
            raise
        if placed is None:
            return False
        meta = {"experts": share.experts, "counts": share.counts, KEY: list(placed)}
        index_R = index_on(share.token_of_row, torch.device("cpu"))
        channel.send(Frame(Op.FORWARD, frame_id, layer, epoch, meta, (index_R,)))
        return True

    def take(self, channel: Channel, frame: Frame, rows: bytes) -> bool | None:
        """Put a RESULT's outputs to these rows; False where they do not fit, None where the frame has them itself.
        Raises WireError."""
        placed, rings = named_in(frame), channel.device
        if placed is None:
            return None
        if rings is None:
            return False
        with rings.use():
            return take_outputs(rings, placed, rows, self.out_TKD)

    def came_home(self, rows: bytes) -> None:
        """Outputs of these rows are in `home_out_TKD`."""
        self._came_home.append(rows)

    def outputs(self) -> Tensor:
        """[T, K, D] on the device, all of them."""
        if self._came_home:
            index_R = index_on(b"".join(self._came_home), torch.device("cpu"))
            width = self.x_TD.shape[1]
            rows_RD = self.home_out_TKD.view(-1, width)[index_R].to(self.x_TD.device)
            self.out_TKD.view(-1, width).index_copy_(0, index_R.to(self.x_TD.device), rows_RD)
        return self.out_TKD
