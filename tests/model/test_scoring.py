"""Logits of many rows are computed a piece at a time, and the decoder once."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralModel

from moeray.errors import UnsupportedModelError
from moeray.model import scoring
from moeray.model.scoring import Scored, computed_once, keep_output
from tests.checkpoints import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("rows", "vocab", "expected"),
    [(0, 10, []), (3, 10, [3]), (10, 10, [10]), (11, 10, [10, 1]), (25, 10, [10, 10, 5]), (2, 1000, [1, 1])],
)
def test_a_piece_is_as_large_as_it_may_be(monkeypatch, rows, vocab, expected):
    monkeypatch.setattr(scoring, "PIECE_BYTES", 400)
    rows_P = torch.arange(100, 100 + rows)
    pieces = list(Scored(rows_P, lambda *_: None).pieces(vocab))
    assert [len(rows_R) for _, rows_R in pieces] == expected
    assert [int(rows_R[0]) - 100 for _, rows_R in pieces] == [first for first, _ in pieces]
    assert not rows or torch.equal(torch.cat([rows_R for _, rows_R in pieces]), rows_P)


def test_pieces_of_a_large_vocabulary_are_small():
    (_, rows_R), *_ = Scored(torch.arange(100_000), lambda *_: None).pieces(200_000)
    assert len(rows_R) * 200_000 * 4 <= 64 << 20


@torch.inference_mode()
def test_the_decoder_computes_once_and_anew_afterwards():
    model = tiny_model(tiny_config("mixtral"))
    keep_output(model)
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ids, other = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    whole = model(input_ids=ids).logits
    with computed_once():
        parts = [model(input_ids=ids, logits_to_keep=torch.tensor([row])).logits for row in range(3)]
    assert len(calls) == 2
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert model(input_ids=other).logits.shape[1] == 2


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UnsupportedModelError, match="MixtralModel has no decoder"):
        keep_output(MixtralModel(tiny_config("mixtral")))
