"""Documents that hold an item of a benchmark: found by what n-grams of units they share with it.

    folder of benchmarks (jsonl, json, csv, tsv, parquet; .gz) -> items -> texts to look for -> n-grams -> Index
    document -> n-grams -> those in the index -> the items of which enough is there

Units are words, and single characters in Chinese, after NFKC and lower case (units.py): signs, blanks, width and case
hide nothing. Looked for is an item's question; one that is short, or that several items share ("which of these is
right?"), only together with one of its answers, or all. An item is found when at least COVERED of its n-grams are in a
document: a passage that a test quotes may be quoted elsewhere, half of the test item may not.

What is too short to be told from ordinary language cannot be found, and is counted: see Index.figures.
"""

import collections
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aquila_sft.data import conversations, sources
from aquila_sft.data.units import ngram_hashes, unit_hashes
from aquila_sft.errors import UserError

BLANK = re.compile(r"__+|(?<![^\s])_(?![^\s.,])")  # C-Eval's, and Winogrande's; not x_1
COVERED = 0.5  # of an item's n-grams
SHORTEST_WORDS = 8  # a question of so many words, fewer than an n-gram has, is looked for as a whole
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = (*sources.SUFFIXES, *TABLES)
NOT_ITEMS = ("SOURCE.json", "dataset_infos.json", "dataset_info.json", "README.json", "package.json")

# The names under which benchmarks keep what is asked and what may be answered, in lower case.
QUESTIONS = ("passage", "context", "ctx", "question", "stem", "goal", "sentence", "query", "problem", "prompt", "input")
ANSWERS = ("choices", "options", "endings", "a", "b", "c", "d", "e", "option1", "option2", "sol1", "sol2")
ANSWERS += ("answera", "answerb", "answerc", "answer", "answers", "value", "target", "text")
LETTERS = {"a", "b", "c", "d", "e", "1", "2", "3", "4", "5", ""}  # an answer's name and no answer


@dataclass(frozen=True)
class Item:
    benchmark: str
    question: str
    answers: tuple[str, ...]


class Index:
    """The n-grams of all items. `figures`: benchmark -> items, and how many of them are too short to be found."""

    def __init__(self, items: list[Item], words: int, characters: int) -> None:
        self.figures: dict[str, dict[str, int]] = {}
        self.benchmarks: list[str] = []  # of every text that is looked for
        self.sizes: list[int] = []  # its distinct n-grams
        asked = collections.Counter(question for question, _ in {(item.question, item.answers) for item in items})
        grams: dict[int, list[tuple[np.ndarray, int]]] = collections.defaultdict(list)
        for item in dict.fromkeys(items):
            figures = self.figures.setdefault(item.benchmark, {"items": 0, "too_short": 0})
            figures["items"] += 1
            looked_for = texts_of(item, characters, alone=asked[item.question] == 1)
            figures["too_short"] += not looked_for
            for units, is_chinese in looked_for:
                n = min(len(units), characters if is_chinese else words)
                hashes = np.unique(ngram_hashes(units, n))
                grams[n].append((hashes, len(self.benchmarks)))
                self.benchmarks.append(item.benchmark)
                self.sizes.append(len(hashes))
        self.tables = {n: table(found) for n, found in sorted(grams.items())}

    def save(self, path: Path) -> None:
        arrays = {
            f"{name}-{n}": array
            for n, of in self.tables.items()
            for name, array in zip(("hashes", "owners"), of, strict=False)
        }
        about = json.dumps({"figures": self.figures, "benchmarks": self.benchmarks, "sizes": self.sizes})
        with open(path, "wb") as file:
            np.savez(file, about=np.array(about), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Index":
        index = cls.__new__(cls)
        with np.load(path) as saved:
            index.__dict__.update(json.loads(str(saved["about"])))
            sizes = sorted(int(name.removeprefix("hashes-")) for name in saved.files if name.startswith("hashes-"))
            index.tables = {n: with_bits(saved[f"hashes-{n}"], saved[f"owners-{n}"]) for n in sizes}
        return index

    def __call__(self, units: np.ndarray) -> str | None:
        """The benchmark of an item that a text of these units holds, the first in the index; None for a clean one."""
        units = telling(units)
        seen: collections.Counter = collections.Counter()
        for n, (hashes, owners, maybe) in self.tables.items():
            here = ngram_hashes(units, n)
            here = np.unique(here[maybe[leading_bits(here, len(maybe))]])
            start, end = np.searchsorted(hashes, here), np.searchsorted(hashes, here, side="right")
            for i in np.flatnonzero(end > start):
                seen.update(owners[start[i] : end[i]].tolist())
        found = min((i for i, count in seen.items() if count >= COVERED * self.sizes[i]), default=None)
        return None if found is None else self.benchmarks[found]


def table(found: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n-grams, ascending; the number of the text that each is from; which leading bits occur at all."""
    hashes = np.concatenate([hashes for hashes, _ in found])
    owners = np.repeat(np.array([owner for _, owner in found]), [len(hashes) for hashes, _ in found])
    order = np.argsort(hashes, kind="stable")
    return with_bits(hashes[order], owners[order])


def with_bits(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    maybe = np.zeros(32 << len(hashes).bit_length(), dtype=bool)
    maybe[leading_bits(hashes, len(maybe))] = True
    return hashes, owners, maybe


def leading_bits(hashes: np.ndarray, size: int) -> np.ndarray:
    """As indices into `size` places, a power of two."""
    return hashes >> np.uint64(65 - size.bit_length())


def telling(units: np.ndarray) -> np.ndarray:
    """Without the single letters that name answers: whether they stand before an answer is a matter of layout."""
    return units[~np.isin(units, unit_hashes("a b c d e"))]


def texts_of(item: Item, characters: int, *, alone: bool) -> list[tuple[np.ndarray, bool]]:
    """(units, is Chinese) of what is looked for; none when all is too short."""

    def long_enough(text: str) -> list[tuple[np.ndarray, bool]]:
        is_chinese = conversations.language(text) == "zh"
        units = telling(unit_hashes(text))
        return [(units, is_chinese)] if len(units) >= (characters if is_chinese else SHORTEST_WORDS) else []

    looked_for = []
    if len(around := BLANK.split(item.question)) > 1:  # with each answer filled in, and as it stands
        looked_for = [one for answer in item.answers for one in long_enough(answer.join(around))]
    if alone and (question := long_enough(item.question)):
        return looked_for + question
    answers = [*item.answers, "\n".join(item.answers)] if len(item.answers) > 1 else item.answers
    return looked_for + [one for answer in answers for one in long_enough(f"{item.question}\n{answer}")]


def read(folder: Path, setting: str = "prepare.decontaminate") -> list[Item]:
    """All items of all benchmarks in a folder. A benchmark is a sub-folder, or a file beside them.

    Raises UserError for a folder without items, and for a file in which none is recognized.
    """
    if not folder.is_dir():
        raise UserError(f"{setting}={folder}: no such folder; give one with files of benchmark items")
    items: list[Item] = []
    for path in files(folder):
        inside = path.relative_to(folder).parts
        benchmark = inside[0] if len(inside) > 1 else path.name.split(".")[0]
        found = [item for record in records(path) if (item := item_of(record, benchmark))]
        if not found:
            raise UserError(
                f"{path}: no item of a benchmark is recognized in it (a record needs one of {', '.join(QUESTIONS)}); "
                f"take it out of {setting}"
            )
        items += found
    if not items:
        raise UserError(f"{setting}={folder} holds no files of {', '.join(SUFFIXES)}")
    return items


def files(folder: Path, inside: tuple[Path, ...] = ()) -> list[Path]:
    """All that may hold items, links followed; inside: the folders around it, into which no link leads again."""
    found: list[Path] = []
    inside = (*inside, folder.resolve())
    with sources.readable(folder):
        paths = sorted(folder.iterdir())
    for path in paths:
        if path.is_dir():
            found += files(path, inside) if path.resolve() not in inside else []
        elif path.name.endswith(SUFFIXES) and path.name not in NOT_ITEMS or not path.exists():
            found.append(path)  # a link to nothing, too: reading it says so
    return found


def records(path: Path) -> Iterator[dict]:
    if path.name.endswith(TABLES):
        yield from rows(path)
        return
    for _, record in sources.read(path):
        if record is not None:
            yield record


def rows(path: Path) -> Iterator[dict]:
    """The rows of a table, by its header; MMLU's have none, and are question, answers, letter."""
    with sources.readable(path), sources.open_bytes(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            lines = list(csv.reader(text, delimiter="\t" if ".tsv" in path.name else ","))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a readable table: {error}") from None
    lines = [line for line in lines if line]
    if lines and {name.strip().lower() for name in lines[0]} & set(QUESTIONS):
        header, lines = [name.strip() for name in lines[0]], lines[1:]
    else:
        header = ["question", "A", "B", "C", "D", "answer"]
    for line in lines:
        yield dict(zip(header, line, strict=False))


def item_of(record: dict, benchmark: str) -> Item | None:
    asked, answers = [], []
    for key, value in flat(record):
        if key in QUESTIONS:
            asked.append(value)
        elif key in ANSWERS and value.strip().lower() not in LETTERS:
            answers.append(value)
    question = "\n".join(dict.fromkeys(asked))
    return Item(benchmark, question, tuple(dict.fromkeys(answers))) if question.strip() else None


def flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """(name in lower case, string) of every string in a record; those of a list have the list's name."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(inner, name.lower())
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from flat(inner, key)


def sha256(items: list[Item]) -> str:
    """Of what is looked for, whatever its files are called; for a run's identity."""
    total = hashlib.sha256()
    for item in items:
        total.update(repr((item.benchmark, item.question, item.answers)).encode())
    return total.hexdigest()
