"""A part's stream of tokens as rows of a fixed length, for training and for bits per byte.

    stream  a b c . d e f g . h i      documents "a b c ." and "d e f g ." and …,  rows of 4
    row 0   a b c .  predicts  b c . –       the first token of a document is predicted by nothing
    row 1   d e f g  predicts  e f g .
    row 2   . h i    predicts  – i –         a document may go on in the next row, its positions begin again there

Every token but the first of a document is a target exactly once: nothing is cropped. A row that touches a damaged block
stops the run, or with leave_out_damaged is a blank one wherever it comes, said and counted where it is met: the other
rows stay in their places, and nobody has to read all shards to find it.
"""

import numpy as np

from aquila_sft.data.rows import IGNORE
from aquila_sft.data.shards import DamagedBlock, Part


class TextRows:
    """The rows of one part."""

    def __init__(self, part: Part, length: int, *, leave_out_damaged: bool = False) -> None:
        self.part, self.length, self.leave_out_damaged = part, length, leave_out_damaged
        self.damaged: set[int] = set()  # rows, as far as they were met
        self.told: set[str] = set()

    def __len__(self) -> int:
        return -(-self.part.tokens // self.length)

    def fill(self, row: int, ids: np.ndarray, targets: np.ndarray, positions: np.ndarray) -> None:
        """Write one row into int64 [length] arrays; what lies behind the stream's end is left as it is."""
        start = row * self.length
        try:
            tokens, begins = self.part.read(start, min(start + self.length + 1, self.part.tokens))
        except DamagedBlock as error:
            if not self.leave_out_damaged:
                raise
            self.damaged.add(row)
            if str(error) not in self.told:  # a block, from whichever process reads it
                self.told.add(str(error))
                print(f"  {self.part.name}: the rows that touch a damaged block are left out: {error}", flush=True)
            return
        size = min(self.length, len(tokens))
        ids[:size] = tokens[:size]
        targets[: len(tokens) - 1] = np.where(begins[1:], IGNORE, tokens[1:])
        at = np.arange(size)
        positions[:size] = at - np.maximum.accumulate(np.where(begins[:size], at, 0))
        positions[size:] = np.arange(self.length - size)


Places = list[tuple[TextRows, int] | None]  # None is a blank row


def arrays(rows: Places, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input ids, targets and positions, int64 [len(rows), length] each.

    Positions restart at every document and at the padding, which is what isolates them (see PackedRows.batch).
    targets: what each position has to predict, -100 where nothing.
    """
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
    positions = np.tile(np.arange(length, dtype=np.int64), (len(rows), 1))
    for b, place in enumerate(rows):
        if place is not None:
            place[0].fill(place[1], ids[b], targets[b], positions[b])
    return ids, targets, positions


def tensors(ids: np.ndarray, targets: np.ndarray, positions: np.ndarray) -> dict:
    """The same as a model takes them."""
    import torch

    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "targets": torch.from_numpy(targets),
    }


def batch(rows: Places, length: int, pad_id: int) -> dict:
    return tensors(*arrays(rows, length, pad_id))
