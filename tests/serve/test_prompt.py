"""The tokenizer and the chat template of a model."""

import asyncio
import subprocess
import sys

import pytest

from moeray.errors import CheckpointError, ConfigError, RequestError
from moeray.serve.prompt import EncoderCache, load_encoder, read_template
from tests.serve.support import model_info, save_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]


def test_long_text_is_tokenized_whole(metadata_dir):
    encoder = load_encoder(model_info(metadata_dir), None)
    long = "hello world " * 2000
    [ids] = asyncio.run(encoder.encode_prompts([long]))
    assert encoder.vocabulary.decode(ids) == long
    chat = asyncio.run(encoder.encode_chat([{"role": "user", "content": long}], {}))
    assert chat[1:-1] == ids


def test_a_model_without_a_chat_template_names_the_mend(tmp_path):
    model = model_info(save_tokenizer(tmp_path, template=None))
    with pytest.raises(RequestError, match="/v1/completions"):
        asyncio.run(load_encoder(model, None).encode_chat(MESSAGES, {}))
    template = tmp_path / "own.jinja"
    template.write_text("<|user|>{{ messages[0].content }}")
    from_file = asyncio.run(load_encoder(model, str(template)).encode_chat(MESSAGES, {}))
    from_text = asyncio.run(load_encoder(model, template.read_text()).encode_chat(MESSAGES, {}))
    assert from_file == from_text
    assert from_file[0] == 2


@pytest.mark.parametrize("template", ["{{ nothing.at.all }}", "{{ messages + 1 }}", "{{ 1 // 0 }}"])
def test_a_broken_template_is_answered(metadata_dir, template):
    encoder = load_encoder(model_info(metadata_dir), template)
    with pytest.raises(RequestError, match="chat template"):
        asyncio.run(encoder.encode_chat(MESSAGES, {}))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no usable tokenizer in .*: there are no files of one; put tokenizer"):
        load_encoder(model_info(tmp_path), None)
    with pytest.raises(ConfigError, match="chat_template"):
        read_template(str(tmp_path / "missing.jinja"))


@pytest.mark.parametrize(
    "text",
    [
        "{% if messages %}{{ messages[0].content }}{% endif %}",
        "{{ raise_exception('no messages') }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    ],
)
def test_a_template_is_read_whatever_it_makes_of_no_messages(tmp_path, text):
    (tmp_path / "chat.jinja").write_text(text)
    assert read_template(text) == read_template(str(tmp_path / "chat.jinja")) == text


@pytest.mark.parametrize("text", ["{% broken", "{% if messages %}", "{{ messages | no_such_filter }}"])
def test_a_text_that_is_no_template_is_refused(tmp_path, text):
    (tmp_path / "chat.jinja").write_text(text)
    for source in (text, str(tmp_path / "chat.jinja")):
        with pytest.raises(ConfigError, match=r"chat_template: .* is no Jinja template: .* \(line 1\)"):
            read_template(source)


def test_a_request_may_need_the_tokenizer_while_it_is_imported(metadata_dir):
    """In a process of its own, since what is imported once stays so."""
    both_at_once = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from moeray.serve.backend import ModelInfo
from moeray.serve.prompt import import_tokenizers, load_encoder

assert "transformers" not in sys.modules
model = ModelInfo("tiny", 0, 64, 64, Path(sys.argv[1]))
with ThreadPoolExecutor(2) as pool:
    imported, encoder = pool.submit(import_tokenizers), pool.submit(load_encoder, model, None)
assert encoder.result().vocabulary and imported.result()
"""
    subprocess.run([sys.executable, "-c", both_at_once, str(metadata_dir)], check=True, timeout=120)


def test_the_encoder_is_loaded_once(metadata_dir):
    async def twice():
        cache = EncoderCache(None)
        model = model_info(metadata_dir)
        return await asyncio.gather(cache.get(model), cache.get(model))

    first, second = asyncio.run(twice())
    assert first is second
