"""What a router's log says of its requests: a real system in this process, and the lines that it writes."""

import logging

import pytest

from moeray.actors import request_log
from moeray.actors.life import Life
from moeray.errors import QueueFullError
from moeray.logs import REQUESTS
from moeray.types import FinishReason, GenerationRequest, SamplingParams
from tests.checkpoints import make_tiny
from tests.systems import LocalSystem, tiny_config


@pytest.fixture
def records():
    """Of the requests' logger, all of them."""
    kept: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = kept.append
    log = logging.getLogger(REQUESTS)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield kept
    log.removeHandler(handler)
    log.setLevel(level)


REQUEST = GenerationRequest("cmpl-1-0", (1, 2, 3), origin="abc", attempt=2, output_ids=(9, 9))


@pytest.mark.parametrize(
    ("progress", "reason", "words", "figures"),
    [
        (
            Life(REQUEST, 10.0, 10.5, 12.5, given=5, cached_tokens=2), FinishReason.STOP,
            "ended (stop): 3 prompt tokens (2 cached), 5 generated, the first after 0.5 s, 3.0 s in all",
            {"ttft_s": 0.5, "tpot_s": 0.5, "e2e_s": 3.0, "output_tokens": 5, "cached_tokens": 2},
        ),
        (
            Life(REQUEST, 10.0, 11.0, 11.0, given=1), FinishReason.LENGTH,
            "ended (length): 3 prompt tokens (0 cached), 1 generated, the first after 1.0 s, 3.0 s in all",
            {"ttft_s": 1.0, "e2e_s": 3.0},
        ),
        (
            Life(REQUEST, 10.0), FinishReason.ABORT,
            "ended (abort): 3 prompt tokens (0 cached), 0 generated, 3.0 s in all",
            {"e2e_s": 3.0, "output_tokens": 0},
        ),
    ],
)  # fmt: skip
def test_an_end(records, progress, reason, words, figures):
    request_log.ended(progress, reason, 13.0)
    (record,) = records
    assert record.getMessage() == words
    assert record.levelno == logging.INFO
    named = {"request_id": "abc", "sequence": "cmpl-1-0", "attempt": 2, "finish_reason": reason.value}
    assert vars(record).items() >= (named | figures).items()
    assert hasattr(record, "tpot_s") == ("tpot_s" in figures)


def test_an_error_says_why(records):
    request_log.ended(Life(REQUEST, 1.0), FinishReason.ERROR, 2.0, "the logits are not finite")
    assert records[0].getMessage().endswith("1.0 s in all; the logits are not finite")


def test_what_is_taken_over_or_refused(records):
    request_log.taken(REQUEST)
    request_log.refused("cmpl-2-0", "", QueueFullError("full", retry_after_s=1.0))
    assert [record.getMessage() for record in records] == ["taken over as attempt 2, behind 2 tokens", "refused: full"]
    assert (records[1].request_id, records[1].sequence) == ("cmpl-2-0", "cmpl-2-0")


def test_a_system_that_preempts_says_so_by_name(records, tmp_path):
    config = tiny_config(make_tiny("olmoe", tmp_path / "tiny"), engine__kv_blocks=4)
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    with LocalSystem(config) as system:
        system.generate([tuple(range(5, 20)), tuple(range(30, 45))], sampling)
    preempted = [r for r in records if r.getMessage().startswith("preempted behind")]
    ends = {r.sequence: r for r in records if r.getMessage().startswith("ended (length)")}
    assert preempted
    assert len(ends) == 2
    assert {r.sequence for r in preempted} <= set(ends)
    assert all((r.prompt_tokens, r.output_tokens) == (15, 24) and 0 < r.ttft_s <= r.e2e_s for r in ends.values())
