"""Rows as a model gets them, number by number: ids, what each position has to predict, positions that keep apart."""

import numpy as np
from shard_files import write_part

from aquila_sft.data import conversations, sft_steps, text_rows
from aquila_sft.data.rows import IGNORE, PackedRows
from aquila_sft.data.shards import Part
from aquila_sft.data.text_rows import TextRows

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
