"""Made-up data of real lengths for the timing of training steps: the same for every side, on every machine.

    conversation lengths  lognormal, median 0.15 of a row (307 of 2,048 tokens), sigma 0.9, 16 tokens to a whole row;
                          the last three fifths of each are supervised, as one answer
    document lengths      lognormal, median 0.35 of a row (717 of 2,048 tokens), sigma 1, cut at the rows' ends
    ids                   uniform over the vocabulary

An assumption, not a measurement of a corpus: what a step costs depends on lengths and on the share of supervised
tokens, and hardly on the ids.
"""

import dataclasses
from pathlib import Path

import numpy as np

RESERVED = 8  # ids below are marks: padding, begin, end
ANSWER = 0.6  # of a conversation


def tokenizer(vocab: int):
    """As many entries as the vocabulary has, none of which is ever spelt out."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = [f"<{i}>" for i in range(vocab)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[3]))
    pad, bos, eos, unk = names[:4]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk)


def lengths(tokens: int, median: float, sigma: float, least: int, most: int, rng) -> np.ndarray:
    """Of so many conversations or documents that they have at least `tokens` tokens."""
    drawn = rng.lognormal(np.log(median), sigma, size=tokens // least)
    drawn = drawn.round().astype(np.int64).clip(least, most)
    return drawn[: 1 + np.searchsorted(np.cumsum(drawn), tokens)]


@dataclasses.dataclass
class Conversations:
    ids: np.ndarray  # uint32, one behind the other
    is_target: np.ndarray
    offsets: np.ndarray

    @classmethod
    def drawn(cls, tokens: int, length: int, vocab: int) -> "Conversations":
        rng = np.random.Generator(np.random.PCG64(0))
        sizes = lengths(tokens, 0.15 * length, 0.9, 16, length, rng)
        ids = rng.integers(RESERVED, vocab, size=sizes.sum(), dtype=np.uint32)
        is_target = np.concatenate([np.arange(n) >= round((1 - ANSWER) * n) for n in sizes])
        return cls(ids, is_target, np.concatenate([[0], np.cumsum(sizes)]))

    def dataset(self):
        """As TRL takes conversations that are tokenized already, and packs them itself."""
        from datasets import Dataset

        labels = np.where(self.is_target, self.ids.astype(np.int64), -100)
        columns = {"input_ids": self.ids.astype(np.int64), "labels": labels}
        return Dataset.from_dict({name: np.split(of, self.offsets[1:-1]) for name, of in columns.items()})

    def packed(self, folder: Path, length: int):
        """As recipe=sft packs them."""
        from aquila_sft.data import packing
        from aquila_sft.data.rows import PackedRows

        rows = packing.pack(np.diff(self.offsets), length, window=8192, seed=0)
        folder.mkdir(parents=True)
        for name, array in {
            "tokens": self.ids,
            "targets": self.is_target,
            "offsets": self.offsets.astype(np.int64),
            "bytes": np.zeros(0, dtype=np.int64),
            "row_items": np.concatenate(rows).astype(np.int64),
            "row_sizes": np.array([len(row) for row in rows], dtype=np.int64),
        }.items():
            (folder / f"{name}.bin").write_bytes(array.tobytes())
        return PackedRows(folder)


class Documents:
    """A part of text in memory, read as one of shards is (aquila_sft/data/shards.py)."""

    name = "made-up"

    def __init__(self, tokens: int, length: int, vocab: int) -> None:
        rng = np.random.Generator(np.random.PCG64(0))
        sizes = lengths(tokens, 0.35 * length, 1.0, 16, 2**20, rng)
        self.ids = rng.integers(RESERVED, vocab, size=sizes.sum(), dtype=np.int64)
        self.begins = np.zeros(len(self.ids), dtype=bool)
        self.begins[np.concatenate([[0], np.cumsum(sizes)[:-1]])] = True
        self.tokens = len(self.ids)

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[start:end], self.begins[start:end]
