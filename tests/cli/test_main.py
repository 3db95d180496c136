"""What a command says where it fails: one line, never a traceback."""

from __future__ import annotations

import json
import sys

import click
import pytest

from moeray.cli.main import main
from moeray.cli.options import UnfinishedError, system_options


def run(monkeypatch, capfd, *args):
    """Exit code and what was said on stderr."""
    monkeypatch.setattr(sys, "argv", ["moeray", *args])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("chaos", "--every", "abc"), "'abc' is not a valid number of seconds"),
        (("chaos", "--for", "0s"), "x>0"),
        (("chaos", "--every", "-3s"), "x>0"),
        (("chaos", "--streams", "0"), "x>=1"),
        (("bench", "dispatch", "--layers", "0"), "x>=1"),
        (("bench", "skew", "--hot", "1.5"), "0<=x<=1"),
        (("drain", "experts-0", "--within", "-1"), "x>=0"),
        (("bench", "serve", "http://127.0.0.1:9", "--concurrency", "a"), "'a' is not a valid integer"),
        (("bench", "serve", "http://127.0.0.1:9", "--concurrency", ""), "'' is not a valid integer"),
        (("bench", "serve", "http://127.0.0.1:9", "--concurrency", "1,-3"), "x>=1"),
        (("bench", "serve", "http://127.0.0.1:9", "--rate", "x"), "'x' is not a valid float"),
        (("bench", "serve", "http://127.0.0.1:9", "--rate", "0"), "x>0"),
        (("bench", "serve", "http://127.0.0.1:9", "--rate", "1,nan"), "'nan' is not a finite number"),
        (("bench", "dispatch", "--tokens", "1,b"), "'b' is not a valid integer"),
        (("bench", "engine", "m", "--batch", "0"), "x>=1"),
        (("bench", "kernel", "--rows", "1,,2"), "'' is not a valid integer"),
        (("bench", "plan", "--seed", "-1"), "x>=0"),
        (("bench", "plan", "--spares", "inf"), "'inf' is not a finite number"),
        (("bench", "plan", "--spares", "nan"), "'nan' is not a finite number"),
        (("bench", "replay", "--trace", "t", "--scale", "nan"), "'nan' is not a finite number"),
        (("batch", "-i", "a", "-o", "b", "--patience", "nan"), "'nan' is not a finite number"),
        (("simulate", "--trace", "t", "--seed", "-1"), "x>=0"),
        (("simulate", "--trace", "t", "--speed", "nan"), "'nan' is not a finite number"),
        (("simulate", "--trace", "t", "--speed", "1e-300"), "0.001<=x"),
        (("simulate", "--trace", "t", "--scale", "inf"), "'inf' is not a finite number"),
        (("simulate", "--trace", "t", "--expert-mib", "inf"), "x<=1048576"),
        (("simulate", "--trace", "t", "--expert-mib", "nan"), "'nan' is not a finite number"),
        (("simulate", "--trace", "t", "--oracle-interval", "inf"), "'inf' is not a finite number"),
        (("simulate", "--trace", "t", "--oracle-interval", "nan"), "'nan' is not a finite number"),
        (("simulate", "--trace", "t", "--oracle-interval", "1e-300"), "x>=0.1"),
        (("simulate", "--trace", "t", "--slo-factor", "inf"), "x<=1000000"),
    ],
)
def test_a_value_out_of_range_is_named(monkeypatch, capfd, args, words):
    code, said = run(monkeypatch, capfd, *args)
    assert code == 2
    assert words in said


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, capfd, tmp_path):
    (tmp_path / "file").touch()
    code, said = run(monkeypatch, capfd, "dashboards", str(tmp_path / "file" / "out"))
    assert (code, said.count("\n")) == (1, 1)
    assert f"moeray: {tmp_path}/file/out: Not a directory; check" in said


@pytest.mark.parametrize("variable", ["MOERAY_CACHE_DIR", "MOERAY_RUNTIME_DIR"])
def test_a_folder_of_the_environment_that_cannot_be_made_is_named(monkeypatch, capfd, tmp_path, tiny, variable):
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "out"))
    code, said = run(monkeypatch, capfd, "generate", str(tiny), "--prompt-ids", "1,2", "--local")
    assert code == 1
    assert "Traceback" not in said
    assert f"{tmp_path}/file/out" in said.splitlines()[-1]
    assert variable in said.splitlines()[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tests.checkpoints import make_tiny

    return make_tiny("granitemoe", tmp_path_factory.mktemp("main") / "m")


@pytest.mark.parametrize(
    "args",
    [
        ("status",),
        ("plan",),
        ("scale", "experts=2"),
        ("scale", "experts"),
        ("drain", "experts-0"),
        ("drain",),
        ("rebalance",),
        ("pause-autoscaling",),
        ("resume-autoscaling",),
    ],
)
def test_an_error_is_an_object_where_objects_are_asked_for(monkeypatch, capfd, args):
    monkeypatch.setattr(sys, "argv", ["moeray", *args, "--address", "127.0.0.1:1", "--output", "json"])
    with pytest.raises(SystemExit) as left:
        main()
    said = capfd.readouterr()
    told = json.loads(said.out)
    assert (left.value.code, said.err) == (1, f"moeray: {told['error']}\n")


def test_what_was_done_goes_with_the_error(capsys):
    @click.command
    @system_options
    def command(**_: object) -> None:
        raise UnfinishedError("not empty", {"draining": ["experts-0"], "empty": False})

    with pytest.raises(UnfinishedError):
        command.main(["--output", "json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"draining": ["experts-0"], "empty": False, "error": "not empty"}
    with pytest.raises(UnfinishedError):
        command.main([], standalone_mode=False)
    assert capsys.readouterr().out == ""
