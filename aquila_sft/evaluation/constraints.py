"""Instructions whose obedience a program can tell: the checks behind data/instruct_zh.jsonl and instruct_en.jsonl.

    {"prompt": "用不超过二十个字介绍北京。", "checks": [["max_characters", 20]]} + an answer -> [True]

A check counts as a reader of the instruction would: characters without blanks, words between blanks, sentences at
。！？ and at full stops that end one, lines with something in them. A word of Latin letters is looked for as a whole,
in small letters or capitals.
"""

import json
import re
from collections.abc import Callable

HAN = re.compile(r"[\u3400-\u9fff]")
CLOSING = "\"'”’)]"  # what may stand between a full stop and the blank behind it
SENTENCE_ENDS = re.compile(
    r"[。！？!?…]++(?![#]\s+[a-z])|(?P<stops>\.+)(?=[#]*(?:\s|$))|\n".replace("#", re.escape(CLOSING))
)
BEFORE_A_NAME = {"mr", "mrs", "ms", "dr", "prof", "st", "mt", "gen", "vs", "e.g", "i.e", "cf"}  # end no sentence
BEFORE_A_NUMBER = set("no p pp fig vol ch jan feb mar apr jun jul aug sep sept oct nov dec".split())
ANYWHERE = {"a.m", "p.m", "etc", "jr", "sr", "inc", "ltd", "co", "corp", "approx"}  # end one before a capital letter


def characters(text: str) -> int:
    return len(re.sub(r"\s", "", text))


def words(text: str) -> list[str]:
    """As word processors count: between blanks or dashes, with a letter or digit in it."""
    return [word for word in re.split(r"[\s—–]+|--+", text) if any(map(str.isalnum, word))]


def sentences(text: str) -> list[str]:
    found, begun = [], 0
    for end in SENTENCE_ENDS.finditer(text):
        if not end["stops"] or ends_a_sentence(text[: end.start()], end["stops"], text[end.end() :]):
            found.append(text[begun : end.end()])
            begun = end.end()
    return [sentence for sentence in [*found, text[begun:]] if any(map(str.isalnum, sentence))]


def ends_a_sentence(before: str, stops: str, behind: str) -> bool:
    """Whether full stops with a blank behind them end one: those of `Dr.`, `J.`, `U.S.`, and of `1.` before an item of
    a list, do not."""
    following = behind.lstrip(CLOSING).lstrip(" \t")[:1]
    word = re.search(r"[\w.]*$", before)[0]
    if re.search(r"(?:^|\n)\s*\d+$", before):
        return False
    if following in ("", "\n"):
        return True
    if stops != "." or word.lower() in ANYWHERE:
        return not following.islower()
    if word.lower() in BEFORE_A_NUMBER:
        return not following.isdigit()
    is_initial = re.fullmatch(r"(?:[A-Z]\.)*[A-HJ-Z]", word)  # `I.` may well end one
    return not is_initial and word.lower() not in BEFORE_A_NAME


def lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def listed(text: str, mark: str) -> int:
    """Lines that begin as an item of a list: `1.`, `1、` or `(1)`, or a dash, star or dot."""
    pattern = {"number": r"\s*[（(]?\d+[.、．)）](?!\d)", "bullet": r"\s*[-*•·](?![-*])\s*\S"}[mark]
    return sum(bool(re.match(pattern, line)) for line in text.split("\n"))


def paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def count(text: str, word: str) -> int:
    if not re.fullmatch(r"[A-Za-z]+", word):
        return text.count(word)
    return len(re.findall(rf"(?<![A-Za-z]){word}(?![A-Za-z])", text, re.IGNORECASE))


def begins(text: str, words: str) -> bool:
    return text.strip().lower().startswith(words.lower())


def ends(text: str, words: str) -> bool:
    """A word at the end may have its full stop behind it."""
    text = text.strip().lower()
    return (text.rstrip(".!?" + CLOSING) if words[-1].isalnum() else text).endswith(words.lower())


def is_json(text: str, *keys: str) -> bool:
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(keys) <= set(found) if keys else isinstance(found, (dict, list))


def comma_separated(text: str) -> list[str]:
    """The items of a list in one line; none where an item is more than a few words."""
    items = re.split(r"[,，、]", text.strip())
    return items if "\n" not in text.strip() and all(1 <= len(words(item)) <= 3 for item in items) else []


def initials(text: str) -> str:
    return "".join(re.sub(r"^\W+", "", line)[:1].upper() for line in lines(text))


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
    "max_words": lambda text, n: len(words(text)) <= n,
    "min_words": lambda text, n: len(words(text)) >= n,
    "paragraphs": lambda text, n: len(paragraphs(text)) == n,
    "comma_separated": lambda text, n: len(comma_separated(text)) == n,
    "contains": lambda text, *needed: all(count(text, word) for word in needed),
    "without": lambda text, *banned: not any(count(text, word) for word in banned),
    "times": lambda text, word, n: count(text, word) >= n,
    "begins": begins,
    "ends": ends,
    "one_of": lambda text, *choices: text.strip().rstrip(".!").lower() in choices,
    "acrostic": lambda text, word: initials(text) == word,
    "heading": lambda text: text.lstrip().startswith("# "),
    "lower": str.islower,
    "upper": str.isupper,
    "json": is_json,
    "quoted": lambda text: len(text.strip()) > 2 and text.strip()[0] in '“「"' and text.strip()[-1] in '”」"',
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
