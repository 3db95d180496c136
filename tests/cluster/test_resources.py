import pytest

from moeray.cluster.resources import Request, check_fits, for_experts, for_router
from moeray.errors import PlacementError
from moeray.settings.experts import ExpertGroupConfig
from moeray.settings.router import RouterConfig


@pytest.mark.parametrize(
    ("group", "gpus", "actors", "expected"),
    [
        (ExpertGroupConfig(), 0, 3, Request("cpu", 0.5, 0.0)),
        (ExpertGroupConfig(threads=8), 0, 3, Request("cpu", 4.0, 0.0)),
        (ExpertGroupConfig(threads=8, num_cpus=8), 0, 3, Request("cpu", 8, 0.0)),
        (ExpertGroupConfig(), 4, 3, Request("cuda", 0.5, 1.0)),
        (ExpertGroupConfig(), 1, 3, Request("cuda", 0.5, 0.33)),
        (ExpertGroupConfig(num_gpus=0.25), 1, 3, Request("cuda", 0.5, 0.25)),
        (ExpertGroupConfig(device="cuda"), 0, 3, Request("cuda", 0.5, 0.01)),
        (ExpertGroupConfig(device="cpu"), 4, 3, Request("cpu", 0.5, 0.0)),
        (ExpertGroupConfig(resources={"spot": 1}), 0, 3, Request("cpu", 0.5, 0.0, {"spot": 1})),
    ],
)
def test_what_an_expert_actor_asks_for(group, gpus, actors, expected):
    assert for_experts(group, gpus, actors) == expected


def test_what_a_router_asks_for():
    assert for_router(RouterConfig(), 0, 3) == Request("cpu", 0.5, 0.0)
    assert for_router(RouterConfig(device="cpu", resources={"head": 1}), 2, 3) == Request("cpu", 0.5, 0.0, {"head": 1})


@pytest.mark.parametrize(
    ("requests", "total", "words"),
    [
        ([Request("cpu", 2, 0)] * 2, {"CPU": 3}, r"4 CPU .* has 3; .*lower experts\.actors or experts\.threads"),
        ([Request("cuda", 0, 0.5)], {"CPU": 3}, "0.5 GPU .* has 0; .*num_gpus"),
        ([Request("cpu", 0, 0, {"spot": 1})], {"CPU": 1}, "1 spot .* has 0; .*resources: spot"),
    ],
)
def test_what_cannot_fit_is_named(requests, total, words):
    with pytest.raises(PlacementError, match=words):
        check_fits(requests, total)


def test_what_fits_passes():
    check_fits([Request("cuda", 0.5, 0.5)] * 2, {"CPU": 1, "GPU": 1})
