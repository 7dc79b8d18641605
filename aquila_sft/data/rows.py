"""Packed rows on disk become batches, in an order that is a pure function.

    place in the run -> RowOrder -> row -> PackedRows.batch -> input_ids, labels, position_ids, int64 [B, T]

B rows, T tokens a row.
"""

from pathlib import Path

import numpy as np

IGNORE = -100  # the label of a token that is not supervised


class PackedRows:
    """One prepared part. Row r holds whole conversations, and turns into tensors on request."""

    def __init__(self, folder: Path) -> None:
        def mapped(name: str, dtype: type) -> np.ndarray:
            file = folder / f"{name}.bin"
            return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype=dtype)

        self.tokens, self.targets = mapped("tokens", np.uint32), mapped("targets", np.bool_)
        self.offsets, self.bytes = mapped("offsets", np.int64), mapped("bytes", np.int64)
        self.row_items = mapped("row_items", np.int64)
        self.row_starts = np.concatenate([[0], np.cumsum(mapped("row_sizes", np.int64))])

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def items(self, row: int) -> np.ndarray:
        """The conversations of a row."""
        return self.row_items[self.row_starts[row] : self.row_starts[row + 1]]

    def row_tokens(self) -> np.ndarray:
        """Tokens of every row, padding not counted; int64 [rows]."""
        if not len(self):
            return np.empty(0, dtype=np.int64)
        return np.add.reduceat(np.diff(self.offsets)[self.row_items], self.row_starts[:-1])

    def batch(self, rows: list[int], length: int, pad_id: int) -> dict:
        """input_ids, labels, position_ids, int64 [len(rows), length]; row -1 is blank.

        Positions restart at every conversation and at the padding, which is what isolates them: there is no attention
        mask, the model derives the blocks from the positions. A conversation's first token is never a label: it would
        be predicted from the conversation before it.
        """
        import torch

        ids = np.full((len(rows), length), pad_id, dtype=np.int64)
        labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
        positions = np.zeros((len(rows), length), dtype=np.int64)
        for b, row in enumerate(rows):
            at = 0
            for item in self.items(row) if row >= 0 else ():
                start, end = int(self.offsets[item]), int(self.offsets[item + 1])
                span = slice(at, at + end - start)
                ids[b, span] = self.tokens[start:end]
                labels[b, span] = np.where(self.targets[start:end], ids[b, span], IGNORE)
                labels[b, at] = IGNORE
                positions[b, span] = np.arange(end - start)
                at += end - start
            positions[b, at:] = np.arange(length - at)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }


class RowOrder:
    """Which row comes at which place of a run: a pure function of (seed, place), so that going on needs no state.

    Every epoch is a new permutation of all rows. Places from `end` on are blank rows: they fill the last step of a run
    that is measured in epochs, and train nothing.
    """

    def __init__(self, num_rows: int, seed: int, end: int) -> None:
        self.num_rows, self.seed, self.end = num_rows, seed, end
        self.epoch, self.permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, place: int) -> int:
        if place >= self.end:
            return -1
        epoch = place // self.num_rows
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.epoch, self.permutation = epoch, generator.permutation(self.num_rows)
        return int(self.permutation[place % self.num_rows])
