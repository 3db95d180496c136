"""A dispatcher's channels to expert actors, and how fast each one answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moeray.dispatch.deadline import Latency, deadline_s, dial_s, observed, timed_out
from moeray.dispatch.pieces import rows_of_a_frame
from moeray.dispatch.view import PlacementView, Usable
from moeray.errors import ChannelClosedError, WireError
from moeray.types import Address
from moeray.wire.channel import Channel

Connect = Callable[[Address, float], Channel]
"""Called with how many seconds it may take."""

MAX_DIALS = 32
"""So many at a time: hundreds would keep each other waiting for the interpreter until they count as late."""


class Open(NamedTuple):
    """Of several actors: the channel on which a frame can go out to each without dialling first, its lane and its kind;
    None, 0 and no kind where there is none, or the actor is named dead or elsewhere."""

    channels: list[Channel | None]
    lanes: list[int]
    kinds: list[str]


class UnknownActorError(LookupError):
    """The newest placement does not know the actor any more."""


@dataclass(eq=False)
class _Link:
    """`dialling`: the thread that is to bring the channel, or else the `error`."""

    address: Address
    channel: Channel | None = None
    dialling: threading.Thread | None = None
    error: Exception | None = None
    latency: Latency = field(default_factory=Latency)
    served: dict[int, set[int]] = field(default_factory=dict)


class Links:
    """Owned by a dispatcher's thread; only `expect`, `cut` and `cut_all` are called by others.

    What is known of an actor outlives its channel, but not the actor's name in the placement, nor its address.
    """

    def __init__(self, view: PlacementView, connect: Connect) -> None:
        self._view = view
        self._connect = connect
        self._links: dict[str, _Link] = {}
        self._changed = threading.Condition()  # guards every link's channel and dialling, and the list of threads
        self._threads: list[threading.Thread] = []
        self._dials = threading.Semaphore(MAX_DIALS)
        self._version = -1
        self._closed = False
        self._edition = 0  # of the channels
        self._opened = Open([], [], [])
        self._opened_for: tuple[Usable, int, list[str]] | None = None
        view.subscribe(self.cut)

    def expect(self, addresses: Mapping[str, Address], within_s: float) -> None:
        """Dial those that were never spoken to, and wait for so long at most: from any thread, before a placement names
        them, so that no step waits for what can be done beside it."""
        with self._changed:
            if self._closed:
                return
            new = {actor_id: _Link(where) for actor_id, where in addresses.items() if actor_id not in self._links}
            self._links.update(new)
            for actor_id, link in new.items():
                self._dial_if_due(actor_id, link)
            self._changed.wait_for(lambda: all(link.dialling is None for link in new.values()), within_s)

    def holds(self, actor_id: str, channel: Channel) -> bool:
        """Whether the actor is still spoken to on this channel."""
        link = self._links.get(actor_id)
        return link is not None and link.channel is channel

    def open_channels(self, actors: list[str]) -> Open:
        """Those of these actors, the same as before where nothing has changed."""
        seen = (self._view.now, self._edition, actors)
        if seen != self._opened_for:
            channels = [self._open_channel(actor_id) for actor_id in actors]
            lanes = [0 if channel is None else channel.lane for channel in channels]
            self._opened = Open(channels, lanes, ["" if channel is None else channel.kind for channel in channels])
            self._opened_for = seen
        return self._opened

    def _open_channel(self, actor_id: str) -> Channel | None:
        link, now = self._links.get(actor_id), self._view.now
        channel = link.channel if link is not None else None  # another thread may cut it meanwhile
        if link is None or channel is None or channel.closed or actor_id in now.dead:
            return None
        return channel if now.addresses.get(actor_id) == link.address else None

    def dialled(self, actors: Iterable[str]) -> Iterator[str]:
        """The actors, as soon as there is a channel to each, or none to be had. All are dialled at the same time."""
        left = list(actors)
        for actor_id in left:
            if (address := self._view.now.addresses.get(actor_id)) is not None:
                self._reach(actor_id, address)
        while left:
            with self._changed:
                while not (ended := [actor_id for actor_id in left if not self._expects(actor_id)]):
                    self._changed.wait()
            left = [actor_id for actor_id in left if actor_id not in ended]
            yield from ended

    def channel(self, actor_id: str) -> Channel:
        """The channel to an actor that was dialled. Raises UnknownActorError, WireError as `connect`, and at once where
        the actor was named dead meanwhile."""
        link = self._links.get(actor_id)
        if link is None or self._view.now.addresses.get(actor_id) != link.address:
            raise UnknownActorError(actor_id)
        self.check(actor_id)
        channel = link.channel  # whoever cuts it meanwhile closes it, so that using it fails
        if channel is None:
            raise link.error or ChannelClosedError(f"{actor_id} was given up while it was dialled")
        return channel

    def room(self, actor_id: str) -> int:
        """Bytes that the actor's channel takes before they are read; 0 where there is none."""
        link = self._links.get(actor_id)
        channel = link.channel if link is not None else None
        return channel.room if channel is not None else 0

    def most_rows(self, actor_id: str, row_bytes: int) -> int | None:
        """How many rows a frame to the actor carries, None where there is no channel."""
        link = self._links.get(actor_id)
        channel = link.channel if link is not None else None
        return rows_of_a_frame(row_bytes, channel.most_payload_bytes) if channel is not None else None

    def _expects(self, actor_id: str) -> bool:
        """Whether it is worth waiting for a channel to it."""
        link, now = self._links.get(actor_id), self._view.now
        return link is not None and link.dialling is not None and actor_id not in now.dead

    def _reach(self, actor_id: str, address: Address) -> None:
        """See to it that there is a channel, or one on its way."""
        link = self._links.get(actor_id)
        if link is not None and (link.address != address or (link.channel is not None and link.channel.closed)):
            self.drop(actor_id)
        with self._changed:
            link = self._links.get(actor_id)
            if link is None or link.address != address:
                link = self._links[actor_id] = _Link(address)
            self._dial_if_due(actor_id, link)

    def _dial_if_due(self, actor_id: str, link: _Link) -> None:
        """The lock is held."""
        if link.channel is None and link.dialling is None:
            link.dialling = self._start(f"dial-{actor_id}", self._dial, link, dial_s(link.latency))
            if link.dialling is None:
                link.error = ChannelClosedError(f"{actor_id} cannot be dialled without a thread; raise `ulimit -u`")

    def _dial(self, link: _Link, seconds: float) -> None:
        """In a thread of its own: a process that is stopped lets one in, and never says a word."""
        channel, error = None, None
        try:
            with self._dials:
                channel = self._connect(link.address, seconds)
        except WireError as failure:
            error = failure
        except Exception as failure:  # for whoever needs the channel it is one that cannot be had
            error = ChannelClosedError(f"{link.address.actor_id} cannot be dialled: {failure!r}")
            error.__cause__ = failure
        with self._changed:
            wanted = link.dialling is threading.current_thread()
            if wanted:
                link.channel, link.error, link.dialling = channel, error, None
                self._edition += 1
                self._changed.notify_all()
        if channel is not None and not wanted:
            channel.close()

    def _start(self, name: str, target: Callable[..., None], *args: Any) -> threading.Thread | None:
        """A thread that `close` joins; None where none can be had. The lock is held."""
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return None
        self._threads = [*(t for t in self._threads if t.is_alive()), thread]
        return thread

    def check(self, actor_id: str) -> None:
        """Raise ChannelClosedError where it would be in vain to wait for the actor."""
        if actor_id in self._view.now.dead:
            raise ChannelClosedError(f"{actor_id} is dead, says the controller")

    def cut(self, actors: Sequence[str]) -> None:
        """Close the channels to dead actors, and dial them no longer, from any thread."""
        for actor_id in actors:
            self.drop(actor_id)

    def cut_all(self) -> None:
        """Close every channel, from any thread."""
        with self._changed:
            actors = list(self._links)
        self.cut(actors)

    def drop(self, actor_id: str) -> None:
        """Close the actor's channel, if there is one, in a thread of its own: across nodes, a peer that does not
        answer makes that take a second."""
        with self._changed:
            if (link := self._links.get(actor_id)) is None:
                return
            channel, link.channel, link.dialling, link.error = link.channel, None, None, None
            self._edition += 1
            self._changed.notify_all()
            if channel is None or self._start(f"hang-up-{actor_id}", channel.close):
                return
        channel.close()  # in this one, for lack of another

    def sweep(self) -> None:
        """Forget actors that the placement no longer knows. Called while nothing is in flight."""
        now = self._view.now
        if now.version == self._version:
            return
        self._version = now.version
        for actor_id in [actor for actor in list(self._links) if actor not in now.addresses]:
            self.drop(actor_id)
            with self._changed:
                del self._links[actor_id]

    def deadline_s(self, actor_id: str, layer: int, experts: Iterable[int], rows: int, most_s: float) -> float:
        """Seconds that the actor has for a forward."""
        link = self._links[actor_id]
        fresh = not link.served.get(layer, set()).issuperset(experts)
        return deadline_s(link.latency, rows, fresh=fresh, most_s=most_s)

    def answered(self, actor_id: str, layer: int, experts: Iterable[int], rows: int, seconds: float) -> None:
        """The actor took so long for a forward; it may be known no longer."""
        if (link := self._links.get(actor_id)) is None:
            return
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
        with self._changed:
            self._closed = True
        for actor_id in self._links:
            self.drop(actor_id)
        for thread in self._threads:
            thread.join(timeout=5.0)
        self._links.clear()
