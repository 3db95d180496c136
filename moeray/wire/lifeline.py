"""How the owner of memory learns that its reader has let go of it, or is dead: a pipe that the reader holds open.

A process that ends in any way closes it. Both are of one node and see each other's processes, as CUDA's own handles
want it.
"""

from __future__ import annotations

import os
import re
import select

from moeray.errors import WireError

_PATH = re.compile(r"/proc/\d+/fd/\d+")


class Lifeline:
    """The owner's end. `path`: by which the reader takes hold, before `handed_over`."""

    def __init__(self) -> None:
        """Raises WireError where there is no descriptor left."""
        try:
            self._owner, self._held = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise WireError(f"no pipe for a channel's device memory ({error.strerror}); raise `ulimit -n`") from error
        self.path = f"/proc/{os.getpid()}/fd/{self._held}"

    def handed_over(self) -> None:
        """Whoever was to take hold has done so, or never will. A second call does nothing."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    @property
    def cut(self) -> bool:
        """Nobody holds it any more; for `handed_over` ones."""
        poller = select.poll()
        poller.register(self._owner, 0)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Once."""
        self.handed_over()
        os.close(self._owner)


def take_hold(path: str) -> int:
    """The reader's end, a descriptor to be closed when the memory is used no more. Raises WireError."""
    if not _PATH.fullmatch(path):
        raise WireError("the peer names a lifeline that is none")
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise WireError(
            f"the peer's process is not seen here ({error.strerror}); run the node's actors in one container"
        ) from error
