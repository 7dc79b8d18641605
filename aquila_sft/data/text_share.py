"""Pretraining text among the rows of conversations, so that a tuned model keeps what it learnt from text.

    shards -> MixtureOrder -> text row number n, as many an epoch as data.text.share asks for -> a row of documents
    PackedRows, text rows  -> MixedRows -> batches as those of PackedRows alone

Row len(conversations) + n is the n-th text row. Text goes on from epoch to epoch, and begins anew when all of it was
read.
"""

from pathlib import Path

import numpy as np

from aquila_sft.config.runs import SftRun
from aquila_sft.data import mixture, text_rows
from aquila_sft.data.rows import IGNORE, PackedRows
from aquila_sft.data.shards import Prepared
from aquila_sft.data.text_rows import TextRows
from aquila_sft.errors import UserError

BLOCK_ROWS = 1000  # after which the mixture of sources is exact again


def prepared_of(run: SftRun) -> Prepared | None:
    """The shards that a run mixes in; None where it mixes none."""
    if not run.data.text.share:
        return None
    given = run.data.text.shards
    folder = Path(given or f"outputs/{run.scale}/prepare/final").expanduser()
    if not folder.is_dir():
        raise UserError(
            f"data.text.share={run.data.text.share}: no shards at {folder}; give data.text.shards=<final/ of a run of "
            "recipe=prepare>, or data.text.share=0"
        )
    return Prepared(folder)


def same_ids(prepared: Prepared, tokenizer) -> None:
    """Raises UserError where the shards' ids mean something else to `tokenizer`, which may know more of them."""
    from aquila_sft.tokenizer import load_tokenizer

    of_shards = load_tokenizer(prepared.tokenizer_folder)
    if not of_shards.get_vocab().items() <= tokenizer.get_vocab().items():
        raise UserError(
            f"data.text.shards={prepared.folder} were made with another vocabulary ({len(of_shards):,} entries) than "
            f"the base's ({len(tokenizer):,}); prepare them with tokenizer.path=<the base's folder>"
        )


def rows_of_epoch(run: SftRun, conversation_rows: int) -> int:
    """Rows of text among so many of conversations."""
    share = run.data.text.share
    return max(1, round(conversation_rows * share / (1 - share))) if share else 0


def order_of(run: SftRun, prepared: Prepared) -> mixture.MixtureOrder:
    """Which part and row the n-th row of text is. Raises UserError for weights that name nothing."""
    text = run.data.text
    of_parts = mixture.shares(mixture.about(prepared), text.languages, text.sources, "data.text")
    return mixture.order(prepared, of_parts, run.train.max_length, BLOCK_ROWS, run.seed, "sft")


def told(order: mixture.MixtureOrder, text_rows: int, conversation_rows: int) -> str:
    return f"{text_rows:,} rows of text among {conversation_rows:,} of conversations: {order}"


class MixedRows:
    """Rows of conversations and of text; what SftTrainer trains on."""

    def __init__(self, conversations: PackedRows, run: SftRun, prepared: Prepared | None) -> None:
        self.conversations, self.loss_per = conversations, run.train.loss_per
        # padding to a fixed length keeps shapes alike; with one conversation a row it would be most of the row
        self.length, self.is_fixed = run.train.max_length, run.data.packing
        self.text_rows = rows_of_epoch(run, len(conversations))
        self.conversation_tokens = conversations.row_tokens()
        if prepared:
            self.order = order_of(run, prepared)
            self.parts = [TextRows(prepared.parts[name], self.length) for name in self.order.parts]
            self.text_weight = conversations.mean_weight(self.loss_per)  # a token of text counts as one of an answer

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.conversations) + self.text_rows

    def text_place(self, row: int) -> tuple[TextRows, int]:
        parts, rows = self.order(np.array([row - len(self.conversations)]))
        return self.parts[int(parts[0])], int(rows[0])

    def tokens(self, row: int) -> int:
        """Of a row, padding not counted; 0 of a blank one."""
        if row < 0:
            return 0
        if row < len(self.conversations):
            return int(self.conversation_tokens[row])
        part, number = self.text_place(row)
        return min(self.length, part.part.tokens - number * self.length)

    def batch(self, rows: list[int], pad_id: int) -> dict:
        """As PackedRows.batch, of both kinds of rows."""
        length = self.length if self.is_fixed else max(1, *(self.tokens(row) for row in rows))
        is_text = [row >= len(self.conversations) for row in rows]
        made = self.conversations.batch(
            [-1 if text else row for row, text in zip(rows, is_text, strict=True)], length, pad_id, self.loss_per
        )
        for b in np.flatnonzero(is_text).tolist():
            arrays = text_rows.arrays([self.text_place(rows[b])], self.length, pad_id)
            ids, targets, positions = (array[0, :length] for array in arrays)
            labels = np.full(length, IGNORE, dtype=np.int64)
            labels[1:] = targets[:-1]  # the next row's first token is no label of this one
            for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", positions)):
                made[name].numpy()[b] = values
            if "weights" in made:
                made["weights"].numpy()[b] = self.text_weight * (labels != IGNORE)
        return made
