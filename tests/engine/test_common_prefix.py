"""A prefix that several have in common and one computes: who waits for it, until when, and who does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeray.engine.blocks import BlockManager
from moeray.engine.engine import Engine
from moeray.engine.scheduler import Scheduler
from moeray.engine.sequence import Sequence
from moeray.settings.engine import EngineConfig
from moeray.types import GenerationRequest, SamplingParams
from tests.engine.history_runner import VOCAB, HistoryRunner, drain
from tests.engine.test_scheduler import spans, step

A, B = tuple(range(100, 140)), tuple(range(200, 240))  # prompts; blocks are of four tokens


def scheduler_of(num_blocks=64, prefix_cache=True, **config):
    settings = {"max_running": 8, "max_batch_tokens": 64, "prefill_chunk": 16, "block_size": 4} | config
    blocks = BlockManager(num_blocks, 4, prefix_cache)
    return Scheduler(EngineConfig(**settings), blocks, max_context=1000), blocks


def add(scheduler, *prompts, output=(), max_tokens=100):
    """Sequences named 0, 1, …"""
    sampling = SamplingParams(max_tokens=max_tokens)
    seqs = [Sequence(GenerationRequest(str(i), prompt, sampling, output)) for i, prompt in enumerate(prompts)]
    for seq in seqs:
        scheduler.add(seq)
    return seqs


def steps(scheduler, count):
    """What each step computes: the first token and the number of them, by name."""
    return [{name: span[:2] for name, span in step(scheduler)[0].items()} for _ in range(count)]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        # the same prompt three times: computed once, but for the last token's block
        ([A[:12]] * 3, [{"0": (0, 12)}, {"0": (12, 1), "1": (8, 4), "2": (8, 4)}]),
        ([A[:13]] * 2, [{"0": (0, 13)}, {"0": (13, 1), "1": (12, 1)}]),
        # one block in common, then each its own
        ([A[:8], A[:4] + B[:5]], [{"0": (0, 8)}, {"0": (8, 1), "1": (4, 5)}]),
        # a prefix of the other, and the other way round
        ([A[:20], A[:9]], [{"0": (0, 20)}, {"0": (20, 1), "1": (8, 1)}]),
        ([A[:9], A[:16]], [{"0": (0, 9)}, {"0": (9, 1), "1": (8, 8)}]),
        # what is less than a block, or ends with the last token, is shared by nobody
        ([A[:7], A[:3] + B[:5]], [{"0": (0, 7), "1": (0, 8)}]),
        ([A[:4], A[:4]], [{"0": (0, 4), "1": (0, 4)}]),
        # the same tokens behind another prefix are another prefix
        ([A[:12], B[:4] + A[4:12]], [{"0": (0, 12), "1": (0, 12)}]),
        # those behind do not wait with it, and it comes before what comes later
        ([A[:12], A[:12], B[:8]], [{"0": (0, 12), "2": (0, 8)}, {"0": (12, 1), "2": (8, 1), "1": (8, 4)}]),
        # in turns, where each has some more in common with the next
        (
            [A[:5], A[:8] + B[:1], A[:12]],
            [{"0": (0, 5)}, {"0": (5, 1), "1": (4, 5)}, {"0": (6, 1), "1": (9, 1), "2": (8, 4)}],
        ),
    ],
)
def test_a_common_prefix_is_computed_once(prompts, expected):
    scheduler, blocks = scheduler_of()
    add(scheduler, *prompts)
    assert steps(scheduler, len(expected)) == expected
    blocks.check(scheduler.running)


def test_without_prefix_cache_nobody_waits():
    scheduler, _ = scheduler_of(prefix_cache=False)
    add(scheduler, A[:12], A[:12])
    assert steps(scheduler, 1) == [{"0": (0, 12), "1": (0, 12)}]


def test_it_waits_for_the_blocks_it_shares_and_no_further():
    scheduler, _ = scheduler_of(max_batch_tokens=8)
    add(scheduler, A, A[:12] + B[:9])
    assert steps(scheduler, 4) == [
        {"0": (0, 8)},
        {"0": (8, 8)},
        {"0": (16, 6), "1": (12, 2)},
        {"0": (22, 6), "1": (14, 2)},
    ]


def test_resumed_ones_share_what_they_had_generated():
    scheduler, _ = scheduler_of()
    add(scheduler, A[:6], A[:6], output=B[:5])
    assert steps(scheduler, 2) == [{"0": (0, 11)}, {"0": (11, 1), "1": (8, 3)}]


def test_the_same_step_can_be_scheduled_again():
    scheduler, blocks = scheduler_of()
    add(scheduler, A, A, B)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert set(spans(first)) == set(spans(second)) == {"0", "2"}
    assert {seq.request_id for seq in scheduler.running} == {"0", "2"}
    blocks.check(scheduler.running)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("computed", [0, 1, 2])
def test_whoever_waits_for_one_that_is_aborted_goes_on(computed, keep):
    scheduler, blocks = scheduler_of(max_batch_tokens=8)
    add(scheduler, A, A, A)
    steps(scheduler, computed)
    scheduler.schedule()
    assert [seq.request_id for seq in scheduler.running] == ["0"]
    scheduler.abort("0", keep_prefix=keep)
    start = 8 * computed * keep
    assert steps(scheduler, 2) == [{"1": (start, 8)}, {"1": (start + 8, 8)}]
    blocks.check(scheduler.running)


def test_whoever_waits_for_one_that_ends_goes_on():
    scheduler, blocks = scheduler_of()
    add(scheduler, A[:12], A[:12], max_tokens=1)
    assert steps(scheduler, 2) == [{"0": (0, 12)}, {"1": (8, 4)}]
    assert blocks.used == 0


def test_whoever_waits_for_one_that_is_preempted_comes_after_it():
    scheduler, blocks = scheduler_of(num_blocks=13, max_batch_tokens=9, prefill_chunk=4)
    add(scheduler, B[:7], A, A)
    assert [set(taken) for taken in steps(scheduler, 6)] == [{"0", "1"}] * 6
    assert steps(scheduler, 1) == [{"0": (12, 1)}]  # in the block that was the other's
    assert [seq.request_id for seq in scheduler.running] == ["0"]
    scheduler.abort("0")
    assert steps(scheduler, 3) == [{"1": (20, 9)}, {"1": (29, 9)}, {"1": (38, 2), "2": (36, 4)}]
    blocks.check(scheduler.running)


def test_places_go_to_those_behind_only_while_it_waits():
    scheduler, _ = scheduler_of(max_running=3, max_batch_tokens=12)
    add(scheduler, A, A, *[(i,) * 3 for i in range(300, 310)])
    assert [set(taken) for taken in steps(scheduler, 2)] == [{"0", "2"}, {"0", "2", "3"}]
    scheduler.abort("2")
    assert set(steps(scheduler, 1)[0]) == {"0", "3", "4"}
    while scheduler.running[0].remaining > 1:
        step(scheduler)
    scheduler.abort("3")
    assert set(steps(scheduler, 1)[0]) == {"0", "1", "4"}


def test_no_more_are_looked_at_than_could_run():
    scheduler, _ = scheduler_of(max_running=3, max_batch_tokens=12)
    add(scheduler, A, A, A, A, B)
    assert [set(taken) for taken in steps(scheduler, 2)] == [{"0"}, {"0"}]
    scheduler.abort("1")
    assert set(steps(scheduler, 1)[0]) == {"0", "4"}


class Read(list):
    """Tokens that note how many of them are looked at."""

    count = 0

    def __getitem__(self, places):
        self.count += len(range(len(self))[places]) if isinstance(places, slice) else 1
        return super().__getitem__(places)


def test_no_block_of_one_that_waits_is_looked_at_twice():
    scheduler, _ = scheduler_of(max_batch_tokens=8)
    _, waits = add(scheduler, A, A)
    waits.tokens = Read(waits.tokens)
    for computed in range(0, 40, 8):
        scheduler.schedule()
        step(scheduler)
        assert waits.tokens.count == computed + 4


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_choices_of_one_prompt_get_the_tokens_they_get_without(temperature):
    sampling = SamplingParams(max_tokens=8, temperature=temperature)
    prompt = tuple(i % VOCAB for i in range(50))
    outputs = []
    for prefix_cache in (True, False):
        config = EngineConfig(block_size=4, max_batch_tokens=64, max_running=8, prefix_cache=prefix_cache)
        engine = Engine(config, HistoryRunner(256, 4, max_context=200))
        for i in range(8):
            engine.submit(GenerationRequest(f"choice {i}", prompt, replace(sampling, seed=i)))
        outputs.append(drain(engine))
        assert engine.stats().prefix_hit_tokens == 7 * 48 * prefix_cache
    assert outputs[0].tokens == outputs[1].tokens
    assert outputs[0].reasons == outputs[1].reasons


def test_those_that_only_wait_for_a_prefix_count_as_running_and_their_prompts_as_nothing_to_compute():
    """Of more actors they would have nothing: who decides how many there are to be does not count them as a queue."""
    scheduler, _ = scheduler_of(max_batch_tokens=8, prefill_chunk=8)
    add(scheduler, *[A] * 4)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.pending_tokens) == (0, 4, 160)  # nobody has looked
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.pending_tokens) == (4, 0, 32)
    scheduler.abort("3")
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 0)
    steps(scheduler, 6)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.pending_tokens) == (3, 0, 0)
