"""Instructions whose obedience a program can tell: the checks behind data/instruct_zh.jsonl.

    {"prompt": "用不超过二十个字介绍北京。", "checks": [["max_characters", 20]]} + an answer -> [True]

A check counts as a reader of the instruction would: characters without blanks, sentences at 。！？, lines with
something in them.
"""

import json
import re
from collections.abc import Callable

HAN = re.compile(r"[\u3400-\u9fff]")


def characters(text: str) -> int:
    return len(re.sub(r"\s", "", text))


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"[。！？!?…]+|\n", text) if s.strip()]


def lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def listed(text: str, mark: str) -> int:
    """Lines that begin as an item of a list: `1.`, `1、` or `(1)`, or a dash, star or dot."""
    pattern = {"number": r"\s*[（(]?\d+[.、．)）]", "bullet": r"\s*[-*•·]\s*\S"}[mark]
    return sum(bool(re.match(pattern, line)) for line in text.split("\n"))


def is_json(text: str) -> bool:
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


def share_of_han(text: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum(bool(HAN.match(c)) for c in letters) / max(1, len(letters))


CHECKS: dict[str, Callable[..., bool]] = {
    "max_characters": lambda text, n: characters(text) <= n,
    "min_characters": lambda text, n: characters(text) >= n,
    "sentences": lambda text, n: len(sentences(text)) == n,
    "lines": lambda text, n: len(lines(text)) == n,
    "numbered": lambda text, n: listed(text, "number") == n,
    "bulleted": lambda text, n: listed(text, "bullet") == n,
    "contains": lambda text, *words: all(word in text for word in words),
    "without": lambda text, *words: not any(word in text for word in words),
    "times": lambda text, word, n: text.count(word) >= n,
    "begins": lambda text, words: text.strip().startswith(words),
    "ends": lambda text, words: text.strip().endswith(words),
    "json": is_json,
    "quoted": lambda text: text.strip()[:1] in '“「"' and text.strip()[-1:] in '”」"',
    "chinese": lambda text: share_of_han(text) >= 0.9,
    "english": lambda text: share_of_han(text) == 0 and any(c.isascii() and c.isalpha() for c in text),
    "no_digits": lambda text: not re.search(r"\d", text),
    "title": lambda text: bool(re.search(r"《[^》]+》", text)),
}


def followed(checks: list[list], answer: str) -> list[bool]:
    """For each check whether the answer obeys it; an empty answer obeys none."""
    if not answer.strip():
        return [False] * len(checks)
    return [CHECKS[name](answer, *arguments) for name, *arguments in checks]
