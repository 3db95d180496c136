"""Batches over a whole system in this process: its answers, its full queue, and the command itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

from moeray.cli.session import local_system
from moeray.jobs.start import errors_beside
from tests.checkpoints import make_tiny
from tests.jobs.support import CHAT, COMPLETIONS, answers, entry, grown_to, read_lines, run_batch, write_lines
from tests.systems import tiny_config

LINES = 160


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("batch") / "tiny", tokenizer=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sampled without a seed, of different lengths, some with several choices."""
    lines = [
        entry(
            f"r{i}", "tiny", f"message {i}, {'and so on ' * (i % 5)}", CHAT if i % 2 else COMPLETIONS, temperature=1.0,
            max_tokens=3 + i % 7, ignore_eos=True, n=1 + i % 3,
        )
        for i in range(LINES)
    ]  # fmt: skip
    return write_lines(tmp_path_factory.mktemp("input") / "in.jsonl", lines)


def test_a_job_that_is_ended_and_goes_on_has_the_answers_of_one_that_is_not(model, source, tmp_path):
    """The routers' queues are short, so that they refuse most of what is in flight at first."""
    calm, disturbed = tmp_path / "calm.jsonl", tmp_path / "disturbed.jsonl"
    config = tiny_config(model, engine__max_waiting=12, engine__max_running=8)

    async def run():
        async with local_system(config) as backend:
            tally = await run_batch(backend, source, calm, concurrency=500, queue=500)
            assert (tally.answered, tally.failed) == (LINES, 0)
            runs = 0
            while True:
                job = asyncio.create_task(run_batch(backend, source, disturbed, concurrency=40))
                await asyncio.to_thread(grown_to, disturbed, (runs + 1) * calm.stat().st_size // 4, job.done)
                runs += 1
                if job.done():
                    return runs, await job
                job.cancel()
                await asyncio.gather(job, return_exceptions=True)

    runs, tally = asyncio.run(run())
    assert runs > 2
    assert tally.complete
    assert answers(disturbed) == answers(calm)
    assert answers(calm).keys() == {f"r{i}" for i in range(LINES)}
    assert len({text for texts in answers(calm).values() for text in texts}) > LINES


def batch(model, source, output, *options, **popen):
    command = [
        sys.executable, "-m", "moeray.cli.main", "batch", "--local", "--model", str(model), "--input", str(source),
        "--output", str(output), "--dtype", "float32", "--engine-kv-blocks", "256", "--summary", "json", *options,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def test_the_command(model, source, tmp_path):
    output = tmp_path / "out.jsonl"
    first = batch(model, source, output, "--concurrency", "4")
    grown_to(output, 2000, lambda: first.poll() is not None)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM, err
    figures = json.loads(out)
    assert figures["outcome"] == "ended by SIGTERM; run it again"
    assert 0 < figures["answered"] == len(answers(output)) < LINES
    assert figures["left"] == LINES - figures["answered"]
    assert "SIGTERM, stopping" in err

    with source.open("a") as file:
        file.write("no request\n")
    second = batch(model, source, output)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 3, err
    figures = json.loads(out)
    assert (figures["lines"], figures["left"], figures["errors"]) == (LINES + 1, 0, 1)
    assert figures["answered"] + figures["earlier"] == len(answers(output)) == LINES
    assert read_lines(errors_beside(output))[0]["error"]["line"] == LINES + 1
    assert f"batch: {LINES + 1}/{LINES + 1} lines, 1 error" in err

    before = output.read_bytes()
    source.write_text("".join(source.read_text().splitlines(keepends=True)[:-1]))
    third = batch(model, source, output)
    out, err = third.communicate(timeout=60)
    assert third.returncode == 0, err
    assert json.loads(out)["outcome"] == "done"
    assert (output.read_bytes(), os.path.exists(errors_beside(output))) == (before, False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--input", "/absent.jsonl"), "check the path"),
        (("--errors", "/x/in.jsonl", "--input", "/x/in.jsonl"), "three files"),
    ],
)
def test_the_command_says_what_is_wrong(model, source, tmp_path, options, text):
    process = batch(model, source, tmp_path / "out.jsonl", *options)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert text in err
    assert len(err.splitlines()) == 1
