"""Where processes of one user meet on a machine. Imports nothing heavy: it is on the path of every actor's start."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def machine_dir() -> Path:
    """This user's folder for what all processes of the machine share: in MOERAY_RUNTIME_DIR, else in XDG_RUNTIME_DIR
    while that exists (a user's last logout removes it), else among the temporary files."""
    base = os.environ.get("MOERAY_RUNTIME_DIR")
    session = os.environ.get("XDG_RUNTIME_DIR")
    if not base and session and Path(session).is_dir():
        base = session
    return Path(base or tempfile.gettempdir()) / f"moeray-{os.getuid()}"
