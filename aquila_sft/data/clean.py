"""A text as it is trained on, or the reason why it is not.

    text -> NFC, plain line ends, no control characters -> long enough? words? not repeated? not broken?

Light on purpose: the corpora that the recipes name were filtered by their makers, and what is wrong with text of one's
own is for its owner to know. Pure functions; every reason is one that the ledger counts.
"""

import re
import unicodedata
from collections import Counter

from aquila_sft.config.data import CleanPolicy
from aquila_sft.data import chat_documents

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]")
LINE_END = re.compile(r"[ \t\u3000]*(?:\r\n?|\n|\u2028|\u2029)")
REPLACED = "\ufffd"  # what a decoder leaves where bytes made no character
MOST_REPLACED = 0.001
LONG_LINE = 20  # characters: shorter lines (braces, list marks, verses) may come again


def normal(text: str) -> str:
    """NFC, as the published vocabulary has it; \\n at line ends, and no blanks before them; no control characters."""
    text = unicodedata.normalize("NFC", LINE_END.sub("\n", CONTROL.sub("", text))).strip("\n")
    # a conversation's last turn ends with its line, as the chat template has it
    return text + "\n" if text.endswith(chat_documents.CLOSE) else text


def problem(text: str, policy: CleanPolicy) -> str | None:
    """Why a normal text is not trained on, or None."""
    if not text.strip():
        return "empty text"
    if len(text.encode()) < policy.min_bytes:
        return "short text"
    if text.count(REPLACED) > MOST_REPLACED * len(text):
        return "text that was decoded wrongly"
    if policy.min_letters and share_of_letters(text) < policy.min_letters:
        return "few letters"
    if policy.max_repeated < 1 and share_repeated(text) > policy.max_repeated:
        return "repeated lines"
    return None


def share_of_letters(text: str) -> float:
    """Letters and digits among what is not blank."""
    solid = "".join(text.split())
    return sum(map(str.isalnum, solid)) / len(solid) if solid else 0.0


def share_repeated(text: str) -> float:
    """Characters in long lines that stood before, of all characters."""
    lines = [line for line in map(str.strip, text.split("\n")) if len(line) >= LONG_LINE]
    again = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return again / len(text)
