"""A model's advice on sampling: taken as far as it can be followed."""

import json
import logging

import pytest

from moeray.model.generation import sampling_defaults


@pytest.mark.parametrize(
    ("says", "taken"),
    [
        ({"top_k": 50, "temperature": 0.7, "eos_token_id": [1, 2]}, {"top_k": 50, "temperature": 0.7}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": -1}, {"top_k": -1}),
        ({"top_k": None, "top_p": None}, {}),
        ({"top_k": "20"}, {}),
        ({"top_k": 2.5}, {}),
        ({"top_k": True}, {}),
        ({"temperature": 3.0, "top_p": 0, "min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": [1.1]}, {}),
    ],
)
def test_what_cannot_be_followed_is_left_out(says, taken, tmp_path, caplog):
    (tmp_path / "generation_config.json").write_text(json.dumps(says))
    with caplog.at_level(logging.WARNING):
        found = sampling_defaults(tmp_path)
    assert found == taken
    assert {name: type(value) for name, value in found.items()} == {k: type(v) for k, v in taken.items()}
    dropped = {name for name, value in says.items() if value is not None} - found.keys() - {"eos_token_id"}
    assert all(any(f": {name} must be" in line for line in caplog.messages) for name in dropped)
