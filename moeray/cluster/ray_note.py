"""A note that an actor leaves with Ray's head (GCS) for its own next life, as Serve's controller does for its own.

Ray starts an actor again under the same id, so an actor that somebody starts anew finds nothing under its own.
"""

from __future__ import annotations

import logging
import threading

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import RayError

from moeray.errors import MoerayError, one_line

log = logging.getLogger(__name__)

_SPACE = b"moeray"
TIMEOUT_S = 5.0
RETRY_S = 5.0


class RayNote:
    """One key of the GCS's. It is written by a thread of its own, since a GCS may be away for minutes: then what came
    last is written when it is back."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._changed = threading.Condition()
        self._unwritten: bytes | None = None
        self._closed = False
        self._writer = threading.Thread(target=self._write_all, name="ray-note", daemon=True)
        self._writer.start()

    def write(self, note: bytes) -> None:
        """In place of the one before. Returns at once."""
        with self._changed:
            self._unwritten = note
            self._changed.notify()

    def read(self) -> bytes | None:
        """The one written last, by this process or by one of the actor's earlier lives. Raises MoerayError where the
        GCS does not answer."""
        try:
            note: bytes | None = self._gcs.internal_kv_get(self._key, namespace=_SPACE, timeout=TIMEOUT_S)
        except RayError as error:
            raise MoerayError(
                f"Ray's head does not say what was kept there ({one_line(error)[:200]}); see whether it runs"
            ) from error
        return note

    def close(self) -> None:
        """Remove it, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._writer.join(TIMEOUT_S + RETRY_S)
        try:
            self._gcs.internal_kv_del(self._key, False, namespace=_SPACE, timeout=TIMEOUT_S)
        except RayError as error:
            log.warning("what Ray's head keeps for this actor stays there: %s", one_line(error)[:200])

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._unwritten is not None)
                if self._closed:
                    return
                note, self._unwritten = self._unwritten, None
            try:
                self._gcs.internal_kv_put(self._key, note, True, namespace=_SPACE, timeout=TIMEOUT_S)
            except RayError as error:
                log.warning("Ray's head does not keep what is wanted of the system: %s", one_line(error)[:200])
                with self._changed:
                    self._unwritten = self._unwritten or note
                    self._changed.wait_for(lambda: self._closed, RETRY_S)
