"""Logging of a process: one line a record on stderr, as text or JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Literal

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def setup_logging(log_format: Literal["text", "json"] = "text", level: str | None = None) -> None:
    """Send moeray's records to stderr, at `level` or MOERAY_LOG_LEVEL (default INFO). Called by a process's owner."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logger = logging.getLogger("moeray")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level or os.environ.get("MOERAY_LOG_LEVEL", "INFO").upper())
    # transformers prints whole configs at INFO and warnings about choices that are not the user's.
    logging.getLogger("transformers").setLevel(logging.ERROR)
