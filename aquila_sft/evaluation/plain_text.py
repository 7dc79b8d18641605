"""Bits per byte of any text, by language and source: of one model, or before and after tuning.

    files -> documents (language by script) -> log-likelihood of each whole -> nats / ln 2 / UTF-8 bytes

Each document is read by itself, behind the begin token, in windows as long as the model. Independent of the vocabulary,
so models compare.
"""

import math
from collections import defaultdict
from pathlib import Path

from aquila_sft import runtime
from aquila_sft.data import documents
from aquila_sft.errors import UserError
from aquila_sft.evaluation.engine import ItemTask, Outcome

ALL = "all"


class Text:
    def __init__(self, document) -> None:
        self.prompt, self.part = document.text, (document.language, document.source)


def read(files: dict[str, list[Path]], text_column: str, limit: int | None) -> list[Text]:
    """The first `limit` documents of every source and language. Raises UserError when there is none."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    texts, left_out = [], []
    for document, _ in documents.read(files, text_column, lambda *why: left_out.append(why)):
        text = Text(document)
        counts[text.part] += 1
        if limit is None or counts[text.part] <= limit:
            texts.append(text)
    if not texts:
        why = f" ({left_out[0][0]} at {left_out[0][3]})" if left_out else ""
        raise UserError(f"data.files={','.join(map(str, next(iter(files.values()))))} holds no text{why}")
    if left_out:
        runtime.say(
            f"  data.files: {len(left_out):,} records left out, the first: {left_out[0][0]} at {left_out[0][3]}"
        )
    return texts


def task(texts: list[Text]) -> ItemTask:
    def outcome(text: Text, results: list[float]) -> Outcome:
        return Outcome({"nats": -results[0], "bytes": float(len(text.prompt.encode()))})

    return ItemTask("text", texts, lambda text: [("loglikelihood_rolling", (text.prompt,))], outcome)


def bits_per_byte(done: ItemTask) -> dict[tuple[str, str], float]:
    """{(language, source): …}, and (language, all)."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for text, outcome in zip(done.items, done.outcomes, strict=True):
        for part in (text.part, (text.part[0], ALL)):
            sums[part][0] += outcome.scores["nats"]
            sums[part][1] += outcome.scores["bytes"]
    return {part: nats / math.log(2) / size for part, (nats, size) in sorted(sums.items())}


def table(after: ItemTask, before: ItemTask | None) -> list[list[str]]:
    """[language, source, documents, bits per byte(, before, forgotten)]"""
    ours, theirs = bits_per_byte(after), bits_per_byte(before) if before else {}
    rows = [["language", "source", "documents", "bits per byte", *(["before", "change"] if before else [])]]
    for part, value in ours.items():
        count = sum(text.part == part or (part[1] == ALL and text.part[0] == part[0]) for text in after.items)
        change = [f"{theirs[part]:.4f}", f"{value - theirs[part]:+.4f}"] if before else []
        rows.append([*part, str(count), f"{value:.4f}", *change])
    return rows
