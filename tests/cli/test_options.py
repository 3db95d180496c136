"""The config that a command line describes."""

from __future__ import annotations

import pytest

from moeray.cli.options import config_of


@pytest.mark.parametrize(
    ("model", "flags", "defaults", "expected"),
    [
        ("", {}, {}, ("of-the-file", 4)),
        ("named", {}, {}, ("named", 4)),
        ("", {"config__model": None, "config__experts__actors": 3}, {}, ("of-the-file", 3)),
        ("", {}, {"experts__actors": 2}, ("of-the-file", 4)),
    ],
)
def test_what_is_named_ranks_above_the_file_and_the_file_above_a_commands_own(
    tmp_path, model, flags, defaults, expected
):
    file = tmp_path / "moeray.yaml"
    file.write_text("model: of-the-file\nexperts: {actors: 4}\n")
    config = config_of(model, str(file), flags, **defaults)
    assert (config.model, config.experts.actors) == expected


def test_a_commands_own_values_hold_without_a_file():
    config = config_of("", None, {"config__experts__actors": None}, experts__actors=3)
    assert (config.model, config.experts.actors) == ("", 3)
