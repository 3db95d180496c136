import pytest

from moeray.engine.pace import Pace
from moeray.settings.engine import EngineConfig


@pytest.mark.parametrize(
    ("steps", "chunk"),
    [
        ([], 256),
        ([(4, 256, 0.21)], 128),  # too long
        ([(4, 256, 0.20)], 256),
        ([(4, 256, 9.0)] * 20, 16),  # a prompt always gets on
        ([(0, 2048, 9.0), (4, 0, 9.0)], 256),  # kept nobody waiting, and tells nothing of prefills
        ([(4, 256, 0.3), (4, 128, 0.13)], 128),  # twice as much might be too long
        ([(4, 256, 0.3), (4, 128, 0.12)], 256),
        ([(4, 256, 0.3), (4, 100, 0.05)], 128),  # not as much as it might have had
        ([(4, 256, 0.1)], 256),  # the most
    ],
)
def test_the_chunk_follows_how_long_steps_last(steps, chunk):
    pace = Pace(EngineConfig(step_s=0.2))
    for step in steps:
        pace.note(*step)
    assert pace.chunk == chunk


@pytest.mark.parametrize(("config", "chunk"), [({}, 256), ({"step_s": 0.2, "prefill_chunk": 8}, 8)])
def test_nothing_is_cut_without_a_limit_or_below_the_least(config, chunk):
    pace = Pace(EngineConfig(**config))
    pace.note(4, 256, 9.0)
    assert pace.chunk == chunk
