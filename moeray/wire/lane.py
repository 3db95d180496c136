"""What a channel's end knows of its socket and memory, in structures that the compiled part reads and writes too
(`native/lane.h`): a layer's messages are sent and taken there without a line of Python for each.

Both sides change them while they hold the interpreter's lock, and the compiled part leaves alone what is `busy`.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, addressof, c_int64, c_void_p, pointer


class Ring(Structure):
    """Shared memory as its writer or its reader sees it.

    `progress`: address of the number that says how far the reader is. `done`: that number as it was last seen (writer)
    or written (reader). `head`: how far was written (writer), or where the payload that is held ends (reader). `start`:
    where the writer began when the ring was last empty; nothing before that is still to be read.
    """

    _fields_ = (
        ("memory", c_void_p), ("capacity", c_int64), ("progress", c_void_p), ("head", c_int64), ("done", c_int64),
        ("start", c_int64),
    )  # fmt: skip
    memory: int
    capacity: int
    progress: int
    head: int
    done: int
    start: int


class Lane(Structure):
    """`fd`: the socket, -1 once it is closed. `busy`: a thread sends, or a message has not gone out whole.

    `buffer`: `room` bytes, of which [start, end) are received and not yet read; start is a multiple of 64. `message`:
    memory of `message_room` bytes for a message on its way out; of the last one, [unsent_from, unsent_to) has not gone
    out. `reading`: a frame has been read in part, and receiver.py goes on with it. `out`, `inward`: the rings,
    where there are any. `most_header`, `most_payload`: limits in bytes. `ring_from`: payloads of so many bytes go
    through the ring.
    """

    _fields_ = (
        ("fd", c_int64), ("busy", c_int64), ("buffer", c_void_p), ("room", c_int64), ("start", c_int64),
        ("end", c_int64), ("message", c_void_p), ("message_room", c_int64), ("unsent_from", c_int64),
        ("unsent_to", c_int64), ("reading", c_int64), ("out", POINTER(Ring)), ("inward", POINTER(Ring)),
        ("most_header", c_int64), ("most_payload", c_int64), ("ring_from", c_int64),
    )  # fmt: skip
    fd: int
    busy: int
    buffer: int
    room: int
    start: int
    end: int
    message: int
    message_room: int
    unsent_from: int
    unsent_to: int
    reading: int
    most_header: int
    most_payload: int
    ring_from: int

    @property
    def address(self) -> int:
        """Where the structure lies."""
        return addressof(self)

    def join(self, out: Ring | None, inward: Ring | None) -> None:
        """Use these rings. The caller keeps them alive as long as the lane."""
        if out is not None:
            self.out = pointer(out)
        if inward is not None:
            self.inward = pointer(inward)
