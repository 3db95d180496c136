"""The folders of a machine in which its actors listen, and what killed ones have left there."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from moeray.errors import ConfigError
from moeray.machine import machine_dir
from moeray.wire.unix_dial import is_listened_at

FORGOTTEN_S = 600.0
"""Actors of another system look through a folder once nothing has come or gone there for so long."""
BINDING_S = 5.0
"""A socket so young may be one that is not listened at yet."""


def runtime_dir(node_id: str, system: str) -> Path:
    """The private folder (0700) for one node's sockets. Nodes that share a machine get different ones; folders in which
    nobody listens any more are removed.

    Raises ConfigError where there can be none, and where others may write it.
    """
    folder = _folder(node_id, system)
    for path in (machine_dir(), folder):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"no folder {path} for sockets can be made ({error.strerror}); set MOERAY_RUNTIME_DIR to a short "
                "path of a folder that this user may write"
            ) from error
        status = path.stat()
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise ConfigError(
                f"folder {path} must be private to this user (mode 0700); mend it or set MOERAY_RUNTIME_DIR"
            )
    os.utime(folder)
    _remove_forgotten()  # of a system that was killed whole, no actor is left to do it
    return folder


def remove_runtime_dir(node_id: str, system: str) -> None:
    """Remove the folder once the last actor of the node has closed its socket, and folders in which nobody listens:
    an actor that was killed leaves its socket behind."""
    _remove_dead(_folder(node_id, system))
    _remove_forgotten()


def _remove_forgotten() -> None:
    for folder in machine_dir().glob("*-*"):
        with suppress(OSError):  # another actor was faster
            if time.time() - folder.stat().st_mtime > FORGOTTEN_S:
                _remove_dead(folder)


def _folder(node_id: str, system: str) -> Path:
    return machine_dir() / f"{node_id[:12]}-{system[:8]}"


def _remove_dead(folder: Path) -> None:
    with suppress(OSError):  # somebody listens there, or another actor was faster
        for path in folder.glob("*.sock"):
            if not _is_dead(path):
                return
            path.unlink()
        folder.rmdir()


def _is_dead(path: Path) -> bool:
    return time.time() - path.stat().st_mtime >= BINDING_S and not is_listened_at(str(path))
