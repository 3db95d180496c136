"""The audit log: every decision of the controller with its inputs, one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from moeray.config import Config
from moeray.errors import ConfigError

log = logging.getLogger(__name__)

KEPT = 100


class Audit:
    """Owned by the controller's loop. `recent` holds the newest entries, for people who ask."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.recent: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def check(self) -> None:
        """For a system that does not run yet. Raises ConfigError where there can be no folder for the file."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"no audit log can be kept in {self.path.parent} ({error.strerror}); set cache_dir (or "
                "MOERAY_CACHE_DIR) to a folder that this user may write, or control.audit_log"
            ) from error

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"at": unix seconds, "event": event, ...fields}`; a disk that refuses is reported, not fatal."""
        entry = {"at": round(time.time(), 3), "event": event, **fields}
        self.recent.append(entry)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it since
            with self.path.open("ab+") as file:
                end = b"\n" if _is_torn(file) else b""
                file.write(end + json.dumps(entry, default=str).encode() + b"\n")
        except OSError as error:
            log.error("audit log %s cannot be written: %s; set control.audit_log", self.path, error.strerror)


def _is_torn(file: BinaryIO) -> bool:
    """Whether the last line has no end: the disk was full, or the machine went down. `file` stands at its end."""
    if not file.tell():
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def audit_path(config: Config) -> Path:
    """Where the audit log goes: `control.audit_log`, else a file named after the system in the cache folder."""
    if config.control.audit_log:
        return Path(config.control.audit_log)
    return config.cache_folder / "audit" / f"{config.serve.name}.jsonl"
