import pytest

from moeray.engine.trials import COUNTED, SETTLED, UNCOUNTED, Trials

TURNS = UNCOUNTED + COUNTED


def seconds(usual, other):
    """What turn i of a trial takes, either way."""
    return lambda i, is_other: (other if is_other else usual)(i)


def work(trials, kind, turns, takes):
    """So many turns; which of them were done the other way."""
    done = []
    for i in range(turns):
        other = trials.next(kind)
        trials.note(kind, other, takes(i, other))
        done.append(other)
    return done


@pytest.mark.parametrize(
    ("usual", "other", "wins"),
    [
        (lambda i: 1.0, lambda i: 0.5, True),
        (lambda i: 1.0, lambda i: 2.0, False),
        (lambda i: 1.0, lambda i: 0.97, False),  # not worth two of everything
        (lambda i: 1.0, lambda i: 9.0 if i < TURNS + UNCOUNTED else 0.5, True),  # its first turns are slow
        (lambda i: 9.0 if i < UNCOUNTED else 0.5, lambda i: 0.6, False),
        (lambda i: 1.0, lambda i: 9.0 if i % 2 else 0.5, True),  # something else held some of its turns up
    ],
)
def test_the_faster_way_is_kept(usual, other, wins):
    trials = Trials()
    done = work(trials, "decode", SETTLED, seconds(usual, other))
    assert done[: 2 * TURNS] == [False] * TURNS + [True] * TURNS
    assert set(done[2 * TURNS :]) == {wins}


def test_both_are_tried_again_after_a_while():
    trials = Trials()
    work(trials, "decode", SETTLED, seconds(lambda i: 1.0, lambda i: 0.5))
    done = work(trials, "decode", SETTLED, seconds(lambda i: 0.5, lambda i: 1.0))
    assert done == [False] * TURNS + [True] * TURNS + [False] * (SETTLED - 2 * TURNS)


def test_kinds_are_tried_each_for_itself():
    trials = Trials()
    work(trials, "decode", 2 * TURNS, seconds(lambda i: 1.0, lambda i: 0.5))
    assert trials.next("decode")
    assert not trials.next("prefill")
