"""What the next step computes, by tables: order, budgets, admission, preemption, ends."""

import pytest

from moeray.engine.batch import Batch, Entry
from moeray.engine.blocks import BlockManager
from moeray.engine.runner import pack
from moeray.engine.sampling import SampledToken
from moeray.engine.scheduler import Scheduler
from moeray.engine.sequence import Sequence
from moeray.errors import QueueFullError, RequestError
from moeray.settings.engine import EngineConfig
from moeray.types import FinishReason, GenerationRequest, SamplingParams

EOS = 99


def scheduler_of(num_blocks=64, block_size=4, max_context=1000, **config):
    settings = {"max_running": 8, "max_batch_tokens": 64, "prefill_chunk": 16, "block_size": block_size} | config
    blocks = BlockManager(num_blocks, block_size, prefix_cache=False)
    return Scheduler(EngineConfig(**settings), blocks, max_context), blocks


def sequence(name, prompt, attempt=0, output=(), **sampling):
    params = SamplingParams(**({"max_tokens": 100} | sampling))
    return Sequence(GenerationRequest(name, tuple(range(prompt)), params, tuple(output), attempt), (EOS,))


def spans(batch):
    return {entry.seq.request_id: (entry.start, entry.count, entry.samples) for entry in batch.entries}


def step(scheduler, token=1):
    batch = scheduler.schedule()
    before = spans(batch)
    return before, scheduler.postprocess(batch, [SampledToken(token)] * len(batch.sampled))


@pytest.mark.parametrize(
    ("prompts", "shares"),
    [
        ([100], [64]),
        ([10, 10], [10, 10]),
        ([100, 100], [48, 16]),  # half, half of the rest, and what is left to the oldest
        ([100, 3], [61, 3]),  # a short prompt is not stuck behind a long one
        ([100, 100, 3], [45, 16, 3]),
        ([100, 3, 100], [46, 3, 15]),
    ],
)
def test_prefills_share_the_budget(prompts, shares):
    scheduler, _ = scheduler_of()
    for i, prompt in enumerate(prompts):
        scheduler.add(sequence(str(i), prompt))
    taken, _ = step(scheduler)
    assert [count for _, count, _ in taken.values()] == shares


def test_decodes_go_first_and_bound_the_prefill():
    scheduler, _ = scheduler_of()
    scheduler.add(sequence("a", 5))
    scheduler.add(sequence("b", 5))
    step(scheduler)
    scheduler.add(sequence("long", 40))
    assert step(scheduler)[0] == {"a": (5, 1, True), "b": (5, 1, True), "long": (0, 16, False)}
    assert step(scheduler)[0] == {"a": (6, 1, True), "b": (6, 1, True), "long": (16, 16, False)}
    assert step(scheduler)[0] == {"a": (7, 1, True), "b": (7, 1, True), "long": (32, 8, True)}
    assert step(scheduler)[0]["long"] == (40, 1, True)


def test_the_same_step_can_be_scheduled_again():
    scheduler, blocks = scheduler_of()
    scheduler.add(sequence("a", 100))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert spans(first) == spans(second)
    blocks.check(scheduler.running)


def test_the_latest_is_preempted_and_comes_back_first():
    scheduler, blocks = scheduler_of(num_blocks=6)
    for name, prompt in (("a", 8), ("b", 8), ("c", 4)):
        scheduler.add(sequence(name, prompt))
    assert set(step(scheduler)[0]) == {"a", "b"}  # c would leave no block for the growth of the others
    scheduler.add(sequence("d", 1))
    seen = [set(step(scheduler)[0]) for _ in range(8)]
    assert scheduler.preemptions == 1
    assert seen[-1] == {"a"}
    assert scheduler.abort("a")
    assert next(iter(step(scheduler)[0])) == "b"  # before c and d, which came later
    blocks.check(scheduler.running)


def test_a_sequence_that_fits_alone_always_ends():
    scheduler, blocks = scheduler_of(num_blocks=3, max_running=4)
    for i in range(4):
        scheduler.add(sequence(str(i), 6))
    ends = []
    while scheduler.has_work:
        ends += [o.request_id for o in step(scheduler)[1] if o.finish_reason is FinishReason.LENGTH]
        blocks.check(scheduler.running)
    assert ends == ["0", "1", "2", "3"]
    assert blocks.used == 0


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_abort_frees_at_once(when):
    scheduler, blocks = scheduler_of()
    scheduler.add(sequence("a", 100))
    for _ in range({"waiting": 0, "prefill": 1, "decode": 3}[when]):
        step(scheduler)
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert blocks.used == 0
    assert not scheduler.has_work
    assert scheduler.schedule() is None


@pytest.mark.parametrize(
    ("sampling", "drawn", "reason"),
    [
        ({"max_tokens": 1}, 5, FinishReason.LENGTH),
        ({"max_tokens": 2}, 5, None),
        ({"max_tokens": 9}, EOS, FinishReason.STOP),
        ({"max_tokens": 1}, EOS, FinishReason.STOP),
        ({"max_tokens": 9, "ignore_eos": True}, EOS, None),
        ({"max_tokens": 9, "stop_token_ids": (5,)}, 5, FinishReason.STOP),
        ({"max_tokens": 9, "ignore_eos": True, "stop_token_ids": (5,)}, 5, FinishReason.STOP),
    ],
)
def test_ends(sampling, drawn, reason):
    scheduler, blocks = scheduler_of()
    scheduler.add(sequence("a", 3, **sampling))
    _, [output] = step(scheduler, drawn)
    assert output.token_ids == (drawn,)
    assert output.finish_reason is reason
    assert (blocks.used == 0) is (reason is not None)


def test_the_context_ends_a_sequence():
    scheduler, _ = scheduler_of(max_context=6)
    scheduler.add(sequence("a", 4))
    assert [step(scheduler)[1][0].finish_reason for _ in range(2)] == [None, FinishReason.LENGTH]


def test_a_resumed_sequence_that_was_over_is_told_so_once():
    scheduler, _ = scheduler_of()
    scheduler.add(sequence("a", 3, output=(4, EOS), attempt=2))
    scheduler.add(sequence("b", 3, output=(4, 4), max_tokens=2))
    scheduler.add(sequence("c", 3, output=(4, EOS)))
    assert scheduler.abort("c")
    assert scheduler.has_work
    assert [(o.request_id, o.attempt, o.token_ids, o.finish_reason) for o in scheduler.take_ended()] == [
        ("a", 2, (), FinishReason.STOP),
        ("b", 0, (), FinishReason.LENGTH),
    ]
    assert not scheduler.has_work


def test_a_newer_attempt_replaces_the_older():
    scheduler, blocks = scheduler_of()
    scheduler.add(sequence("a", 3))
    step(scheduler)
    with pytest.raises(RequestError, match="attempt 0"):
        scheduler.add(sequence("a", 3))
    scheduler.add(sequence("a", 3, output=(1,), attempt=1))
    assert step(scheduler)[1][0].attempt == 1
    blocks.check(scheduler.running)


def test_what_cannot_fit_or_queue_is_refused():
    scheduler, _ = scheduler_of(num_blocks=4, max_waiting=2, max_running=1)
    with pytest.raises(RequestError, match="16 tokens but the prompt has 16") as refused:
        scheduler.add(sequence("long", 16))
    assert refused.value.code == "context_length_exceeded"
    for name in "abc":  # one runs from the next step on
        scheduler.add(sequence(name, 15))
    for _ in range(2):
        with pytest.raises(QueueFullError) as full:
            scheduler.add(sequence("d", 1))
        assert full.value.retry_after_s >= 1.0
        scheduler.add(sequence("c", 15, output=(), attempt=1 + scheduler.num_running))  # in the place that it had
        assert scheduler.num_waiting == 3 - scheduler.num_running
        scheduler.schedule()
    assert scheduler.num_running == 1
    assert not scheduler.abort("d")


def entry(table, start, count, prompt):
    seq = sequence(str(table), prompt)
    seq.block_table, seq.num_computed = table, start
    return Entry(seq, start, count, samples=start + count == prompt)


def test_pack_lays_entries_end_to_end():
    packed = pack(Batch((entry([7, 2], 5, 1, 6), entry([4, 1, 0], 3, 4, 9), entry([3], 0, 2, 2))), block_size=4)
    assert packed.token_ids_T.tolist() == [5, 3, 4, 5, 6, 0, 1]
    assert packed.position_ids_T.tolist() == [5, 3, 4, 5, 6, 0, 1]
    assert packed.slots_T.tolist() == [9, 19, 4, 5, 6, 12, 13]
    assert packed.query_starts == [0, 1, 5, 7]
    assert packed.context_lens == [6, 7, 2]
    assert packed.block_tables == [[7, 2], [4, 1, 0], [3]]
    assert packed.sample_index_S.tolist() == [0, 6]
    assert {t.dtype.itemsize for t in (packed.token_ids_T, packed.slots_T, packed.sample_index_S)} == {8}
