"""Imports point one way, and Ray is known in few places."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moeray

ROOT = Path(moeray.__file__).parent

# Each room may import the rooms named, and always the leaves.
LEAVES = {
    "buffers", "compiled", "config", "settings", "tree", "types", "errors", "metrics", "recorder", "exposition", "logs",
    "threads", "machine",
}  # fmt: skip
ALLOWED = {
    "settings": set(),
    "dashboards": set(),
    "model": set(),
    "wire": set(),
    "control": set(),
    "dispatch": {"model", "wire", "control"},
    "engine": {"dispatch", "model", "wire", "control"},
    "actors": {"engine", "dispatch", "model", "wire", "control"},
    "cluster": {"actors", "engine", "dispatch", "model", "wire", "control"},
}
BELOW = set(ALLOWED["cluster"]) | {"cluster"}
ALLOWED |= {"serve": BELOW, "jobs": BELOW | {"serve"}, "bench": BELOW}
ALLOWED["cli"] = BELOW | {"serve", "jobs", "bench", "dashboards"}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.ImportFrom):
            names.add(f"relative import in {path}")
    return names


def test_imports_point_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        allowed = ALLOWED.get(room, set()) | LEAVES | {room, "__version__"}
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "moeray" and len(parts) > 1 and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if name.startswith("relative"):
                wrong.append(name)
    assert not wrong


def test_every_room_is_covered():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms <= set(ALLOWED)


def test_ray_is_imported_only_where_it_may_be():
    wrong = []
    for path in ROOT.rglob("*.py"):
        where = path.relative_to(ROOT)
        legal = where.parts[0] in {"serve", "jobs", "cli"} or (
            where.parts[0] == "cluster" and where.name.startswith("ray")
        )
        if not legal and any(name == "ray" or name.startswith("ray.") for name in imports_of(path)):
            wrong.append(str(where))
    assert not wrong


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("moeray.cli.main", {"ray", "torch", "transformers"}),
        ("moeray.cluster.ray", {"torch", "transformers"}),  # what every question to a running system goes through
        ("moeray.serve.app", {"torch", "transformers"}),
    ],
)
def test_what_starts_often_imports_nothing_heavy(module, absent):
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
