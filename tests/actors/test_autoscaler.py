"""From what actors report to what is wanted: the autoscaler over a roster, without any actor behind it."""

import pytest

from moeray.actors.autoscaler import Autoscaler
from moeray.actors.roster import Roster
from moeray.actors.spec import ActorReport
from moeray.config import config_from, overlay
from moeray.control.fleet import Phase
from moeray.control.placement import Placement
from moeray.control.reports import ExpertReport
from moeray.errors import ConfigError
from moeray.types import ExpertId

FIRST, LATER = 100.0, 110.0


def system(dear="auto", cheap="cpu", runs_on="cpu", busy=1.0, policies=("target_utilisation",), failed=None):
    """The autoscaler of two actors in each of two groups, their placement and config. They were `busy` so far; those
    of `dear` run on `runs_on` (None: nothing is heard of where)."""
    groups = [
        {"name": "dear", "device": dear, "actors": 2, "min_actors": 1, "max_actors": 8, "price_per_hour": 5.0},
        {"name": "cheap", "device": cheap, "actors": 2, "min_actors": 1, "max_actors": 8, "price_per_hour": 0.1},
    ]
    config = config_from({"experts": {"groups": groups}, "control": {"policies": policies}})
    roster, clock = Roster(), [FIRST]
    autoscaler = Autoscaler(config, roster, failed or pytest.fail, lambda: clock[0])
    for kind in config.experts.resolved():
        for _ in range(2):
            actor = roster.new(kind, config, 0.0)
            actor.phase = Phase.READY
            device = runs_on if kind.name == "dear" else cheap
            if device is not None:
                actor.report = ActorReport(actor.actor_id, "n0", 1, device, 1 << 30)
    for clock[0] in (FIRST, LATER):
        for actor in roster:
            autoscaler.fold(ExpertReport(actor.actor_id, "1", busy_s=busy * (clock[0] - FIRST)))
    placement = Placement(1, {ExpertId(0, 0): tuple(actor.actor_id for actor in roster)})
    return autoscaler, placement, config


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ({}, {"dear": 3, "cheap": 4}),  # 7 actors in all: the cheaper group grows first
        ({"dear": "cpu"}, {"dear": 3, "cheap": 4}),
        ({"runs_on": "cuda"}, {"dear": 4, "cheap": 4}),  # a tier of its own: its own work needs 4
        ({"dear": "cuda", "runs_on": "cuda"}, {"dear": 4, "cheap": 4}),
        ({"cheap": "cuda", "runs_on": "cuda"}, {"dear": 3, "cheap": 4}),
        ({"dear": "cuda", "runs_on": None}, {"dear": 4, "cheap": 4}),
    ],
)
def test_groups_are_a_tier_by_what_their_actors_run_on(groups, wanted):
    autoscaler, placement, _ = system(**groups)
    wish, _ = autoscaler.decide(placement)
    assert wish.actors == wanted


def test_nothing_scales_by_itself_below_the_replicas():
    autoscaler, placement, config = system(busy=0.0)
    autoscaler.configure(overlay(config, {"experts": {"replicas": 4}, "control": {"shrink_votes": 2}}))
    autoscaler.scale({"dear": 3})
    for _ in range(4):
        autoscaler.decide(placement)
    assert autoscaler.wish.actors == {"dear": 1, "cheap": 3}


def test_a_policy_that_fails_is_told_once_and_the_others_decide(monkeypatch, tmp_path):
    (tmp_path / "sloppy_policies.py").write_text(
        "from moeray.control.policy import Wish\n\n\ndef policy(seen):\n    return Wish(actors=None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    heard = []
    autoscaler, placement, _ = system(policies=("sloppy_policies:policy", "target_utilisation"), failed=heard.append)
    wish, _ = autoscaler.decide(placement)
    autoscaler.decide(placement)
    assert wish.actors == {"dear": 3, "cheap": 4}
    (message,) = heard
    assert "sloppy_policies.policy" in message


def test_a_config_whose_policy_cannot_be_imported_changes_nothing(monkeypatch, tmp_path):
    (tmp_path / "raising_policies.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    autoscaler, placement, config = system()
    with pytest.raises(ConfigError, match=r"control.policies: 'raising_policies:policy' .*no licence"):
        autoscaler.configure(overlay(config, {"control": {"policies": ["raising_policies:policy"]}}))
    wish, _ = autoscaler.decide(placement)
    assert wish.actors == {"dear": 3, "cheap": 4}
