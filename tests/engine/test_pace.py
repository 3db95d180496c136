"""How many prompt tokens a step takes so that what decodes keeps its pace."""

import pytest

from moeray.engine.pace import Pace


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
    pace = Pace(256)
    pace.keep_to(0.2)
    for step in steps:
        pace.note(*step)
    assert pace.chunk == chunk


@pytest.mark.parametrize(("most", "step_s"), [(256, None), (8, 0.2)])
def test_nothing_is_cut_without_a_limit_or_below_the_least(most, step_s):
    pace = Pace(most)
    pace.keep_to(step_s)
    pace.note(4, 256, 9.0)
    assert pace.chunk == most


def test_a_limit_that_is_lifted_gives_back_the_whole_chunk():
    pace = Pace(256)
    pace.keep_to(0.2)
    pace.note(4, 256, 9.0)
    pace.keep_to(1.0)
    assert pace.chunk == 128
    pace.keep_to(None)
    assert pace.chunk == 256
    pace.note(4, 256, 9.0)
    assert pace.chunk == 256
