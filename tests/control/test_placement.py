from collections import Counter

import pytest

from moeray.control.eplb import place
from moeray.control.placement import Host, Placement
from moeray.errors import PlacementError
from moeray.types import ExpertId

BIG = 1 << 40


def hosts(*shares, capacity=BIG):
    return [Host(f"a{i}", capacity, share) for i, share in enumerate(shares)]


def per_layer(placement, layer):
    return Counter(a for e, held in placement.replicas.items() if e.layer == layer for a in held)


def test_every_layer_is_spread_evenly():
    placement = place({}, hosts(1, 1), experts={0: 8, 2: 8, 5: 7}, expert_bytes={0: 10, 2: 10, 5: 10})
    assert per_layer(placement, 0) == {"a0": 4, "a1": 4}
    assert sorted(per_layer(placement, 5).values()) == [3, 4]
    assert placement.epoch == 1


def test_shares_weigh():
    placement = place({}, hosts(3, 1), experts={0: 12}, expert_bytes={0: 1})
    assert per_layer(placement, 0) == {"a0": 9, "a1": 3}


def test_replicas_are_on_different_actors():
    placement = place({}, hosts(1, 1, 1), experts={0: 5, 1: 5}, expert_bytes={0: 1, 1: 1}, replicas=2)
    assert all(len(set(held)) == 2 for held in placement.replicas.values())


def test_a_small_host_takes_what_fits():
    small = [Host("small", 25), Host("large", BIG)]
    placement = place({}, small, experts={0: 8}, expert_bytes={0: 10})
    assert per_layer(placement, 0) == {"small": 2, "large": 6}


def test_no_room_says_how_much_is_missing():
    with pytest.raises(PlacementError, match=r"4\.00 GiB.*2\.00 GiB"):
        place({}, hosts(1, 1, capacity=1 << 30), experts={0: 4}, expert_bytes={0: 1 << 30})


def test_too_few_hosts_for_the_replicas():
    with pytest.raises(PlacementError, match="2 replicas"):
        place({}, hosts(1), experts={0: 4}, expert_bytes={0: 1}, replicas=2)


def test_without_an_actor_is_the_next_epoch():
    placement = Placement(3, {ExpertId(0, 0): ("a", "b"), ExpertId(0, 1): ("a",)})
    after = placement.without("a")
    assert after == Placement(4, {ExpertId(0, 0): ("b",), ExpertId(0, 1): ()})


def test_plain_data_round_trip():
    placement = place({}, hosts(1, 1, 1), experts={0: 5, 3: 2}, expert_bytes={0: 1, 3: 1}, replicas=2)
    assert Placement.from_tree(placement.to_tree()) == placement
