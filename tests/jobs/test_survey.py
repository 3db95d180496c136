"""Looking through the input, and reading it again."""

from __future__ import annotations

import json
import os

import pytest

from moeray.errors import BatchError
from moeray.jobs.survey import BatchInput
from tests.jobs.support import entry, write_lines

MAX = 400


def look(path, settled=frozenset()):
    """The survey, its errors as (line, code), and the pending lines as (line, custom_id)."""
    errors = []
    with BatchInput(path, MAX) as lines:
        survey = lines.survey(settled, lambda error: errors.append((error.number, error.code)))
        return survey, errors, [(line.number, line.custom_id) for line in lines.read(survey.pending)]


def raw(custom_id):
    return json.dumps(entry(custom_id, "m")).encode()


@pytest.mark.parametrize(
    ("content", "errors", "pending"),
    [
        (b"", [], []),
        (b"\n \r\n\n", [], []),
        (raw("a") + b"\n" + raw("b"), [], [(1, "a"), (2, "b")]),
        (b"\n" + raw("a") + b"\r\n\n" + raw("b") + b"\n", [], [(2, "a"), (4, "b")]),
        (b"\xef\xbb\xbf" + raw("a") + b"\n", [], [(1, "a")]),
        (raw("a") + b"\n" + raw("b") + b"\n" + raw("a") + b"\n", [(3, "duplicate_custom_id")], [(1, "a"), (2, "b")]),
        (b"{\n" + raw("a") + b"\n{", [(1, "invalid_json_line"), (3, "invalid_json_line")], [(2, "a")]),
        (raw("a" * MAX) + b"\n" + raw("b") + b"\n", [(1, "line_too_long")], [(2, "b")]),
        (raw("a") + b"\n" + b"x" * (5 * MAX + 1), [(2, "line_too_long")], [(1, "a")]),
        (b" " * (MAX - len(raw("a"))) + raw("a") + b"\n" + raw("b"), [], [(1, "a"), (2, "b")]),
        (b" " * (MAX + 1 - len(raw("a"))) + raw("a") + b"\n" + raw("b"), [(1, "line_too_long")], [(2, "b")]),
    ],
)
def test_lines(tmp_path, content, errors, pending):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    survey, found, left = look(path)
    assert (found, left) == (errors, pending)
    assert (survey.lines, survey.bad, survey.to_ask) == (len(errors) + len(pending), len(errors), len(pending))


def test_settled_lines_are_not_asked_and_those_that_are_gone_are_named(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [entry(name, "m") for name in "abcd"])
    survey, errors, left = look(path, {"b", "d", "z"})
    assert left == [(1, "a"), (3, "c")]
    assert (survey.settled, survey.strays, errors) == (2, {"z"}, [])


def test_a_second_line_of_a_settled_one_is_still_a_duplicate(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [entry("a", "m"), entry("a", "m")])
    assert look(path, {"a"})[1:] == ([(2, "duplicate_custom_id")], [])


def test_an_input_that_is_cut_short_meanwhile(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [entry(name, "m") for name in "ab"])
    with BatchInput(path, MAX) as lines:
        survey = lines.survey(frozenset(), print)
        os.truncate(path, 20)
        with pytest.raises(BatchError, match="was changed"):
            list(lines.read(survey.pending))


def test_an_input_that_cannot_be_read_again_from_any_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, text in (("absent", "cannot be read"), ("pipe", "no regular file"), (".", "no regular file")):
        with pytest.raises(BatchError, match=text), BatchInput(tmp_path / name, MAX):
            pass
