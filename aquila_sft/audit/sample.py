"""What is looked at on a sample: rows as batches, files against rows, special strings in contents.

rows of a seeded sample  -> PackedRows.batch -> ids, labels and positions, against what was prepared
first records of a file  -> conversation -> what of it was prepared -> supervised ids -> text, against its answers
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aquila_sft.chat_template import IM_END, encode_batch, special_ids
from aquila_sft.data import sft_set, sft_steps
from aquila_sft.data.ledger import Ledger
from aquila_sft.data.rows import IGNORE, PackedRows

ROWS = 64  # that are made into batches
CONVERSATIONS = 1000  # that are read again, and that are decoded for special strings

# ---- rows as the trainer gets them ----


def wrong_batches(rows: PackedRows, length: int, pad_id: int, seed: int) -> Iterator[tuple[int, str]]:
    """(row, what is wrong with it) of a seeded sample: what the model gets, put together here in another way."""
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[:ROWS]
    for row in sorted(chosen.tolist()):
        batch = {name: tensor[0].numpy() for name, tensor in rows.batch([row], length, pad_id).items()}
        spans = [(int(rows.offsets[item]), int(rows.offsets[item + 1])) for item in rows.items(row)]
        ids = np.concatenate([rows.tokens[a:b] for a, b in spans]).astype(np.int64)
        is_label = np.concatenate([rows.targets[a:b] & (np.arange(b - a) > 0) for a, b in spans])
        places = np.concatenate([np.arange(b - a) for a, b in spans])
        blank = length - len(ids)
        expected = {
            "input_ids": np.append(ids, np.full(blank, pad_id)),
            "labels": np.append(np.where(is_label, ids, IGNORE), np.full(blank, IGNORE)),
            "position_ids": np.append(places, np.arange(blank)),
        }
        for name, values in expected.items():
            if batch[name].shape != values.shape:
                yield row, f"{name} has {batch[name].shape[0]} places, {length} were prepared"
            elif len(differing := np.flatnonzero(batch[name] != values)):
                at = int(differing[0])
                yield row, f"{name}[{at}] is {batch[name][at]}, {values[at]} was prepared"


def unpacked(rows: PackedRows, length: int) -> str | None:
    """What is wrong with the packing of all rows, None if nothing: each conversation once, no row beyond `length`."""
    times = np.bincount(rows.row_items, minlength=len(rows.offsets) - 1)
    if len(wrong := np.flatnonzero(times != 1)):
        return f"conversation {wrong[0]} stands in {times[wrong[0]]} rows, {len(wrong):,} do not stand in one"
    if len(long := np.flatnonzero(rows.row_tokens() > length)):
        return f"row {long[0]} holds {rows.row_tokens()[long[0]]} tokens, train.max_length={length}"
    return None


# ---- the files against the rows ----


@dataclass
class Compared:
    """Conversations that were read again from the files; `wrong`: those that are in the rows, otherwise."""

    read: int = 0
    complete: bool = False  # all records of all files
    absent: list[str] = field(default_factory=list)  # where each stands that is in no row
    wrong: list[str] = field(default_factory=list)
    expected: set[int] = field(default_factory=set)  # hashes
    of_source: dict[str, tuple[str, int]] = field(default_factory=dict)  # source -> (part, conversation) to show


def read_again(
    files: list[Path], first: int | None, tokenizer, system: str | None, policy: sft_set.RowPolicy
) -> Iterator[tuple]:
    """(conversation as it fits a row, where, ids) of the first in the files together, or in each of them (None)."""
    if first is None:
        chosen = files[:: max(1, len(files) // CONVERSATIONS)]
        groups, each = [[file] for file in chosen], max(1, CONVERSATIONS // len(chosen))
    else:
        groups, each = [files], first

    def encode(conversations: list) -> list:
        return encode_batch(tokenizer, conversations, default_system=system)

    for group in groups:
        found = itertools.islice(sft_steps.judged(sft_set.whole(group), policy), each)
        for conversation, where, ids, _ in sft_steps.tokenized(found, encode, policy, Ledger()):
            yield conversation, where, ids


def compare(again: Iterator[tuple], parts: dict, find, tokenizer) -> Compared:
    """parts: name -> PackedRows. find: ids -> (part, conversation) or None, and their hash."""
    compared = Compared()
    normalizer = tokenizer.backend_tokenizer.normalizer
    for conversation, where, ids in again:
        compared.read += 1
        place, hashed = find(ids)
        compared.expected |= {hashed} - {None}
        if place is None:
            compared.absent.append(where)
            continue
        part, item = place
        compared.of_source.setdefault(conversation.source, place)
        answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
        if normalizer is not None:
            answers = [normalizer.normalize_str(answer) for answer in answers]
        if difference := differing(supervised(parts[part], item, tokenizer), answers):
            compared.wrong.append(f"{where}: {difference}")
    return compared


def supervised(rows: PackedRows, item: int, tokenizer) -> list[str]:
    """The text of each stretch of supervised tokens, the turn end at its end left away."""
    a, b = int(rows.offsets[item]), int(rows.offsets[item + 1])
    ids, edges = np.asarray(rows.tokens[a:b]), np.diff(np.concatenate([[0], rows.targets[a:b], [0]]).astype(np.int8))
    return [
        decoded(tokenizer, ids[first : last - 1]) + decoded(tokenizer, ids[last - 1 : last]).removesuffix(IM_END)
        for first, last in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True)
    ]


def differing(learnt: list[str], answers: list[str]) -> str | None:
    """Where the supervised text is not the assistant's; None if it is.

    The token that an answer of line ends shares with the header's own newline may stand before it.
    """
    for text, answer in itertools.zip_longest(learnt, answers):
        if text != answer and not (text and answer and answer[0] in "\r\n" and text == f"\n{answer}"):
            return f"supervised is {clipped(text)}, the assistant says {clipped(answer)}"
    return None


def clipped(text: str | None, most: int = 60) -> str:
    return (
        "nothing"
        if text is None
        else repr(text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}")
    )


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---- special strings in contents ----


def special_strings(tokenizer) -> list[str]:
    """The texts of the special tokens, which other tools turn into their ids wherever they stand."""
    return tokenizer.convert_ids_to_tokens(special_ids(tokenizer))


def patterns(tokenizer) -> tuple[list[tuple[int, int]], list[str]]:
    """Pairs of ids that a special string, encoded as text, holds in any surroundings; and the strings without one."""
    around = ("{}", "a{}b", " {} ", "({})", "\n{}\n", "好{}好", "1{}1", "|{}|", "<{}>")
    strings = special_strings(tokenizer)
    talks = [[{"role": "user", "content": form.format(text)}] for text in strings for form in around]
    encoded = [ids for ids, _ in encode_batch(tokenizer, talks, default_system=None)]
    pairs, without = set(), []
    for n, text in enumerate(strings):
        held = (set(itertools.pairwise(ids)) for ids in encoded[n * len(around) : (n + 1) * len(around)])
        spelt = {pair: tokenizer.decode(list(pair)) for pair in set.intersection(*held)}
        if core := [pair for pair in sorted(spelt) if len(spelt[pair]) > 1 and spelt[pair] in text]:
            pairs.add(max(core, key=lambda pair: len(spelt[pair])))
        else:
            without.append(text)
    return sorted(pairs), without


def smuggling(rows: PackedRows, items: np.ndarray, tokenizer) -> Iterator[tuple[int, str, str]]:
    """(conversation, special string, what stands around it) where a content holds one as text."""
    found = re.compile("|".join(re.escape(text) for text in special_strings(tokenizer)))
    special = special_ids(tokenizer)
    for item in items.tolist():
        ids = np.asarray(rows.tokens[rows.offsets[item] : rows.offsets[item + 1]])
        contents = decoded(tokenizer, ids[~np.isin(ids, special)])
        if hit := found.search(contents):
            yield item, hit[0], contents[max(0, hit.start() - 60) : hit.start() + 200]
