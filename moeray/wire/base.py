"""What both channels are: their protocol, and the limits of their frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from moeray.settings.wire import WireConfig
from moeray.wire.frame import Frame, Limits
from moeray.wire.row_message import Place, RowMessage

if TYPE_CHECKING:
    from moeray.wire.device_rings import DeviceRings

# Before its proof a peer may send one small header and no payload.
UNAUTHENTICATED = Limits(max_header_bytes=4096, max_payload_bytes=0)


T = TypeVar("T")


class Channel(Protocol):
    """Frames both ways with one authenticated peer.

    Any thread may send; one thread at a time receives. Tensors of a received frame are valid until the next `recv` on
    the channel: they may be views of shared memory or of a reused buffer, so whoever keeps them clones.
    """

    send_timeout_s: float

    @property
    def kind(self) -> str:
        """`unix`, `tcp` or `grpc`."""

    @property
    def peer(self) -> str:
        """The actor id of the other side."""

    @property
    def lane(self) -> int:
        """Address of the end's `Lane`, where the compiled part may send and take rows on its own; 0 where it may not.
        It stays valid as long as the channel object."""

    @property
    def device(self) -> DeviceRings | None:
        """Rings on a device that rows may go by (`device_rows.py`), where both sides have them; closed with the
        channel."""

    @property
    def room(self) -> int:
        """Bytes that go out before the peer reads, each way, as far as that is known."""

    @property
    def most_payload_bytes(self) -> int:
        """Of a frame, each way: both sides go by the same `wire.max_payload_bytes`."""

    @property
    def closed(self) -> bool:
        """True once either side is known to be gone."""

    def send(self, frame: Frame) -> None:
        """Hand one frame over.

        Raises WireError for a frame that cannot be sent (the channel stays open), ChannelClosedError, and
        ChannelTimeoutError when the peer does not read for `send_timeout_s`; that frame may still arrive later, whole.
        """

    def send_rows(self, rows: RowMessage) -> None:
        """Hand a layer's rows or their outputs over, as `send` does with their frame, in less time."""

    def place_outputs(self, nbytes: int) -> Place | None:
        """Shared memory for the next RESULT's outputs, which are spared a copy there; None where there is none.

        Until it is sent, nothing else may be sent on the channel: payloads are read in the order of their places.
        """

    def recv(self, timeout: float | None = None) -> Frame:
        """The next frame; waits `timeout` seconds, or for ever where it is None.

        Raises ChannelTimeoutError (the channel stays usable, also when half a frame had come), ChannelClosedError, and
        WireError for bytes that are no frame, after which the channel is closed.
        """

    def release(self) -> None:
        """The last frame's tensors are read no more: their memory may be used for the next before that is received. For
        the thread that receives."""

    def on_lane(self, use: Callable[[int], T]) -> T | None:
        """Call it with `lane`, while nobody else receives on this end, nor closes it; None where there is none.

        Raises ChannelClosedError. It may receive, and send as anybody may.
        """

    def flush(self) -> None:
        """Send what is left of a message that the part in C has sent in part. Raises as `send` does."""

    def close(self) -> None:
        """End the channel and wake whoever waits on it, on either side. A second call does nothing."""


def limits_of(wire: WireConfig) -> Limits:
    """The limits of authenticated frames."""
    return Limits(wire.max_header_bytes, wire.max_payload_bytes)
