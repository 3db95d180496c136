"""What a command says where Ray does not let it in."""

from __future__ import annotations

import pytest

from moeray.cli.session import not_joined


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Could not find any running Ray instance. Please specify"), "no Ray cluster runs here"),
        # A cluster that wants another token, and one of another release of Ray.
        (ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"), "at 10.0.0.1:6379; where it asks for a"),
        (
            RuntimeError("Version mismatch: cluster\nwas started with:\n    Ray: 2.50"),
            "cluster was started with",
        ),
    ],
)
def test_a_refusal_of_rays_is_one_line_with_its_mend(error, words):
    said = not_joined(error)
    assert words in said
    assert "\n" not in said
    assert ("RAY_AUTH_MODE=token" in said) == ("runs here" not in said)
