"""How long a sequence may get: by the model, by the cache and by the config."""

import pytest

from moeray.engine.trunk_runner import longest_context
from moeray.errors import ConfigError


@pytest.mark.parametrize(
    ("asked", "own", "slots", "expected"),
    [
        (0, 512, 4096, 512),
        (0, 4096, 512, 512),  # as far as the cache goes
        (100, 512, 4096, 100),
        (512, 512, 512, 512),
    ],
)
def test_the_shortest_bound_holds(asked, own, slots, expected):
    assert longest_context(asked, own, slots) == expected


@pytest.mark.parametrize(
    ("asked", "own", "slots", "words"),
    [
        (513, 512, 4096, "engine.max_context: 513 tokens are more than the model's 512; lower it, or leave it out"),
        (513, 600, 512, "engine.max_context: 513 tokens do not fit the KV cache of 512; lower it, or raise engine.kv"),
    ],
)
def test_what_cannot_be_had_is_refused(asked, own, slots, words):
    with pytest.raises(ConfigError, match=words):
        longest_context(asked, own, slots)
