"""What a check has found, in words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moeray.errors import one_line


class Verdict(StrEnum):
    """`WARN` works, less well than it could; `FAIL` does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """`what` is how it stands, `mend` what to do about it (where there is something to do)."""

    name: str
    verdict: Verdict
    what: str
    mend: str = ""


def ok(name: str, what: str) -> Finding:
    return Finding(name, Verdict.OK, what)


def warn(name: str, what: str, mend: str) -> Finding:
    return Finding(name, Verdict.WARN, what, mend)


def fail(name: str, what: str, mend: str) -> Finding:
    return Finding(name, Verdict.FAIL, what, mend)


def skipped(name: str, why: str) -> Finding:
    return Finding(name, Verdict.SKIPPED, why)


def failed_by(name: str, error: Exception) -> Finding:
    """One of our own errors, whose line says what is wrong, then how to mend it."""
    what, _, mend = one_line(error).rpartition("; ")
    return fail(name, what or mend, mend if what else "")
