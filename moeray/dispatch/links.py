"""A dispatcher's channels to expert actors, and how fast each one answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from moeray.dispatch.deadline import Latency, deadline_s, observed, timed_out
from moeray.dispatch.view import PlacementView
from moeray.errors import ChannelClosedError
from moeray.types import Address
from moeray.wire.channel import Channel

Connect = Callable[[Address], Channel]


class UnknownActorError(LookupError):
    """The newest placement does not know the actor any more."""


@dataclass
class _Link:
    address: Address
    channel: Channel | None = None
    latency: Latency = field(default_factory=Latency)
    served: dict[int, set[int]] = field(default_factory=dict)


class Links:
    """Owned by a dispatcher's thread; only `cut` and `cut_all` are called by others, to wake that thread.

    What is known of an actor outlives its channel, but not the actor's name in the placement, nor its address.
    """

    def __init__(self, view: PlacementView, connect: Connect) -> None:
        self._view = view
        self._connect = connect
        self._links: dict[str, _Link] = {}
        self._lock = threading.Lock()  # guards every link's channel, and the list of threads
        self._hanging_up: list[threading.Thread] = []
        self._version = -1
        view.subscribe(self.cut)

    def holds(self, actor_id: str, channel: Channel) -> bool:
        """Whether the actor is still spoken to on this channel."""
        link = self._links.get(actor_id)
        return link is not None and link.channel is channel

    def open_channel(self, actor_id: str) -> Channel | None:
        """The channel on which a frame can go out without dialling first; None where there is none, or the actor is
        named dead or elsewhere."""
        link, now = self._links.get(actor_id), self._view.now
        if link is None or link.channel is None or link.channel.closed or actor_id in now.dead:
            return None
        return link.channel if now.addresses.get(actor_id) == link.address else None

    def channel(self, actor_id: str) -> Channel:
        """The actor's channel, dialled where there is none. Raises UnknownActorError, and WireError as `connect`."""
        address = self._view.now.addresses.get(actor_id)
        if address is None:
            raise UnknownActorError(actor_id)
        link = self._links.get(actor_id)
        if link is None or link.address != address:
            self.drop(actor_id)
            with self._lock:
                link = self._links[actor_id] = _Link(address)
        channel = link.channel  # whoever cuts it meanwhile closes it, so that using it fails
        if channel is None or channel.closed:
            self.drop(actor_id)
            channel = self._connect(address)
            with self._lock:
                link.channel = channel
        self.check(actor_id)  # it may have been named dead while it was dialled, when there was nothing to cut
        return channel

    def check(self, actor_id: str) -> None:
        """Raise ChannelClosedError where it would be in vain to wait for the actor."""
        if actor_id in self._view.now.dead:
            raise ChannelClosedError(f"{actor_id} is dead, says the controller")

    def cut(self, actors: Sequence[str]) -> None:
        """Close the channels to dead actors, from any thread."""
        for actor_id in actors:
            self.drop(actor_id)

    def cut_all(self) -> None:
        """Close every channel, from any thread."""
        with self._lock:
            actors = list(self._links)
        self.cut(actors)

    def drop(self, actor_id: str) -> None:
        """Close the actor's channel, if there is one, in a thread of its own: across nodes, a peer that does not
        answer makes that take a second."""
        with self._lock:
            link = self._links.get(actor_id)
            if link is None or link.channel is None:
                return
            channel, link.channel = link.channel, None
            thread = threading.Thread(target=channel.close, name=f"hang-up-{actor_id}", daemon=True)
            self._hanging_up = [*(t for t in self._hanging_up if t.is_alive()), thread]
            thread.start()

    def sweep(self) -> None:
        """Forget actors that the placement no longer knows. Called while nothing is in flight."""
        now = self._view.now
        if now.version == self._version:
            return
        self._version = now.version
        for actor_id in [actor for actor in self._links if actor not in now.addresses]:
            self.drop(actor_id)
            with self._lock:
                del self._links[actor_id]

    def deadline_s(self, actor_id: str, layer: int, experts: Iterable[int], rows: int, most_s: float) -> float:
        """Seconds that the actor has for a forward."""
        link = self._links[actor_id]
        fresh = not link.served.get(layer, set()).issuperset(experts)
        return deadline_s(link.latency, rows, fresh=fresh, most_s=most_s)

    def answered(self, actor_id: str, layer: int, experts: Iterable[int], rows: int, seconds: float) -> None:
        link = self._links[actor_id]
        link.latency = observed(link.latency, rows, seconds)
        link.served.setdefault(layer, set()).update(experts)

    def late(self, actor_id: str) -> None:
        """The actor missed a deadline; should it turn out to be alive, the next one is twice as long."""
        link = self._links.get(actor_id)
        if link is not None:
            link.latency = timed_out(link.latency)

    def close(self) -> None:
        """Close every channel."""
        self._view.unsubscribe(self.cut)
        for actor_id in self._links:
            self.drop(actor_id)
        for thread in self._hanging_up:
            thread.join(timeout=5.0)
        self._links.clear()
