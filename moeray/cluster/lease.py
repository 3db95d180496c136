"""How long something lives on of which nobody has asked that it should."""

from __future__ import annotations

import time
from collections.abc import Callable


class Lease:
    """Lasts for `seconds` after it was last renewed. Its owner looks at it every `look_s` seconds.

    Where the owner was away for longer (its process was stopped, or its machine), those who renew waited for it, too:
    they have until the next look.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._renewed = self._looked = clock()
        self.look_s = seconds / 4
        self.was_renewed = False

    def renew(self) -> None:
        """Any thread may."""
        self._renewed, self.was_renewed = self._clock(), True

    def expired(self) -> bool:
        """Whether nobody has renewed it for so long."""
        now = self._clock()
        away, self._looked = now - self._looked > 2 * self.look_s, now
        return not away and now - self._renewed > self._seconds
