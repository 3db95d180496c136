"""The audit log: every decision of the controller with its inputs, one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

from moeray.config import Config, default_cache_dir

log = logging.getLogger(__name__)

KEPT = 100


class Audit:
    """Owned by the controller's loop. `recent` holds the newest entries, for people who ask."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.recent: deque[dict[str, Any]] = deque(maxlen=KEPT)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def last(self, *events: str) -> str | None:
        """Which of these events was written last, by this controller or one before it over the same actors.

        A controller that took nobody over began a system; what the log has from an earlier one of that name is past.
        """
        if self.path is None or not self.path.exists():
            return None
        found = None
        with self.path.open() as file:
            for line in file:
                if '"event": "controller"' in line and not json.loads(line)["adopted"]:
                    found = None
                elif any(f'"event": "{event}"' in line for event in events):
                    found = json.loads(line)["event"]
        return found

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"at": unix seconds, "event": event, ...fields}`; a disk that refuses is reported, not fatal."""
        entry = {"at": round(time.time(), 3), "event": event, **fields}
        self.recent.append(entry)
        if self.path is None:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry, default=str) + "\n")
        except OSError as error:
            log.error("audit log %s cannot be written: %s; set control.audit_log", self.path, error.strerror)


def audit_path(config: Config) -> Path:
    """Where the audit log goes: `control.audit_log`, else a file named after the system in the cache folder."""
    if config.control.audit_log:
        return Path(config.control.audit_log)
    cache = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    return cache / "audit" / f"{config.serve.name}.jsonl"
