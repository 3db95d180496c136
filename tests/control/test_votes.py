from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.control.policy import Wish
from moeray.control.votes import settle
from moeray.types import ExpertId

HOT = ExpertId(0, 0)


@pytest.mark.parametrize(
    ("current", "votes", "settled"),
    [
        (3, [5], 5),  # up at once
        (3, [9, 4], 4),  # to the newest, not to the largest
        (3, [3, 3, 3], 3),
        (3, [1, 1], 3),  # too few votes
        (3, [1, 2, 1], 2),  # all want less: the largest of them
        (3, [1, 3, 1], 3),  # one of them did not
        (3, [4, 1, 1, 1], 1),  # which is forgotten by now
        (3, [], 3),
    ],
)
def test_grow_at_once_and_shrink_by_agreement(current, votes, settled):
    groups = settle(Wish({"experts": current}), [Wish({"experts": vote}) for vote in votes], 3)
    assert groups.actors == {"experts": settled}
    routers = settle(Wish(routers=current), [Wish(routers=vote) for vote in votes], 3)
    assert routers.routers == settled
    replicas = settle(Wish(replicas={HOT: current}), [Wish(replicas={HOT: vote}) for vote in votes], 3)
    assert replicas.replicas == {HOT: settled}


def test_no_opinion_keeps_actors_and_is_a_vote_against_replicas():
    current = Wish({"experts": 3}, 2, {HOT: 2})
    assert settle(current, [Wish()] * 2, 3) == current
    assert settle(current, [Wish()] * 3, 3) == Wish({"experts": 3}, 2)


def test_a_wish_without_opinion_is_a_vote_for_staying():
    wishes = [Wish({"experts": 1}), Wish(), Wish({"experts": 1})]
    assert settle(Wish({"experts": 3}), wishes, 3).actors == {"experts": 3}


def test_what_is_new_is_taken_at_once():
    wish = Wish({"gpus": 2}, 1, {HOT: 3}, ("because",))
    assert settle(Wish(), [Wish({"cpus": 9}), wish], 3) == wish


@given(
    low=st.integers(1, 50),
    rise=st.integers(1, 20),
    shrink_votes=st.integers(2, 15),
    noise=st.lists(st.booleans(), min_size=1, max_size=200),
)
def test_a_load_around_a_threshold_causes_one_reversal_at_most(low, rise, shrink_votes, noise):
    """However the wish swings between two values: as long as no `shrink_votes` in a row agree, it is up once."""
    votes, lows = [], 0
    for is_low in noise:
        lows = lows + 1 if is_low and lows < shrink_votes - 1 else 0
        votes.append(low if lows else low + rise)
    current, history, states = Wish({"experts": low}), [], [low]
    for vote in votes:
        history.append(Wish({"experts": vote}))
        current = settle(current, history, shrink_votes)
        states.append(current.actors["experts"])
    directions = [after > before for before, after in pairwise(states) if after != before]
    assert sum(a != b for a, b in pairwise(directions)) <= 1
    assert states[-1] in (low, low + rise)


@given(votes=st.lists(st.integers(1, 9), min_size=1, max_size=60), shrink_votes=st.integers(1, 8))
def test_never_below_the_newest_wish_nor_above_the_largest_recent_one(votes, shrink_votes):
    current, history = Wish({"experts": 1}), []
    for vote in votes:
        history.append(Wish({"experts": vote}))
        current = settle(current, history, shrink_votes)
        assert vote <= current.actors["experts"] <= max(votes)
    for _ in range(shrink_votes):
        history.append(Wish({"experts": 1}))
        current = settle(current, history, shrink_votes)
    assert current.actors["experts"] == 1
