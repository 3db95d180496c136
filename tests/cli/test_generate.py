"""What `moeray generate` refuses before a model is loaded, and what only the model tells."""

import json

import pytest
from click.testing import CliRunner

from moeray.cli.main import cli
from tests.checkpoints import make_tiny


def generate(*options):
    return CliRunner().invoke(cli, ["generate", *options])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ("1,two", "--prompt-ids must be numbers with commas between, got '1,two'"),
        ("", "--prompt-ids must be numbers"),
        ("5,-1", "--prompt-ids must be 0 or more, got '5,-1'"),
    ],
)
def test_wrong_ids_are_refused_before_the_model_is_looked_for(ids, words, tmp_path):
    result = generate(str(tmp_path / "nowhere"), "--prompt-ids", ids)
    assert result.exit_code != 0
    assert words in str(result.exception)


@pytest.mark.parametrize(
    ("option", "number", "words"),
    [
        ("--seed", 2**64, "seed must be a number of 64 bits"),
        ("--seed", -(2**63) - 1, "seed must be a number of 64 bits"),
        ("--top-k", 2**64, "top_k must be 0 (off) or more, and below 2**31"),
    ],
)
def test_numbers_that_no_request_can_carry_are_refused_at_once(option, number, words, tmp_path):
    result = generate(str(tmp_path / "nowhere"), "--prompt-ids", "1", option, str(number))
    assert result.exit_code != 0
    assert words in str(result.exception)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny("granitemoe", tmp_path_factory.mktemp("generate") / "m"))


LOCAL = ("--local", "--wire-remote", "off")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt-ids", "999999"), "token id 999999 is not in the vocabulary of 320 tokens"),
        (("--prompt-ids", "1,2", "--max-tokens", "511"), "over the model's context of 512 tokens; ask for at most 510"),
        (("--prompt-ids", "1", "--engine-max-context", "513"), "513 tokens are more than the model's 512"),
    ],
)
def test_what_the_model_cannot_do_is_refused(model, options, words):
    result = generate(model, *LOCAL, *options)
    assert result.exit_code != 0
    assert words in str(result.exception)


def test_the_whole_context_can_be_used(model):
    result = generate(model, *LOCAL, "--prompt-ids", "1,2", "--max-tokens", "510", "--ignore-eos", "--output", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["usage"]["total_tokens"] == 512


def test_a_tokenizer_of_any_files_is_used(tmp_path):
    folder = make_tiny("qwen2_moe", tmp_path / "m", tokenizer=True)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    result = generate(str(folder), *LOCAL, "--prompt", "hello", "--max-tokens", "3")
    assert result.exit_code == 0, result.output


def test_a_broken_tokenizer_is_needed_for_text_alone(tmp_path):
    folder = make_tiny("granitemoe", tmp_path / "m")
    (folder / "tokenizer.json").write_text("{")
    result = generate(str(folder), *LOCAL, "--prompt-ids", "1,2", "--max-tokens", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(",") == 2
    result = generate(str(folder), *LOCAL, "--prompt", "hello")
    assert result.exit_code != 0
    assert f"no usable tokenizer in {folder}" in str(result.exception)
    assert "or give --prompt-ids" in str(result.exception)
