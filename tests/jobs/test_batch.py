"""Whole batches over a backend that answers by rule: a thousand in flight, refusals, failures, ends in the middle."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from moeray.errors import BatchError, BatchPausedError, QueueFullError, RouterLostError
from moeray.jobs.start import check_distinct, default_concurrency, errors_beside, queue_of
from moeray.serve.errors import GenerationFailedError
from tests.jobs.support import CHAT, COMPLETIONS, answers, entry, read_lines, run_batch, write_lines
from tests.serve.support import EchoBackend, model_info, save_tokenizer
from tests.systems import tiny_config

MODEL = "org/echo"


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    return model_info(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def hellos(count):
    return [entry(f"r{i}", MODEL, f"hello {i}", COMPLETIONS if i % 2 else CHAT, max_tokens=40) for i in range(count)]


def hello(i):
    return [f"hello {i}"]


def test_a_thousand_side_by_side(info, files):
    write_lines(files[0], hellos(2000))
    backend = EchoBackend(info, gather=1000)
    tally = asyncio.run(run_batch(backend, *files, concurrency=1000))
    assert answers(files[1]) == {f"r{i}": hello(i) for i in range(2000)}
    assert backend.most_open == 1000
    assert (tally.answered, tally.failed, tally.complete) == (2000, 0, True)
    assert not errors_beside(files[1]).exists()
    for line in read_lines(files[1])[:4]:
        kind = Completion if int(line["custom_id"][1:]) % 2 else ChatCompletion
        assert kind.model_validate(line["response"]["body"]).model == MODEL
    sizes = [line["response"]["body"]["usage"] for line in read_lines(files[1])]
    assert tally.completion_tokens == sum(usage["completion_tokens"] for usage in sizes)
    assert tally.prompt_tokens == sum(usage["prompt_tokens"] for usage in sizes)


BAD = [
    ("", None),
    ("{", (None, "invalid_json_line")),
    (entry("r1", MODEL), ("r1", "duplicate_custom_id")),
    (entry("embed", MODEL, url="/v1/embeddings"), ("embed", "invalid_url")),
    (entry("stream", MODEL, stream=True), ("stream", "stream_not_supported")),
    (entry("other", "gpt"), ("other", "model_not_found")),
    (entry("long", MODEL, "x" * 5000), ("long", "context_length_exceeded")),
    (entry("hot", MODEL, temperature=9), ("hot", "invalid_value")),
    (entry("tools", MODEL, url=CHAT, tools=[{"type": "function"}]), ("tools", "unsupported_parameter")),
    (entry("many", MODEL, n=100), ("many", None)),
]


def test_bad_lines_go_to_the_error_file_and_stop_nothing(info, files):
    source, output = files
    good = hellos(6)
    write_lines(source, good[:3] + [line for line, _ in BAD] + good[3:])
    tally = asyncio.run(run_batch(EchoBackend(info), source, output, queue=64))
    assert answers(output).keys() == {line["custom_id"] for line in good}
    wrong = {}
    for line in read_lines(errors_beside(output)):
        error = line["error"] or line["response"]["body"]["error"]
        assert error["message"].startswith(f"line {error['line']}: ")
        wrong[error["line"]] = (line["custom_id"], error["code"])
    assert wrong == {4 + place: what for place, (_, what) in enumerate(BAD) if what}
    assert (tally.lines, tally.answered, tally.failed) == (15, 6, 9)


def test_what_was_settled_is_not_asked_again_unless_errors_are_to_be_retried(info, files):
    source, output = files
    bad = ["{", entry("other", "gpt"), entry("hot", MODEL, temperature=9)]
    write_lines(source, hellos(3) + bad)
    asyncio.run(run_batch(EchoBackend(info), source, output))
    before = output.read_bytes()

    backend = EchoBackend(info)
    tally = asyncio.run(run_batch(backend, source, output))
    assert (backend.requests, tally.earlier, tally.errors) == ([], 5, 3)
    assert output.read_bytes() == before

    write_lines(source, [*hellos(3), "", entry("other", MODEL), entry("hot", MODEL, temperature=9)])
    tally = asyncio.run(run_batch(backend, source, output, retry_errors=True))
    assert len(backend.requests) == 1
    assert output.read_bytes().startswith(before)
    assert answers(output).keys() == {"r0", "r1", "r2", "other"}
    assert [line["custom_id"] for line in read_lines(errors_beside(output))] == ["hot"]
    assert (tally.earlier, tally.answered, tally.failed, tally.errors) == (3, 1, 1, 1)


def test_an_output_of_another_input_is_refused_and_left_alone(info, files):
    source, output = files
    write_lines(source, hellos(3))
    asyncio.run(run_batch(EchoBackend(info), source, output))
    before = output.read_bytes()
    write_lines(source, hellos(5)[1:])
    with pytest.raises(BatchError, match="1 lines that the input does not have, such as custom_id 'r0'"):
        asyncio.run(run_batch(EchoBackend(info), source, output))
    assert output.read_bytes() == before


def test_a_refused_line_that_leaves_the_input_leaves_the_error_file(info, files):
    source, output = files
    write_lines(source, [*hellos(2), entry("other", "gpt")])
    asyncio.run(run_batch(EchoBackend(info), source, output))
    assert errors_beside(output).exists()
    write_lines(source, hellos(2))
    tally = asyncio.run(run_batch(EchoBackend(info), source, output))
    assert (tally.earlier, tally.errors) == (2, 0)
    assert not errors_beside(output).exists()


@dataclass
class Crowded(EchoBackend):
    """Takes `room` requests at once and refuses more."""

    room: int = 20
    refusals: int = 0

    async def generate(self, request):
        if self.open >= self.room:
            self.refusals += 1
            raise QueueFullError("the queue is full", retry_after_s=0.01)
        async for output in super().generate(request):
            yield output


def test_full_routers_are_asked_again_until_every_line_is_answered(info, files):
    write_lines(files[0], hellos(400))
    backend = Crowded(info)
    tally = asyncio.run(run_batch(backend, *files, concurrency=200))
    assert answers(files[1]) == {f"r{i}": hello(i) for i in range(400)}
    assert backend.most_open == backend.room
    assert 0 < backend.refusals <= 200 + 400
    assert tally.failed == 0


@dataclass
class Failing(EchoBackend):
    """Ends the first `times` attempts at each prompt by `error`."""

    times: int = 2
    error: Exception = field(default_factory=lambda: GenerationFailedError("the step failed"))
    attempts: Counter[tuple[int, ...]] = field(default_factory=Counter)

    async def generate(self, request):
        self.attempts[request.prompt_ids] += 1
        if self.attempts[request.prompt_ids] <= self.times:
            raise self.error
        async for output in super().generate(request):
            yield output


@pytest.mark.parametrize("error", [GenerationFailedError("the step failed"), RouterLostError("router-0 is gone")])
def test_failures_that_pass(info, files, error):
    write_lines(files[0], hellos(20))
    backend = Failing(info, error=error)
    tally = asyncio.run(run_batch(backend, *files))
    assert answers(files[1]) == {f"r{i}": hello(i) for i in range(20)}
    assert set(backend.attempts.values()) == {3}
    assert tally.failed == 0


@pytest.mark.parametrize(
    ("error", "code"), [(GenerationFailedError("the step failed"), "generation_failed"), (KeyError("bug"), "internal")]
)
def test_failures_that_stay_are_the_lines_own(info, files, error, code):
    write_lines(files[0], hellos(3))
    tally = asyncio.run(run_batch(Failing(info, times=99, error=error), *files))
    assert read_lines(files[1]) == []
    lines = read_lines(errors_beside(files[1]))
    assert {line["response"]["status_code"] for line in lines} == {500}
    assert {line["response"]["body"]["error"]["code"] for line in lines} == {code}
    assert tally.codes == {code: 3}


@pytest.mark.parametrize("error", [RouterLostError("no router"), QueueFullError("full", retry_after_s=0.01)])
def test_a_lost_system_pauses_the_job_and_no_line_has_failed(info, files, error):
    write_lines(files[0], hellos(50))
    lost = Failing(info, times=10**9, error=error)
    with pytest.raises(BatchPausedError, match="run the same job again"):
        asyncio.run(run_batch(lost, *files, patience_s=0.05))
    assert read_lines(files[1]) == []
    assert not errors_beside(files[1]).exists()
    tally = asyncio.run(run_batch(EchoBackend(info), *files))
    assert tally.answered == 50


def test_a_cancelled_job_keeps_what_is_answered_and_the_next_does_the_rest(info, files):
    source, output = files
    write_lines(
        source, [*hellos(30), *(entry(f"long{i}", MODEL, f"a long answer {i}", max_tokens=40) for i in range(9))]
    )
    slow = EchoBackend(info, hold_after=12)

    async def run():
        job = asyncio.create_task(run_batch(slow, source, output))
        for _ in range(9):
            await asyncio.to_thread(slow.held.acquire)
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        assert job.cancelled()

    asyncio.run(run())
    assert slow.open == 0  # all were ended
    before = answers(output)
    assert set() < before.keys() <= {f"r{i}" for i in range(30)}
    tally = asyncio.run(run_batch(EchoBackend(info), source, output))
    assert tally.earlier == len(before)
    assert answers(output) == {f"r{i}": hello(i) for i in range(30)} | {
        f"long{i}": [f"a long answer {i}"] for i in range(9)
    }


def test_three_files(tmp_path):
    check_distinct([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    with pytest.raises(BatchError, match="three files"):
        check_distinct([tmp_path / "a", tmp_path / "b", tmp_path / "x" / ".." / "a"])


@pytest.mark.parametrize("output", [".", "", "/"])
def test_an_output_without_a_file_name_is_refused(output):
    with pytest.raises(BatchError, match="has no file name"):
        errors_beside(Path(output))


def test_how_much_is_in_flight():
    config = tiny_config("m", router__max_actors=3, engine__max_running=10, engine__max_waiting=100)
    assert queue_of(config) == 300
    assert default_concurrency(config, shared=False) == 330
    assert default_concurrency(config, shared=True) == 60
