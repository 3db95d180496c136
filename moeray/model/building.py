"""Where actors share a process, their models are built one after the other."""

from __future__ import annotations

import threading

BUILDING = threading.RLock()
"""Held while transformers builds a model: it sets torch's default dtype, which is that of the whole process, and what
else is built or tried out meanwhile would come out in another dtype than its own."""
