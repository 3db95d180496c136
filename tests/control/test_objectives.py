import pytest

from moeray.control.objectives import Objectives
from moeray.settings.control import ControlConfig


@pytest.mark.parametrize(
    ("objectives", "first_s", "last_s", "tokens", "late"),
    [
        (Objectives(), 900.0, 1800.0, 2, False),
        (Objectives(ttft_s=2.0), 2.0, 90.0, 3, False),
        (Objectives(ttft_s=2.0), 2.1, 2.1, 1, True),
        (Objectives(tpot_s=0.5), 9.0, 11.0, 5, False),
        (Objectives(tpot_s=0.5), 9.0, 11.1, 5, True),
        (Objectives(tpot_s=0.5), 9.0, 9.0, 1, False),  # one token has nothing after it
        (Objectives(2.0, 0.5), 1.0, 2.6, 4, True),
    ],
)
def test_a_request_is_late_by_either_objective(objectives, first_s, last_s, tokens, late):
    assert objectives.late(first_s, last_s, tokens) is late


def test_they_come_from_the_config():
    assert Objectives.of(ControlConfig(slo_ttft_s=3.0)) == Objectives(3.0, None)
    assert Objectives.of(ControlConfig(slo_tpot_s=0.2, slo_pace=0.5)) == Objectives(None, 0.2, 0.1)
    assert Objectives.of(ControlConfig(slo_pace=0.5)) == Objectives()  # a part of nothing
