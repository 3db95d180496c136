"""Incremental text equals the text decoded at once, whatever the borders of the tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeray.serve.detokenize import IncrementalDetokenizer
from moeray.serve.tokens import Vocabulary
from tests.serve.support import save_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("byte-level")))


@pytest.fixture(scope="module")
def byte_fallback():
    """SentencePiece's habits: a leading space is a character, unknown characters fall back to bytes."""
    words = ["<unk>", "</s>", "▁", "▁Paris", "▁is", "▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        ("▁", " "),
        ("▁▁", "  "),
        ("▁▁▁▁b", "    b"),
        ("▁is", " is"),
        ("b", "b"),
        ("<0xF0>", "bytes:\\xf0"),
        ("</s>", "</s>"),
    ],
)
def test_a_piece_by_itself_keeps_all_its_spaces(piece, shown):
    words = {piece: 0, "<unk>": 1, "</s>": 2} if piece != "</s>" else {"</s>": 0, "<unk>": 1}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    assert Vocabulary(fast).token(0).text == shown


def run(tokenizer, ids, stop=(), context=(), include_stop=False, unstopped=0):
    vocabulary = Vocabulary(tokenizer)
    text = IncrementalDetokenizer(
        vocabulary.decode, stop=stop, include_stop=include_stop, skip=vocabulary.special_ids, context=context
    )
    deltas = [text.feed(i, place >= unstopped) for place, i in enumerate(ids)]
    return [*deltas, text.finish(len(ids) > unstopped)], text.stopped


@given(text=st.text(max_size=40))
def test_deltas_add_up_to_the_text(byte_level, text):
    ids = byte_level(text)["input_ids"]
    deltas, _ = run(byte_level, ids)
    assert "".join(deltas) == byte_level.decode(ids)


@given(ids=st.lists(st.integers(0, 260), max_size=30))
def test_any_tokens_decode_as_they_do_at_once(byte_level, ids):
    deltas, _ = run(byte_level, ids)
    assert "".join(deltas) == byte_level.decode(ids, skip_special_tokens=True)


@given(text=st.text("abc🦊東", max_size=25), stops=st.lists(st.text("abc🦊東", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_is_ever_shown(byte_level, text, stops):
    deltas, stopped = run(byte_level, byte_level(text)["input_ids"], stops)
    shown = "".join(deltas)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    assert stopped or shown == text


@pytest.mark.parametrize("include_stop", [False, True])
@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    unstopped=st.integers(0, 12),
)
def test_a_stop_string_counts_once_it_may(byte_level, include_stop, text, stops, unstopped):
    """One that ends in the first tokens does not; a stop string is shown where that is asked for, and nothing of
    another one that ends later."""
    ids = byte_level(text)["input_ids"]
    deltas, stopped = run(byte_level, ids, stops, include_stop=include_stop, unstopped=unstopped)
    texts = [byte_level.decode(ids[: place + 1]) for place in range(len(ids))]
    begun = ["", *texts]
    for place in range(unstopped, len(ids)):
        found = [
            (first, first + len(stop))
            for stop in stops
            for first in range(len(texts[place]))
            if texts[place].startswith(stop, first) and first + len(stop) > len(begun[place])
        ]
        if found:
            assert stopped
            assert "".join(deltas) == text[: min(found)[include_stop]]
            return
    assert not stopped
    assert "".join(deltas) == text


def test_a_false_beginning_of_a_stop_string_comes_late_but_whole(byte_level):
    ids = byte_level("a\n\nb")["input_ids"]
    deltas, stopped = run(byte_level, ids, ["\n\n\n"])
    assert deltas[0] == "a"
    assert "".join(deltas) == "a\n\nb"
    assert not stopped


def test_output_that_is_not_utf8_is_not_held_back_for_ever(byte_level):
    byte = byte_level.convert_tokens_to_ids(byte_level.tokenize("🦊")[0])
    deltas, _ = run(byte_level, [byte] * 100)
    assert "".join(deltas[:-1])


def test_byte_fallback_and_leading_spaces(byte_fallback):
    def ids(*words):
        return byte_fallback.convert_tokens_to_ids(list(words))

    fox = ids("▁Paris", "▁", *(f"<0x{byte:02X}>" for byte in "🦊".encode()), "▁is", "b")
    assert "".join(run(byte_fallback, fox)[0]) == "Paris 🦊 isb"
    assert "".join(run(byte_fallback, fox, context=ids("▁a"))[0]) == " Paris 🦊 isb"
    assert "".join(run(byte_fallback, ids("b", "</s>", "▁is", "</s>", "▁a"))[0]) == "b is a"


def test_single_tokens_have_their_bytes(byte_level, byte_fallback):
    for tokenizer, text in ((byte_level, " hi 東京 🦊 the fox"), (byte_fallback, "Paris 🦊")):
        vocabulary = Vocabulary(tokenizer)
        tokens = [vocabulary.token(i) for i in tokenizer(text)["input_ids"]]
        assert b"".join(token.data for token in tokens).decode().strip() == text.strip()
    assert Vocabulary(byte_level).token(0).text == "<|end|>"
    assert Vocabulary(byte_level).token(100_000).data == b""


@pytest.mark.parametrize("prompt", ["春眠不覺曉", "a 曉", "é", "🙂🙂🙂", "b"])
def test_a_prompt_that_ends_within_the_context_in_bytes_breaks_nothing(byte_fallback, prompt):
    def spelled(text):
        return [byte_fallback.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]

    for answer in ("處處聞啼鳥。", "AAAA", "é OK", "🙂"):
        deltas, _ = run(byte_fallback, spelled(answer), context=spelled(prompt)[-8:])
        assert "".join(deltas) == answer
