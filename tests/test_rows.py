"""Rows as a model gets them, number by number: ids, what each position has to predict, positions that keep apart."""

from types import SimpleNamespace

import numpy as np
import pytest
from shard_files import write_part

from aquila_sft.config.model import LossPer
from aquila_sft.data import conversations, rows, sft_steps, text_rows
from aquila_sft.data.rows import IGNORE, PackedRows, RowOrder
from aquila_sft.data.shards import Part
from aquila_sft.data.text_rows import TextRows
from aquila_sft.data.text_share import MixedRows

PAD = 9


def test_rows_of_documents_predict_across_their_edge_but_never_across_a_document_s(tmp_path):
    documents = [([1, 2, 3], 3), ([4, 5], 2), ([6, 7, 8, 1, 2], 5)]
    about = {"vocab_size": 10, "tokenizer_sha256": "x", "source": "a", "language": "en"}
    rows = TextRows(Part("a.en", write_part(tmp_path / "a.en", documents, shard_tokens=100, **about)), 4)
    ids, targets, positions = text_rows.arrays([*((rows, row) for row in range(len(rows))), None], 4, PAD)
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, PAD, PAD], [PAD] * 4]
    # 4 and 6 begin documents; the last target of a row is the first token of the next one
    assert targets.tolist() == [[2, 3, IGNORE, 5], [IGNORE, 7, 8, 1], [2, IGNORE, IGNORE, IGNORE], [IGNORE] * 4]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 0, 1], [0, 1, 2, 3]]


def test_rows_of_conversations_keep_them_apart_and_predict_no_first_token(tmp_path):
    with sft_steps.PartWriter(tmp_path / "train") as writer:
        writer.add([1, 2, 3], [True, False, True], 1)  # a first token that is a target would be predicted from before
        writer.add([4, 5], [True, True], 1)
    np.array([2], dtype=np.int64).tofile(tmp_path / "train/row_sizes.bin")
    np.array([1, 0], dtype=np.int64).tofile(tmp_path / "train/row_items.bin")
    batch = PackedRows(tmp_path / "train").batch([0, -1], 7, PAD)
    assert batch["input_ids"].tolist() == [[4, 5, 1, 2, 3, PAD, PAD], [PAD] * 7]
    assert batch["labels"].tolist() == [[IGNORE, 5, IGNORE, IGNORE, 3, IGNORE, IGNORE], [IGNORE] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1], list(range(7))]


def test_answers_are_counted_in_bytes_of_nfc():
    messages = [
        {"role": "user", "content": "ignored"},
        {"role": "assistant", "content": "你好 e\u0301"},  # e and an accent, which NFC makes one character of two bytes
        {"role": "assistant", "content": "ab"},
    ]
    assert conversations.answer_bytes(messages) == 3 + 3 + 1 + 2 + 2


def test_a_conversation_weighs_by_its_tokens_its_answers_or_itself():
    is_target = np.array([0, 0, 1, 1, 0, 1, 1, 1, 1, 0], dtype=bool)  # answers of two and of four tokens
    weighs = {per: rows.weights(is_target, per).tolist() for per in LossPer}
    assert weighs[LossPer.token] == [0, 0, 1, 1, 0, 1, 1, 1, 1, 0]
    assert weighs[LossPer.answer] == [0, 0, 0.5, 0.5, 0, 0.25, 0.25, 0.25, 0.25, 0]
    np.testing.assert_allclose(weighs[LossPer.answer_root], [0, 0, *[2**-0.5] * 2, 0, *[0.5] * 4, 0], rtol=1e-6)
    np.testing.assert_allclose(weighs[LossPer.conversation], is_target / 6, rtol=1e-6)


def write_conversations(folder, is_targets):
    with sft_steps.PartWriter(folder) as writer:
        for is_target in is_targets:
            writer.add(list(range(1, len(is_target) + 1)), is_target, 1)
    np.ones(len(is_targets), dtype=np.int64).tofile(folder / "row_sizes.bin")
    np.arange(len(is_targets), dtype=np.int64).tofile(folder / "row_items.bin")
    return PackedRows(folder)


@pytest.mark.parametrize("per", LossPer)
@pytest.mark.parametrize("together", [1, 7, 1000])
def test_the_mean_weight_is_that_of_every_supervised_token(per, together, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "CONVERSATIONS", together)
    random = np.random.default_rng(0)
    is_targets = [[False, *(random.random(random.integers(1, 20)) < 0.5).tolist()] for _ in range(50)]
    packed = write_conversations(tmp_path / "train", is_targets)
    by_hand = np.concatenate([rows.weights(np.array(t), per) for t in is_targets])
    assert packed.mean_weight(per) == pytest.approx(by_hand.sum() / sum(map(sum, is_targets)), rel=1e-6)


def test_every_epoch_has_each_row_once_and_text_that_no_epoch_had():
    order = RowOrder(10, seed=3, end=45, text_rows=5)
    epochs = [[order(place) for place in range(15 * e, 15 * e + 15)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(10), *range(10 + 5 * e, 15 + 5 * e)] for e in range(3)]
    assert epochs[0][:10] != sorted(epochs[0][:10]) and order(45) == -1
    assert [RowOrder(10, 3, 45)(place) for place in range(10)] == np.random.Generator(
        np.random.PCG64([3, 0])
    ).permutation(10).tolist()


def test_rows_of_text_among_conversations_are_those_of_the_shards(tmp_path):
    documents = {"en": [([31, 32, 33, 34, 35], 5)], "zh": [([21, 22, 23], 3), ([24, 25], 2)]}
    parts = {}
    for language, listed in documents.items():
        about = {"source": "a", "language": language, "vocab_size": 40, "tokenizer_sha256": "x"}
        shards = write_part(tmp_path / language, listed, shard_tokens=100, **about)
        parts[f"a.{language}"] = Part(f"a.{language}", shards)
    conversations_ = write_conversations(tmp_path / "train", [[False, False, True, True], [False, True]])
    run = SimpleNamespace(
        seed=1,
        train=SimpleNamespace(max_length=4, loss_per=LossPer.answer),
        data=SimpleNamespace(
            packing=False, text=SimpleNamespace(share=0.5, languages={"en": 0.5, "zh": 0.5}, sources=None)
        ),
    )
    mixed = MixedRows(conversations_, run, SimpleNamespace(parts=parts))
    assert (len(mixed), mixed.text_rows) == (4, 2)
    made = {tuple(mixed.batch([row], PAD)["input_ids"][0].tolist()): row for row in range(2, 1002)}
    # all rows of both parts, every one of them again and again
    assert set(made) == {(31, 32, 33, 34), (35,), (21, 22, 23, 24), (25,)}
    assert [mixed.tokens(row) for row in (0, 1, -1, made[31, 32, 33, 34], made[25,])] == [4, 2, 0, 4, 1]
    batch = mixed.batch([0, made[21, 22, 23, 24], -1], PAD)
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 3, 4], [IGNORE, 22, 23, IGNORE], [IGNORE] * 4]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3]]
    mean = (2 * 0.5 + 1) / 3  # of the three supervised tokens, of answers of two and one
    np.testing.assert_allclose(batch["weights"], [[0, 0, 0.5, 0.5], [0, mean, mean, 0], [0] * 4], rtol=1e-6)
    assert mixed.batch([1], PAD)["input_ids"].shape == (1, 2)  # no longer than its longest row
