"""Conversations become packed rows on disk.

    files -> records -> Conversation -> (ids, is_target) -> length policy -> train/ and held-back/<language>/

Nothing leaves without a line in the ledger. Tokens lie flat in memory-mapped files, so a set may be larger than memory
and several processes share it. What was prepared is reused only under the same key: data bytes, tokenizer, template,
and every setting that the rows depend on.
"""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from aquila_sft.data import conversations, packing, sources
from aquila_sft.data.conversations import Conversation, Refused
from aquila_sft.data.ledger import Ledger, NothingLeft

FORMAT = 1  # raise it when a change here changes the rows
BATCH = 512  # conversations tokenized together

Encoder = Callable[[list[list[dict]]], list[tuple[list[int], list[bool]]]]


@dataclasses.dataclass(frozen=True)
class RowPolicy:
    """What the rows depend on besides data and tokenizer."""

    max_length: int
    holdout_fraction: float
    holdout_max: int
    pack_window: int
    seed: int


def prepare(
    files: list[Path],
    folder: Path,
    encode: Encoder,
    policy: RowPolicy,
    key: dict,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict:
    """Write train/ and held-back/<language>/ under `folder`, unless they are there under the same key; the ledger.

    encode: list of messages -> (ids, is_target) each. key: JSON, everything the rows depend on. Raises NothingLeft when
    nothing is left to train on.
    """
    key = {**key, "format": FORMAT, **dataclasses.asdict(policy)}
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        done = json.loads((folder / "prepared.json").read_text("utf-8"))
        if done["key"] == key:
            return done["ledger"]
    shutil.rmtree(folder, ignore_errors=True)
    aside = folder.with_name(f".preparing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    ledger = Ledger()
    with contextlib.ExitStack() as stack:
        writers: dict[str, Writer] = {}

        def writer(part: str) -> Writer:
            if part not in writers:
                writers[part] = stack.enter_context(Writer(aside / part))
            return writers[part]

        held_back: collections.Counter = collections.Counter()
        for conversation, _, ids, is_target in tokenized(progress(readable(files, ledger)), encode, ledger, policy):
            language = conversation.language
            hold = is_held_back(conversation, policy, held_back)
            writer(f"held-back/{language}" if hold else "train").add(
                ids, is_target, conversations.answer_bytes(conversation.messages)
            )
            ledger.keep(conversation, len(ids), sum(is_target), hold)
        report = ledger.as_dict()
        if not ledger.total("kept"):
            raise NothingLeft(report, files)
    report["rows"] = {}
    for part in writers:
        lengths = np.diff(np.fromfile(aside / part / "offsets.bin", dtype=np.int64))
        rows = packing.pack(lengths, policy.max_length, window=policy.pack_window, seed=policy.seed)
        np.array([len(r) for r in rows], dtype=np.int64).tofile(aside / part / "row_sizes.bin")
        np.array([i for r in rows for i in r], dtype=np.int64).tofile(aside / part / "row_items.bin")
        report["rows"][part] = {
            "rows": len(rows),
            "filled": round(int(lengths.sum()) / (len(rows) * policy.max_length), 4),
        }
    (aside / "prepared.json").write_text(
        json.dumps({"key": key, "ledger": report}, ensure_ascii=False), encoding="utf-8"
    )
    os.rename(aside, folder)
    return report


def is_held_back(conversation: Conversation, policy: RowPolicy, held_back: collections.Counter) -> bool:
    """By the hash of its content, as long as its language has room; counted in `held_back`."""
    threshold = int(policy.holdout_fraction * 2**64)
    is_so = int(conversation.sha256()[:16], 16) < threshold and held_back[conversation.language] < policy.holdout_max
    held_back[conversation.language] += is_so
    return is_so


def readable(files: list[Path], ledger: Ledger) -> Iterator[tuple[Conversation, str]]:
    """Conversations and where they stood; what is none goes into the ledger."""
    for file in files:
        name = f"{file.parent.name}/{file.name}"
        for where, record in sources.read(file):
            ledger.read += 1
            if record is None:
                ledger.refuse("not a JSON object", "unknown", name, where)
                continue
            try:
                yield conversations.normalise(record, default_source=name), where
            except Refused as refused:
                language = conversations.language(conversations.any_text(record))
                ledger.refuse(refused.args[0], language, conversations.source_of(record, name), where)


def tokenized(
    found: Iterable[tuple[Conversation, str]], encode: Encoder, ledger: Ledger, policy: RowPolicy
) -> Iterator[tuple[Conversation, str, list[int], list[bool]]]:
    batch: list[tuple[Conversation, str]] = []

    def flush() -> Iterator[tuple[Conversation, str, list[int], list[bool]]]:
        for (conversation, where), (ids, is_target) in zip(batch, encode([c.messages for c, _ in batch]), strict=True):
            fitting = fitted(conversation, ids, is_target, encode, policy.max_length)
            if fitting is None:
                reason, answer_tokens = "last exchange longer than a row", sum(is_target)
                ledger.refuse(reason, conversation.language, conversation.source, where, answer_tokens)
                continue
            kept, kept_ids, kept_target = fitting
            if kept is not conversation:
                ledger.shorten(
                    kept, (len(conversation.messages) - len(kept.messages)) // 2, sum(is_target) - sum(kept_target)
                )
            yield kept, where, kept_ids, kept_target
        batch.clear()

    for item in found:
        batch.append(item)
        if len(batch) == BATCH:
            yield from flush()
    yield from flush()


def fitted(
    conversation: Conversation, ids: list[int], is_target: list[bool], encode: Encoder, max_length: int
) -> tuple[Conversation, list[int], list[bool]] | None:
    """The conversation without as many of its oldest exchanges as it takes to fit; None when the last one does not.

    An answer is whole or absent, never cut. How many to drop is found by bisection: a row-long tail of a
    330-message conversation costs eight encodings, not 150.
    """
    if len(ids) <= max_length:
        return conversation, ids, is_target
    shorter = [conversation.messages]
    while (rest := conversations.without_leading_exchange(shorter[-1])) is not None:
        shorter.append(rest)
    low, high, best = 1, len(shorter) - 1, None
    while low <= high:
        middle = (low + high) // 2
        ids, is_target = encode([shorter[middle]])[0]
        if len(ids) <= max_length:
            best, high = (dataclasses.replace(conversation, messages=shorter[middle]), ids, is_target), middle - 1
        else:
            low = middle + 1
    return best


class Writer:
    """Appends conversations to one part's flat files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.position = folder, 0

    def __enter__(self) -> "Writer":
        self.files = {
            name: open(self.folder / f"{name}.bin", "wb") for name in ("tokens", "targets", "offsets", "bytes")
        }
        self.files["offsets"].write(np.int64(0).tobytes())
        return self

    def __exit__(self, *_) -> None:
        for file in self.files.values():
            file.close()

    def add(self, ids: list[int], is_target: list[bool], answer_bytes: int) -> None:
        self.position += len(ids)
        self.files["tokens"].write(np.asarray(ids, dtype=np.uint32).tobytes())
        self.files["targets"].write(np.asarray(is_target, dtype=bool).tobytes())
        self.files["offsets"].write(np.int64(self.position).tobytes())
        self.files["bytes"].write(np.int64(answer_bytes).tobytes())
