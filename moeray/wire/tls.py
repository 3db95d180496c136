"""The files of TLS between nodes, which may be replaced while connections are made."""

from __future__ import annotations

import logging
import ssl
import threading
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from moeray.errors import ConfigError
from moeray.settings.wire import WireConfig

log = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]
"""Of a file: when it was written, its length, and which one it is."""
_READS = 3
"""So often are files read at most that are replaced meanwhile."""


class Credentials(NamedTuple):
    """Contents of PEM files. Without an `authority` of its own a cluster shares one certificate, which vouches for
    itself."""

    cert: bytes
    key: bytes
    authority: bytes | None


class CredentialFiles:
    """Those of a process's connections. Each new one goes by the files as they are then; any thread may ask."""

    def __init__(self, cert: str, key: str, authority: str | None) -> None:
        self._wire = WireConfig(tls_cert=cert, tls_key=key, tls_ca=authority)
        self._paths = [path for path in (cert, key, authority) if path is not None]
        self._lock = threading.Lock()
        self._held: Credentials | None = None
        self._held_stamps: list[_Stamp | None] = []
        self._refused_stamps: list[_Stamp | None] = []

    def current(self) -> Credentials:
        """What is in the files, the same object for as long as they are. Where they do not go together, as in the
        midst of their replacement, what was in them before, and a warning. Raises ConfigError as `read_credentials`
        where there was nothing before."""
        with self._lock:
            stamps = self._stamps()
            if self._held is not None and stamps == self._held_stamps:
                return self._held
            try:
                self._held, self._held_stamps = self._read(stamps)
            except ConfigError as error:
                if self._held is None:
                    raise
                if stamps != self._refused_stamps:
                    log.warning("new connections go by the TLS files as they were before: %s", error)
                    self._refused_stamps = stamps
            return self._held

    def _read(self, before: list[_Stamp | None]) -> tuple[Credentials, list[_Stamp | None]]:
        reads = 0
        while True:
            found, after = read_credentials(self._wire), self._stamps()
            assert found is not None
            reads += 1
            if after == before or reads == _READS:
                return found, before
            before = after

    def _stamps(self) -> list[_Stamp | None]:
        return [_stamp(path) for path in self._paths]


def credential_files(wire: WireConfig) -> CredentialFiles | None:
    """Those that are configured, None where none are."""
    if wire.tls_cert is None or wire.tls_key is None:
        return None
    return _files(wire.tls_cert, wire.tls_key, wire.tls_ca)


@lru_cache(16)
def _files(cert: str, key: str, authority: str | None) -> CredentialFiles:
    return CredentialFiles(cert, key, authority)


def read_credentials(wire: WireConfig) -> Credentials | None:
    """Those that are configured, None where none are. Raises ConfigError, with the config key, for a file that cannot
    be read or holds something else, and for a key that is another certificate's."""
    if wire.tls_cert is None or wire.tls_key is None:
        return None
    cert, key = _read(wire.tls_cert, "tls_cert"), _read(wire.tls_key, "tls_key")
    authority = None if wire.tls_ca is None else _read(wire.tls_ca, "tls_ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(wire.tls_cert, wire.tls_key, password="")  # without one OpenSSL asks at the terminal
    except ssl.SSLError as error:
        raise ConfigError(
            f"config key wire.tls_cert: {wire.tls_cert} and {wire.tls_key} are no certificate and its key in PEM form "
            f"({error.reason or error}); name files that go together"
        ) from error
    if wire.tls_ca is not None:
        try:
            context.load_verify_locations(wire.tls_ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"config key wire.tls_ca: {wire.tls_ca} holds no certificate in PEM form ({error.reason or error}); "
                "name the authority's"
            ) from error
    return Credentials(cert, key, authority)


def _stamp(path: str) -> _Stamp | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"config key wire.{key}: cannot read {path} ({error.strerror}); check the path") from error
