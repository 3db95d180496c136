"""No test sees a Ray cluster of this machine's user, nor leaves a trace of its own where others look."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before anything imports Ray. Short: the paths of Ray's sockets lie below it, and may have 107 bytes.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="m", dir="/tmp")
os.environ.pop("RAY_ADDRESS", None)
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)
