"""A layer's forwards on their way: until when each may take, and whose answer is taken next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moeray.dispatch.links import Links
from moeray.dispatch.plan import Share
from moeray.errors import ChannelTimeoutError
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame
from moeray.wire.row_message import native
from moeray.wire.tensors import CODES

_NO_DTYPE = 1 << 30
"""Not one of the wire's codes."""
LEAST_READ_S = 0.1
"""What an answer may take to be read, also where its actor's deadline passed while another's was read."""


class Sent(NamedTuple):
    """A forward on its way. `allowed`: seconds that its actor has for it; `until`: when it is given up; `hop`: how it
    went (`hops.HOPS`)."""

    frame_id: int
    share: Share
    channel: Channel
    at: float
    allowed: float
    until: float
    hop: str


class Flight:
    """The forwards of one layer that are not answered yet: `sent`, in order; `count` and `rows` of each actor's.
    `deadline_s`: what an actor is allowed at most."""

    def __init__(self, layer: int, links: Links, deadline_s: float, clock: Callable[[], float]) -> None:
        self.sent: list[Sent] = []
        self.count: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self._layer = layer
        self._links = links
        self._deadline_s = deadline_s
        self._clock = clock

    def add(self, sent: Sent) -> None:
        """It is on its way."""
        self.sent.append(sent)
        self._counted(sent, 1)

    def _counted(self, sent: Sent, by: int) -> None:
        self.count[sent.share.actor_id] += by
        self.rows[sent.share.actor_id] += by * sent.share.size

    def dated(self, frame_id: int, share: Share, channel: Channel, at: float) -> Sent:
        """With the deadline, which is behind those of what its actor was sent before."""
        allowed = self._links.deadline_s(share.actor_id, self._layer, share.experts, share.size, self._deadline_s)
        others = (other.until for other in self.sent if other.channel is channel)
        until = max(at, max(others, default=at)) + allowed
        return Sent(frame_id, share, channel, at, allowed, until, channel.kind)

    def take_all(self, channel: Channel) -> list[Sent]:
        """Those on this channel, which are in flight no longer."""
        taken = [sent for sent in self.sent if sent.channel is channel]
        self.sent = [sent for sent in self.sent if sent.channel is not channel]
        for sent in taken:
            self._counted(sent, -1)
        return taken

    def first(self, out_TKD: Tensor | None) -> tuple[Sent, float | None]:
        """What is answered first, else that whose deadline ends first, and before them what never will be, its channel
        being closed; in flight no longer.

        With it its actor's seconds of compute, where the part in C has put its rows to `out_TKD` already: of none that
        lie on a device, where there is no such memory.
        """
        heads = list({id(sent.channel): sent for sent in reversed(self.sent)}.values())  # actors answer in order
        soonest = min(heads, key=_until)
        gone = next((sent for sent in heads if sent.channel.closed), None)
        found = (gone, None) if gone is not None else self._take_result(heads, out_TKD, soonest.until)
        sent, compute_s = found or (soonest, None)
        self.sent = [other for other in self.sent if other is not sent]
        self._counted(sent, -1)
        return sent, compute_s

    def answer(self, sent: Sent) -> Frame:
        """The frame that answers `sent`; answers to earlier frames that came too late are passed over. Raises
        WireError."""
        until = max(sent.until, self._clock() + LEAST_READ_S)
        while True:
            frame = sent.channel.recv(timeout=max(0.0, until - self._clock()))
            if frame.id == sent.frame_id:
                return frame
            if self._clock() >= until:
                raise ChannelTimeoutError(f"{sent.share.actor_id} answers everything but what it was asked")

    def _take_result(self, heads: list[Sent], out_TKD: Tensor | None, until: float) -> tuple[Sent, float | None] | None:
        """As `first`, of these, the earliest on each channel; None where nothing came until then, or the part in C does
        not speak on all of the channels."""
        wanted = [(sent.channel.lane, sent.frame_id, b"" if out_TKD is None else sent.share.rows) for sent in heads]
        if native is None or not all(lane for lane, _, _ in wanted):
            return None
        left_s = max(0.0, until - self._clock())
        if out_TKD is None:  # C waits, and takes nothing: no answer is of that dtype
            found = native.take_result(wanted, _NO_DTYPE, 0, 0, 0, 0, left_s)
            return None if found is None else (heads[found[0]], None)
        tokens, top_k, width = out_TKD.shape
        found = native.take_result(
            wanted, CODES[out_TKD.dtype], width, width * out_TKD.itemsize, out_TKD.data_ptr(), tokens * top_k,
            left_s,
        )  # fmt: skip
        return None if found is None else (heads[found[0]], found[1])


def _until(sent: Sent) -> float:
    return sent.until
