"""Block accounts: what is shared, what is evicted, what is never shared."""

import pytest

from moeray.engine.blocks import BlockManager
from moeray.engine.sequence import Sequence
from moeray.types import GenerationRequest


def sequence(tokens, name="s"):
    return Sequence(GenerationRequest(name, tuple(tokens)))


def computed(blocks, tokens, name="s"):
    """A sequence whose tokens all have their KV."""
    seq = sequence(tokens, name)
    assert blocks.allocate(seq)
    seq.num_computed = seq.num_tokens
    blocks.seal(seq)
    return seq


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (range(12), range(12), 8),  # the last token is always computed, so the third block is not taken
        (range(12), range(13), 12),
        (range(12), [0, 1, 2, 3, 4, 9], 4),
        (range(12), [1, 1, 2, 3, 4, 5, 6, 7, 8], 0),
        (range(12), [4, 5, 6, 7, 8], 0),  # the same block behind another prefix is another block
        (range(3), range(9), 0),  # a block that is not full is not shared
        (range(12), [0], 0),
    ],
)
def test_the_longest_known_prefix_is_shared(first, second, shared):
    blocks = BlockManager(16, 4, prefix_cache=True)
    a = computed(blocks, first)
    b = sequence(second, "b")
    assert blocks.allocate(b)
    assert b.num_computed == shared
    assert b.block_table[: shared // 4] == a.block_table[: shared // 4]
    assert not set(b.block_table[shared // 4 :]) & set(a.block_table)
    blocks.check([a, b])
    blocks.free(a)
    blocks.check([b])
    blocks.free(b)
    blocks.check([])
    assert blocks.used == 0


def test_without_prefix_cache_nothing_is_shared():
    blocks = BlockManager(16, 4, prefix_cache=False)
    a = computed(blocks, range(12))
    b = sequence(range(12), "b")
    assert blocks.allocate(b)
    assert b.num_computed == 0
    blocks.check([a, b])


def test_blocks_not_yet_computed_are_not_shared():
    blocks = BlockManager(16, 4, prefix_cache=True)
    a, b = sequence(range(12), "a"), sequence(range(12), "b")
    assert blocks.allocate(a)
    a.num_computed = 7
    blocks.seal(a)
    assert blocks.allocate(b)
    assert b.num_computed == 4


def test_the_next_block_that_nobody_can_share_is_waited_for():
    blocks = BlockManager(16, 4, prefix_cache=True)
    a, b = sequence(range(15), "a"), sequence(range(8), "b")
    assert blocks.allocate(a)
    assert blocks.allocate(b)
    waits = [sequence(range(n)) for n in (8, 9, 12, 13)]

    def waiting():
        return [blocks.awaits(seq, [pending] if (pending := blocks.pending(a)) else []) for seq in waits]

    a.num_computed = 6
    blocks.seal(a)
    assert waiting() == [False, True, True, True]  # for the second block, but who ends with it computes it anyway
    b.num_computed = 8
    blocks.seal(b)
    assert waiting() == [False, False, False, True]  # for the third: the second can be taken from b
    a.num_computed = 12
    blocks.seal(a)
    assert waiting() == [False] * 4
    blocks.check([a, b])


def test_equal_hashes_never_serve_other_tokens():
    blocks = BlockManager(16, 1, prefix_cache=True)
    computed(blocks, [-1, 5])
    b = sequence([-2, 5], "b")
    assert hash((0, (-1,))) == hash((0, (-2,)))
    assert blocks.allocate(b)
    assert b.num_computed == 0


def test_freed_blocks_are_found_again_until_they_are_needed_longest_unused_first():
    blocks = BlockManager(6, 2, prefix_cache=True)
    blocks.free(computed(blocks, [1, 2, 3, 4]))
    blocks.free(computed(blocks, [5, 6, 7, 8]))
    assert blocks.available == 6
    c = computed(blocks, range(20, 26), "c")  # takes the two free blocks, then the end of the oldest prefix
    probe = sequence([1, 2, 3, 4, 0], "probe")
    assert blocks.allocate(probe)
    assert probe.num_computed == 2
    blocks.check([c, probe])


def test_an_allocation_that_does_not_fit_changes_nothing():
    blocks = BlockManager(4, 2, prefix_cache=True)
    blocks.free(computed(blocks, [1, 2, 3, 4]))
    a = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9], "a")
    assert not blocks.allocate(a)  # five blocks, two of them known
    assert not blocks.allocate(sequence([1, 2, 3, 4, 5], "b"), spare=2)
    assert a.block_table == []
    assert blocks.available == 4
    blocks.check([])


def test_extend_takes_blocks_or_changes_nothing():
    blocks = BlockManager(2, 2, prefix_cache=True)
    a = computed(blocks, [1, 2])
    a.append(3)
    assert blocks.extend(a)
    assert len(a.block_table) == 2
    a.append(4)
    assert blocks.extend(a)
    a.append(5)
    assert not blocks.extend(a)
    assert len(a.block_table) == 2
    blocks.check([a])


def test_a_private_copy_of_known_tokens_is_not_cached_twice():
    blocks = BlockManager(8, 2, prefix_cache=True)
    a, b = sequence([1, 2, 3], "a"), sequence([1, 2, 3], "b")
    assert blocks.allocate(a)
    assert blocks.allocate(b)  # nothing is sealed yet, so both compute the same
    for seq in (a, b):
        seq.num_computed = 3
        blocks.seal(seq)
    blocks.check([a, b])
    assert a.prefix == b.prefix
    blocks.free(b)
    blocks.free(a)
    c = sequence([1, 2, 9], "c")
    assert blocks.allocate(c)
    assert c.num_computed == 2
    blocks.check([c])


def test_blocks_freed_without_keeping_are_forgotten_even_where_shared():
    blocks = BlockManager(8, 2, prefix_cache=True)
    a = computed(blocks, [1, 2, 3, 4, 5])
    b = sequence([1, 2, 3, 4, 5], "b")
    assert blocks.allocate(b)
    blocks.free(a, keep=False)
    blocks.check([b])
    c = sequence([1, 2, 3, 4, 5], "c")
    assert blocks.allocate(c)
    assert c.num_computed == 0
    blocks.check([b, c])


def test_check_sees_a_lost_block():
    blocks = BlockManager(4, 2, prefix_cache=True)
    seq = computed(blocks, [1, 2, 3])
    with pytest.raises(AssertionError, match="references"):
        blocks.check([])
    blocks.check([seq])
