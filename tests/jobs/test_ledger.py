"""The files of a batch after every kind of end: each line is there once, whole, or is to be asked again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys

import pytest

from moeray.errors import BatchError, BatchPausedError, RequestError
from moeray.jobs.ledger import Ledger
from moeray.jobs.lines import BatchLine, answer_line, error_line, parse_line, refusal_line
from moeray.jobs.start import errors_beside
from moeray.serve.errors import reply_for
from tests.jobs.support import COMPLETIONS, grown_to, read_lines

WRITER = """
import sys
from pathlib import Path
from moeray.jobs.ledger import Ledger
from moeray.jobs.lines import BatchLine, answer_line
from moeray.jobs.start import errors_beside

output, total = Path(sys.argv[1]), int(sys.argv[2])
with Ledger(output, errors_beside(output)) as ledger:
    with ledger.new_errors():
        pass
    for number in range(total):
        if (name := f"r{number}") not in ledger.answered:
            line = BatchLine(number, name, "/v1/completions", {})
            ledger.write_answer(answer_line(line, b'{"text": "%s"}' % (b"x" * 2000), "q")).result()
"""


def answer(name: str) -> bytes:
    return answer_line(BatchLine(1, name, COMPLETIONS, {}), b'{"n": 1}', "q")


def refusal(name: str) -> bytes:
    return refusal_line(BatchLine(1, name, COMPLETIONS, {}), reply_for(RequestError("no")), "q")


def no_request() -> bytes:
    with pytest.raises(BatchError) as error:
        parse_line(b"{", 4)
    return error_line(error.value)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def opened(output):
    return Ledger(output, errors_beside(output))


def test_whatever_the_place_at_which_a_write_was_torn(output):
    lines = [answer(name) for name in ("a", "b", "c")]
    whole = b"".join(lines)
    ends = [0, len(lines[0]), len(lines[0] + lines[1]), len(whole)]
    for cut in sorted(
        {*range(0, len(whole), 7), *ends, *(end - 1 for end in ends[1:]), *(end + 1 for end in ends[:-1])}
    ):
        output.write_bytes(whole[:cut])
        with opened(output) as ledger:
            kept = sum(end <= cut for end in ends) - 1
            assert ledger.answered == set("abc"[:kept])
            with ledger.new_errors():
                pass
            for place in range(kept, 3):
                ledger.write_answer(lines[place])
        assert output.read_bytes() == whole
    assert not errors_beside(output).exists()


def test_a_tail_of_zeros_as_a_lost_machine_may_leave_it(output):
    output.write_bytes(answer("a") + b"\0" * 5000)
    with opened(output) as ledger:
        assert ledger.answered == {"a"}
    assert [line["custom_id"] for line in read_lines(output)] == ["a"]


@pytest.mark.parametrize(
    "content",
    [b"notes\n", b"notes", b'{"a": 1}\n', answer("a") + b"notes", refusal("a")[:30] + b"\n"],
    ids=["a line", "a line without end", "another's JSON", "behind an answer", "part of a refusal"],
)
def test_a_file_that_no_batch_has_written_is_left_as_it_is(output, content):
    output.write_bytes(content)
    with pytest.raises(BatchError, match=r"line [12]: no batch has written this"), opened(output):
        pass
    assert output.read_bytes() == content


def test_bad_lines_as_output(output):
    output.write_bytes(no_request())
    with pytest.raises(BatchError, match="no answer of a batch"), opened(output):
        pass


def test_the_error_file_keeps_refusals_and_forgets_what_is_no_request(output):
    errors = errors_beside(output)
    errors.write_bytes(refusal("a") + no_request() + refusal("b") + refusal("c")[:-9])
    with opened(output) as ledger:
        assert ledger.failed == {"a", "b"}
        ledger.failed.discard("a")
        with ledger.new_errors() as add:
            add(refusal("new"))
        ledger.write_error(refusal("later"))
    assert [line["custom_id"] for line in read_lines(errors)] == ["new", "b", "later"]
    assert not list(output.parent.glob(".*.new"))


def test_an_interrupted_look_at_the_input_leaves_the_error_file(output):
    errors = errors_beside(output)
    errors.write_bytes(refusal("a"))
    with opened(output) as ledger, contextlib.suppress(BatchError), ledger.new_errors() as add:
        add(refusal("b"))
        raise BatchError("no")
    assert [line["custom_id"] for line in read_lines(errors)] == ["a"]
    assert not list(output.parent.glob(".*.new"))


def test_two_jobs_on_one_file_are_refused(output, tmp_path):
    with opened(output):
        with pytest.raises(BatchError, match=r"another job writes .*out\.jsonl"), opened(output):
            pass
        with pytest.raises(BatchError, match="another job"), Ledger(tmp_path / "other", errors_beside(output)):
            pass
    with opened(output):
        pass


def test_a_folder_is_made_where_it_can_be(tmp_path):
    with opened(tmp_path / "new" / "out.jsonl"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(BatchError, match="cannot be written"), opened(tmp_path / "file" / "out.jsonl"):
        pass


def test_a_full_disk_pauses_the_job_and_the_next_one_goes_on(output):
    with opened(output) as ledger:
        with ledger.new_errors():
            pass
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        room = len(answer("a")) + 30
        ledger.write_answer(answer("a")).result()
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(BatchPausedError, match="cannot be written"):
                ledger.write_answer(answer("b")).result()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
    assert output.stat().st_size == room  # torn
    with opened(output) as ledger:
        assert ledger.answered == {"a"}


def test_killed_again_and_again(output):
    total, rng = 3000, random.Random(1)
    command = [sys.executable, "-c", WRITER, str(output), str(total)]
    for goal in sorted(rng.randrange(4000, 4 << 20) for _ in range(4)):
        process = subprocess.Popen(command)
        grown_to(output, goal, lambda process=process: process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    subprocess.run(command, check=True, timeout=120)
    names = [json.loads(line)["custom_id"] for line in output.read_bytes().splitlines()]
    assert sorted(names) == sorted(f"r{i}" for i in range(total))


@pytest.mark.parametrize("which", ["output", "errors"])
def test_what_is_no_regular_file_is_refused_before_it_is_read(tmp_path, which):
    output = tmp_path / "out.jsonl"
    errors = errors_beside(output)
    {"output": output, "errors": errors}[which].symlink_to("/dev/zero")  # which would be read without an end
    with pytest.raises(BatchError, match="is no regular file"), Ledger(output, errors):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(BatchError, match="is no regular file"), Ledger(tmp_path / "folder", errors):
        pass
