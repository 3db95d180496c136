"""Python, packages and kernels: whether what is installed is what the package asks for."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moeray.cli.checks.finding import Finding, fail, ok, warn

_SHOWN = ("torch", "transformers", "ray")


def python(version: str, wanted: str) -> Finding:
    """`wanted` is the package's Requires-Python."""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok("python", version)
    return fail("python", f"{version}; moeray needs {wanted}", "install moeray into an environment of such a Python")


def packages(requirements: Iterable[str], installed: Callable[[str], str | None]) -> Finding:
    """`requirements` are the package's own metadata; `installed` gives a distribution's version, None where absent."""
    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    versions = {r.name: installed(r.name) for r in needed}
    wrong = [r for r in needed if not _fits(r, versions[r.name])]
    if wrong:
        names = ", ".join(f"{r.name} {versions[r.name] or 'is missing'} ({r.specifier})" for r in wrong)
        mend = "pip install " + " ".join(shlex.quote(f"{r.name}{r.specifier}") for r in wrong)
        return fail("packages", f"not as moeray asks: {names}", mend)
    shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    return ok("packages", f"{shown}; all {len(needed)} as asked for")


def _fits(requirement: Requirement, version: str | None) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def kernels(instructions: str | None, wanted: str) -> Finding:
    """`instructions`: the set that the compiled kernels use here, None where there are none. `wanted`: the config's
    `experts.kernel`."""
    if instructions is not None:
        what = f"compiled; they use {instructions.lower()}"
        if instructions == "PORTABLE":
            return warn("kernels", what, "a CPU with AVX2 or AVX-512 computes experts many times faster")
        return ok("kernels", what)
    mend = "install moeray again where there is a C compiler (gcc): pip install --force-reinstall --no-deps moeray"
    if wanted == "native":
        return fail("kernels", "not compiled, and experts.kernel is native", mend)
    return warn("kernels", "not compiled: CPU experts run on torch, slower", mend)
