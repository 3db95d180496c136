"""The commands in the docs: each one parses, and each link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from moeray.cli.main import cli

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DOCS += sorted(path for room in ("moeray", "deploy", "dashboards") for path in (ROOT / room).glob("**/*.md"))
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\((?!https?://)([^)#]+)")


def blocks(path: Path) -> list[str]:
    """The bash blocks of a doc, each command on one line."""
    return [block.replace("\\\n", " ") for block in _BLOCK.findall(path.read_text())]


def commands(path: Path) -> list[list[str]]:
    """The words of each command in the bash blocks of a doc, without comments, split at `--`, `&&` and `|`."""
    found = []
    for block in blocks(path):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while words:
                cut = next((i for i, word in enumerate(words) if word in ("&&", "|", "--")), len(words))
                found.append(words[:cut])
                words = words[cut + 1 :]
    return [words for words in found if words]


def check(words: list[str]) -> None:
    """Parse a command line of ours as far as click does before it runs. Raises click.UsageError."""
    command: click.Command = cli
    context = click.Context(cli, info_name=words[0])
    rest = words[1:]
    while isinstance(command, click.Group):
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
    command.make_context(command.name, rest, parent=context)


OURS = [(path, words) for path in DOCS for words in commands(path) if words[0] == "moeray"]


def test_there_are_docs_and_commands():
    assert {path.parent.relative_to(ROOT).as_posix() for path in DOCS} >= {".", "deploy", "dashboards", "moeray/bench"}
    assert len(OURS) > 20


@pytest.mark.parametrize(("path", "words"), OURS, ids=[" ".join(words) for _, words in OURS])
def test_each_command_parses(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in words:
        if re.search(r"\.(yaml|csv|jsonl|json)$", word):
            (tmp_path / word).write_text("")  # options for files ask that they exist
    check(words)


def test_a_flag_that_is_not_there_is_found():
    with pytest.raises(click.UsageError, match="No such option"):
        check(["moeray", "status", "--nothing"])


@pytest.mark.parametrize("path", DOCS, ids=[path.relative_to(ROOT).as_posix() for path in DOCS])
def test_each_link_leads_to_a_file(path):
    missing = [link for link in _LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert not missing
