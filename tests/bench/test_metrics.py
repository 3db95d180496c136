"""Counting costs next to nothing beside decoding."""

import json

from click.testing import CliRunner

from moeray.cli.main import cli


def test_counting_is_cheap():
    """The floor of a step and the cost of counting are both of this machine, at its best of several turns.

    About 0.01 where memory gives 100 GB/s, which is what `moeray bench metrics` is there to tell; here with room, since
    the faster the memory and the slower the clock, the larger the part.
    """
    result = CliRunner().invoke(cli, ["bench", "metrics", "--output", "json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert 0 < found["part"] < 0.03
    assert found["router_step_s"] > 0
    assert found["expert_forward_s"] > 0
