"""The reference's arithmetic on one item: what is scored, which choice is taken, when a written answer is right.

The reference is lighteval at v0.3.0 (commit e6fdcc76, March 2024) with the task file that OpenSeek publishes, whose
rows are the model card's. Where a rule looks odd it is kept, and the oddity is named: numbers have to compare.
"""

import re
import string
from collections.abc import Callable, Sequence

NO_NUMBER = "[invalid]"


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both. Blanks that end the context move to the front of the continuation.

    Both texts are encoded together and the context alone; what is behind the context's length is the continuation. A
    merge across the seam is thereby cut where the context alone ends.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    context_ids = encode(context)
    return context_ids, encode(context + continuation)[len(context_ids) :]


def characters(choice: str) -> int:
    """What a log-probability is divided by: characters (not bytes, not tokens) without one leading blank."""
    return len(choice) - choice.startswith(" ")


def chosen(log_probs: Sequence[float], choices: Sequence[str]) -> dict[str, int]:
    """{acc: index by the plain sum, acc_norm: index by the sum per character}; the first of equals."""
    by_character = [value / max(1, characters(text)) for value, text in zip(log_probs, choices, strict=True)]
    return {"acc": first_best(log_probs), "acc_norm": first_best(by_character)}


def first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def clean_hellaswag(text: str) -> str:
    """WikiHow's marks out, pairs of blanks to one. Once: a second time would make one of three blanks, too."""
    text = text.replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def before_stop(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def plain(text: str) -> str:
    """Lower case, no ASCII punctuation. Articles and Chinese punctuation stay."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def trivia_golds(aliases: Sequence[str]) -> list[str]:
    """What an answer may be. An alias that begins with another one is left out, although whole answers are compared:
    with "Onion" there, "Onion skins" is wrong."""
    kept: list[str] = []
    for alias in sorted(aliases):
        if not kept or not alias.startswith(kept[-1]):
            kept.append(alias)
    return [plain(alias) for alias in kept]


def number_of(text: str) -> str:
    """The number behind "#### ", without commas."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1].replace(",", "") if found else NO_NUMBER


def is_right(score: str, written: str, golds: Sequence[str]) -> bool:
    """Whether a written answer equals one of `golds`. Nothing written is wrong."""
    if not written:
        return False
    if score == "trivia":
        return plain(written.strip()) in [gold.strip() for gold in golds]
    return number_of(written.strip()) in [number_of(gold.strip()) for gold in golds]
