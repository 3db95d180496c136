"""How compute threads wait. A router and its experts take turns on the same cores, so a thread that has nothing to do
must not spin on a core that another process computes on: libgomp's threads then run for milliseconds in vain.

libgomp reads its settings when it is loaded, so they are set before torch is imported.
"""

from __future__ import annotations

import os

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Environment of every process that computes."""


def wait_passively() -> None:
    """Set `PASSIVE` where the user has not chosen otherwise, for this process and its children."""
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)
