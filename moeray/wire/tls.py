"""The files of TLS between nodes."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from moeray.errors import ConfigError
from moeray.settings.wire import WireConfig


class Credentials(NamedTuple):
    """Contents of PEM files. Without an `authority` of its own a cluster shares one certificate, which vouches for
    itself."""

    cert: bytes
    key: bytes
    authority: bytes | None


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


def _read(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"config key wire.{key}: cannot read {path} ({error.strerror}); check the path") from error
