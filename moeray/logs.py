"""Logging of a process: one line a record on stderr, as text or JSON, which says who speaks and of which request.

What is known of the process (`setup_logging`), of the HTTP request at hand (`REQUEST_ID`) and of the record (`extra`)
are the fields of a line. JSON has them all, text the few that place it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

from moeray.config import Config, load_config

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the HTTP request that the running task is for."""
REQUESTS = "moeray.requests"
"""The logger of the lines that each request has; `log_requests: false` keeps those below WARNING back."""

Field = object | Callable[[], object]

_PLACING = ("actor", "epoch", "request_id")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(config: Config | None = None, **process: Field) -> None:
    """Send moeray's records to stderr as the config says (None: the default one). Called by a process's owner.

    `process` says what it is (`actor`, `group`, `kind`, `node`, `epoch`); what can change is a function, and None is
    left out.
    """
    config = config or load_config()
    # Not sys.stderr where that was replaced: Serve would wrap our lines in its own.
    handler = logging.StreamHandler(sys.__stderr__ or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if config.log_format == "json" else TextFormatter(process))
    logger = logging.getLogger("moeray")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(config.log_level.upper())
    logging.getLogger(REQUESTS).setLevel(logging.NOTSET if config.log_requests else logging.WARNING)
    # transformers prints whole configs at INFO and warnings about choices that are not the user's.
    logging.getLogger("transformers").setLevel(logging.ERROR)


def change_logging(config: Config) -> None:
    """Go by a newer config, as the process that `setup_logging` was told of."""
    formatter = logging.getLogger("moeray").handlers[0].formatter
    assert isinstance(formatter, _Formatter), "setup_logging comes first"
    setup_logging(config, **formatter.process)


def log_names(sequence: str, origin: str) -> dict[str, object]:
    """The fields (`extra`) by which lines name a sequence: by the HTTP request that it is for, and by itself."""
    return {"request_id": origin or sequence, "sequence": sequence}


class _Formatter(logging.Formatter):
    def __init__(self, process: Mapping[str, Field]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.process = process

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """RFC 3339 in UTC, with milliseconds."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """Of the process, then of the request at hand, then of the record itself, which knows best.

        What other libraries (Ray) hang on every record for themselves begins with `_`.
        """
        known = {name: value() if callable(value) else value for name, value in self.process.items()}
        known["request_id"] = REQUEST_ID.get()
        known |= {name: value for name, value in vars(record).items() if name not in _STANDARD and name[0] != "_"}
        return {name: value for name, value in known.items() if value is not None}


class TextFormatter(_Formatter):
    """`TIME LEVEL LOGGER: MESSAGE [actor=... epoch=... request_id=...]`, then the traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        placing = " ".join(f"{name}={fields[name]}" for name in _PLACING if name in fields)
        return super().formatMessage(record) + (f" [{placing}]" if placing else "")


class JsonFormatter(_Formatter):
    """An object a line: `time`, `level`, `logger`, `message`, the fields, and the traceback as `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
