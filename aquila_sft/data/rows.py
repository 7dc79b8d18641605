"""Packed rows on disk become batches, in an order that is a pure function.

    place in the run -> RowOrder -> row -> PackedRows.batch -> input_ids, labels, position_ids, int64 [B, T]

B rows, T tokens a row.
"""

from pathlib import Path

import numpy as np

from aquila_sft.config.model import LossPer

IGNORE = -100  # the label of a token that is not supervised
CONVERSATIONS = 2**16  # looked at together


def weights(is_target: np.ndarray, loss_per: LossPer) -> np.ndarray:
    """What each token of one conversation weighs in the loss; float32 [tokens], 0 where nothing is supervised.

    An answer, a run of supervised tokens, of n tokens weighs n, sqrt(n) or 1 in all; a whole conversation 1.
    """
    if loss_per is LossPer.token:
        return is_target.astype(np.float32)
    begins = is_target & ~np.concatenate([[False], is_target[:-1]])
    unit = np.zeros(len(is_target), dtype=np.int64) if loss_per is LossPer.conversation else np.cumsum(begins)
    sizes = np.bincount(unit, weights=is_target)[unit]
    power = 0.5 if loss_per is LossPer.answer_root else 1.0
    return np.where(is_target, np.maximum(sizes, 1) ** -power, 0).astype(np.float32)


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

    def mean_weight(self, loss_per: LossPer) -> float:
        """Of all supervised tokens, as `weights` weighs them."""
        total = tokens = 0.0
        for first in range(0, len(self.offsets) - 1, CONVERSATIONS):
            offsets = self.offsets[first : first + CONVERSATIONS + 1]
            is_target = self.targets[offsets[0] : offsets[-1]].astype(np.int64)
            edges = np.flatnonzero(np.diff(is_target, prepend=0, append=0))  # where answers begin and end
            answers = edges[1::2] - edges[::2]
            tokens += answers.sum()
            match loss_per:
                case LossPer.token:
                    total += answers.sum()
                case LossPer.answer_root:
                    total += np.sqrt(answers).sum()
                case LossPer.answer:
                    total += len(answers)
                case LossPer.conversation:
                    total += np.count_nonzero(np.add.reduceat(is_target, offsets[:-1] - offsets[0]))
        return float(total / max(1.0, tokens))

    def batch(self, rows: list[int], length: int, pad_id: int, loss_per: LossPer = LossPer.token) -> dict:
        """input_ids, labels, position_ids, int64 [len(rows), length]; row -1 is blank. With another `loss_per` than
        token also `weights` of labels, float32.

        Positions restart at every conversation and at the padding, which is what isolates them: there is no attention
        mask, the model derives the blocks from the positions. A conversation's first token is never a label: it would
        be predicted from the conversation before it.
        """
        import torch

        ids = np.full((len(rows), length), pad_id, dtype=np.int64)
        labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
        positions = np.zeros((len(rows), length), dtype=np.int64)
        weighs = np.zeros((len(rows), length), dtype=np.float32)
        for b, row in enumerate(rows):
            at = 0
            for item in self.items(row) if row >= 0 else ():
                start, end = int(self.offsets[item]), int(self.offsets[item + 1])
                span = slice(at, at + end - start)
                ids[b, span] = self.tokens[start:end]
                labels[b, span] = np.where(self.targets[start:end], ids[b, span], IGNORE)
                labels[b, at] = IGNORE
                if loss_per is not LossPer.token:
                    weighs[b, span] = weights(self.targets[start:end], loss_per)
                positions[b, span] = np.arange(end - start)
                at += end - start
            positions[b, at:] = np.arange(length - at)
        made = {"input_ids": ids, "labels": labels, "position_ids": positions}
        if loss_per is not LossPer.token:
            made["weights"] = weighs
        return {name: torch.from_numpy(array) for name, array in made.items()}


class RowOrder:
    """Which row comes at which place of a run: a pure function of (seed, place), so that going on needs no state.

    Every epoch is a new permutation of all rows, among them `text_rows` that no epoch before it had: row num_rows + n
    is the n-th of them (text_share.py). Places from `end` on are blank rows: they fill the last step of a run that is
    measured in epochs, and train nothing.
    """

    def __init__(self, num_rows: int, seed: int, end: int, text_rows: int = 0) -> None:
        self.num_rows, self.seed, self.end, self.text_rows = num_rows, seed, end, text_rows
        self.epoch, self.permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, place: int) -> int:
        if place >= self.end:
            return -1
        epoch, turn = divmod(place, self.num_rows + self.text_rows)
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.epoch, self.permutation = epoch, generator.permutation(self.num_rows + self.text_rows)
        row = int(self.permutation[turn])
        return row if row < self.num_rows else row + epoch * self.text_rows
