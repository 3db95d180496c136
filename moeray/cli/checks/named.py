"""What the config names and an actor would look for at its start: policies, TLS files, a chat template."""

from __future__ import annotations

from collections.abc import Iterator

from moeray.cli.checks.finding import Finding, failed_by, ok
from moeray.config import Config
from moeray.control.deciding import load_policies
from moeray.errors import ConfigError
from moeray.serve.prompt import read_template
from moeray.settings.wire import WireConfig
from moeray.wire.tls import read_credentials


def examine(config: Config) -> Iterator[Finding]:
    """A finding for each that is named."""
    yield policies(config.control.policies)
    if config.wire.tls_cert is not None:
        yield tls(config.wire)
    if config.chat_template is not None:
        yield template(config.chat_template)


def policies(names: tuple[str, ...]) -> Finding:
    try:
        load_policies(names)
    except ConfigError as error:
        return failed_by("policies", error)
    return ok("policies", ", ".join(names) or "none: nothing scales by itself")


def tls(wire: WireConfig) -> Finding:
    try:
        read_credentials(wire)
    except ConfigError as error:
        return failed_by("TLS", error)
    return ok("TLS", ", ".join(path for path in (wire.tls_cert, wire.tls_key, wire.tls_ca) if path))


def template(source: str) -> Finding:
    try:
        read_template(source)
    except ConfigError as error:
        return failed_by("chat template", error)
    return ok("chat template", "a Jinja template")
