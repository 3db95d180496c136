"""Both halves of a step at the same time: what is cut where, that they overlap, and that the tokens stay the same."""

from __future__ import annotations

import threading

import pytest
import torch

from moeray.engine.batch import Batch, Entry
from moeray.engine.engine import Engine
from moeray.engine.overlap import OverlapRunner, halves, may_overlap, overlapped
from moeray.engine.sequence import Sequence
from moeray.engine.trials import COUNTED, UNCOUNTED
from moeray.engine.trunk_runner import TrunkRunner
from moeray.errors import PlacementError
from moeray.model.dispatched import summed
from moeray.model.loading import open_model
from moeray.model.trunk import Trunk
from moeray.settings.engine import EngineConfig
from moeray.types import GenerationRequest
from tests.checkpoints import make_tiny
from tests.families.test_bf16 import InProcess
from tests.systems import GREEDY24

CPU = torch.device("cpu")
WAIT_S = 60.0
CONFIG = EngineConfig(kv_blocks=64, block_size=8, prefill_chunk=16, max_batch_tokens=48, max_running=8)
PROMPTS = [torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 29, 14, 30, 1)]


def batch_of(*counts):
    seqs = [Sequence(GenerationRequest(f"r{i}", tuple([1] * n), GREEDY24), ()) for i, n in enumerate(counts)]
    return Batch(tuple(Entry(seq, 0, n, True) for seq, n in zip(seqs, counts, strict=True)))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1, 1, 1, 1), (2, 2)),
        ((1, 1, 1), (1, 2)),
        ((1, 1, 1, 100), (3, 1)),
        ((100, 1, 1, 1), (1, 3)),
        ((5, 5, 7, 3), (2, 2)),
        ((7, 7), (1, 1)),
    ],
)
def test_a_batch_is_cut_in_the_middle_of_its_tokens(counts, expected):
    batch = batch_of(*counts)
    parts = halves(batch)
    assert tuple(len(part.entries) for part in parts) == expected
    assert parts[0].entries + parts[1].entries == batch.entries


def test_one_sequence_has_no_halves():
    assert halves(batch_of(2048)) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return open_model(str(make_tiny("granitemoe", tmp_path_factory.mktemp("overlap") / "tiny")), None, node="here")


@pytest.fixture
def whole(files):
    trunk = Trunk.load(files.checkpoint, files.family, files.weights, torch.float32, CPU, CONFIG)
    return TrunkRunner(trunk, CONFIG, summed(InProcess(files, torch.float32)), ())


def generated(runner, prompts=PROMPTS):
    engine = Engine(CONFIG, runner)
    tokens = {}
    for i, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"r{i}", tuple(prompt), GREEDY24))
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


class Experts:
    """A half's experts; `meets`: whoever has rows waits for the other half's."""

    def __init__(self, files, meets=None):
        self._rows = InProcess(files, torch.float32)
        self._meets = meets
        self.threads = set()

    def __call__(self, layer, x_TD, ids_TK):
        self.threads.add(threading.current_thread().name)
        if self._meets is not None:
            self._meets.wait(WAIT_S)
        return self._rows(layer, x_TD, ids_TK)


def test_the_tokens_are_those_of_whole_batches(files, whole):
    runner = OverlapRunner(whole, (Experts(files), Experts(files)))
    assert generated(runner) == generated(whole)


def test_either_half_waits_for_its_rows_while_the_other_does(files, whole):
    """Each layer's rows of one half are answered only once the other's are under way too."""
    meet = threading.Barrier(2)
    first, second = Experts(files, meet), Experts(files, meet)
    prompts = [PROMPTS[2], PROMPTS[2][::-1]]  # as long: they end together
    assert generated(OverlapRunner(whole, (first, second)), prompts) == generated(whole, prompts)
    assert len(first.threads) == 1
    assert first.threads.isdisjoint(second.threads)
    assert not any("second-half" in thread.name for thread in threading.enumerate())


def test_the_trunk_computes_one_half_at_a_time(files, whole, monkeypatch):
    monkeypatch.setattr(whole._trunk, "_decoding", [])  # every step by the modules, which have hooks
    inside, most = set(), []

    def enter(*_):
        inside.add(threading.current_thread())
        most.append(len(inside))

    for module in whole._trunk.model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(lambda *_: inside.remove(threading.current_thread()))
    generated(OverlapRunner(whole, (Experts(files), Experts(files))))
    assert len(most) > 24
    assert set(most) == {1}


@pytest.mark.parametrize("half", [0, 1])
def test_a_step_that_fails_in_one_half_can_be_done_again(files, whole, half):
    class Failing(Experts):
        fails = True

        def __call__(self, *args):
            if Failing.fails:
                raise PlacementError("no replica")
            return super().__call__(*args)

    experts = [Experts(files), Experts(files)]
    experts[half] = Failing(files)
    runner = OverlapRunner(whole, tuple(experts))
    engine = Engine(CONFIG, runner)
    for i, prompt in enumerate(PROMPTS):
        engine.submit(GenerationRequest(f"r{i}", tuple(prompt), GREEDY24))
    for _ in range(2):
        with pytest.raises(PlacementError, match="no replica"):
            engine.step()
    Failing.fails = False
    tokens = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert tokens == generated(whole)


def test_auto_tries_both_where_it_may_pay_and_nowhere_else(files, whole):
    local, apart = (Experts(files), Experts(files)), (Experts(files), Experts(files))
    batch = batch_of(4, 4)
    for entry in batch.entries:
        entry.seq.block_table = [int(entry.seq.request_id[1:])]
    for rows, pays in ((local, False), (apart, True)):
        runner = overlapped(whole, rows, "auto", lambda pays=pays: pays)
        for _ in range(2 * (UNCOUNTED + COUNTED)):
            torch.testing.assert_close(runner.run(batch).logits_SV, whole.run(batch).logits_SV)
        assert [bool(half.threads) for half in rows] == [pays, pays]


def test_off_is_whole_batches(files, whole):
    assert overlapped(whole, (Experts(files), Experts(files)), "off", lambda: True) is whole


@pytest.mark.parametrize(
    ("overlap", "device", "nodes", "expected"),
    [
        ("auto", "cpu", {"here"}, False),
        ("auto", "cpu", set(), False),
        ("auto", "cpu", {"here", "there"}, True),
        ("auto", "cuda", {"here"}, True),
        ("on", "cpu", {"here"}, True),
        ("off", "cuda", {"there"}, False),
    ],
)
def test_halves_are_for_a_trunk_that_shares_no_cores_with_some_experts(overlap, device, nodes, expected):
    assert may_overlap(overlap, torch.device(device), "here", nodes) is expected
