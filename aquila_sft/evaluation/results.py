"""Scores of a run as the model card's table: rows, averages, standard errors, chance, beside the published columns.

{part: outcomes} -> Score a row -> averages -> results.json, results.csv, results.md
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aquila_sft.evaluation.benchmarks import CHINESE, ENGLISH, Benchmark
from aquila_sft.evaluation.items import Item

CARD = Path(__file__).parents[2] / "data" / "card_results.yaml"
TWO_SIDED_95 = 1.96


@dataclass(frozen=True)
class Score:
    """A row, in per cent. error: standard error; chance: what guessing scores; bits_per_byte: of the right choice."""

    row: str
    value: float
    error: float | None
    chance: float | None = None
    items: int = 0
    bits_per_byte: float | None = None


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def row(benchmark: Benchmark, items: dict[str, list[Item]], outcomes: dict[str, list]) -> Score:
    """The plain mean over parts, as the reference: a subject of 20 questions weighs as much as one of 500."""
    parts = [[outcome.scores[benchmark.score] for outcome in outcomes[part]] for part in benchmark.parts]
    listed = [item for part in benchmark.parts for item in items[part]]
    bits = None
    if benchmark.form == "choices":
        bits = mean(mean(o.scores["bits_per_byte"] for o in outcomes[part]) for part in benchmark.parts)
    chance = (
        100 * mean(mean(1 / len(i.choices) for i in items[p]) for p in benchmark.parts) if bits is not None else 0.0
    )
    error = standard_error(parts)
    return Score(
        benchmark.row, 100 * mean(map(mean, parts)), None if error is None else 100 * error, chance, len(listed), bits
    )


def standard_error(parts: Sequence[Sequence[float]]) -> float | None:
    """Of the plain mean of the parts' means: sqrt(sum of var_i / n_i) / parts, with n - 1 as the reference.

    Where a part has one item (eval.limit), all parts are taken to have the variance of all items. None for one item.
    """
    if sum(map(len, parts)) < 2:
        return None
    pooled = variance([value for part in parts for value in part])
    each = [pooled if len(part) < 2 else variance(part) for part in parts]
    if any(len(part) < 2 for part in parts):
        each = [pooled] * len(parts)
    return math.sqrt(sum(v / len(part) for v, part in zip(each, parts, strict=True))) / len(parts)


def variance(values: Sequence[float]) -> float:
    centre = mean(values)
    return sum((value - centre) ** 2 for value in values) / (len(values) - 1)


def averages(scores: dict[str, Score]) -> dict[str, Score]:
    """The card's: ten English rows, two Chinese ones, and the mean of both means. Only of rows that are all there."""
    found: dict[str, Score] = {}
    for name, members in (("Average-English", ENGLISH), ("Average-Chinese", CHINESE)):
        if all(member in scores for member in members):
            found[name] = averaged(name, [scores[member] for member in members])
    if len(found) == 2:
        found["Average"] = averaged("Average", list(found.values()))
    return found


def averaged(name: str, scores: list[Score]) -> Score:
    errors = [score.error for score in scores]
    error = None if None in errors else math.sqrt(sum(e**2 for e in errors)) / len(scores)
    return Score(
        name, mean(s.value for s in scores), error, mean(s.chance or 0 for s in scores), sum(s.items for s in scores)
    )


# ---- published ----


def card() -> dict:
    """data/card_results.yaml: {source, columns, rows: {row: {items, values}}, third_party}."""
    import yaml

    return yaml.safe_load(CARD.read_text("utf-8"))


def published_error(value: float, items: int | None) -> float:
    """Of a published row, from its size alone; an average has none of its own here, so 0: the mark is strict."""
    share = value / 100
    return 100 * math.sqrt(share * (1 - share) / (items - 1)) if items and items > 1 else 0.0


def within_error(ours: Score, value: float, items: int | None) -> bool:
    """Whether the difference is no more than chance would make of it, 95 times in a hundred.

    Few items that are all right, or all wrong, seem to have no error at all: then the published rate has it.
    """
    if ours.error is None:
        return False
    error = max(ours.error, published_error(value, ours.items)) if items else ours.error
    return abs(ours.value - value) <= TWO_SIDED_95 * math.hypot(error, published_error(value, items))


# ---- written ----


def table(scores: list[Score], name: str) -> list[list[str]]:
    """Header and rows in the card's shape: ours, its error, chance, bits per byte, then the card's columns."""
    published = card()
    lines = [
        ["Metrics (0-shot)", name, "± (s.e.)", "chance", "items", "bits per byte of the answer", *published["columns"]]
    ]
    for score in scores:
        theirs = published["rows"].get(score.row, {"values": [], "items": None})
        marked = [
            "not read"
            if value is None
            else f"{value:.2f}" + (" ≈" if within_error(score, value, theirs["items"]) else "")
            for value in theirs["values"]
        ]
        lines.append(
            [
                score.row,
                f"{score.value:.2f}",
                "–" if score.error is None else f"{score.error:.2f}",
                "–" if score.chance is None else f"{score.chance:.1f}",
                str(score.items),
                "–" if score.bits_per_byte is None else f"{score.bits_per_byte:.3f}",
                *marked,
            ]
        )
    return lines


def third_party_table() -> list[list[str]]:
    given = card()["third_party"]
    models = list(given["models"])
    rows = [[task, *(f"{given['models'][model][task]:.2f}" for model in models)] for task in given["tasks"]]
    return [[given["setting"], *models], *rows]


def markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rest)) + "\n"


def as_csv(lines: list[list[str]]) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(lines)
    return written.getvalue()


def write(folder: Path, name: str, scores: list[Score], other: dict, about: dict) -> str:
    """results.json, results.csv, results.md; returns the markdown."""
    lines = table(scores, name)
    told = [f"# {name}\n", *(f"{key}: {value}  " for key, value in about.items()), ""]
    if scores:
        told += [
            markdown(lines),
            "≈: no further from ours than both standard errors explain (95 %).  ",
            f"Published columns: {card()['source']}\n",
            f"{card()['third_party']['source']}\n",
            markdown(third_party_table()),
        ]
    for title, rows in other.items():
        told += [f"## {title}\n", markdown(rows)]
    text = "\n".join(told)
    (folder / "results.md").write_text(text, "utf-8")
    (folder / "results.csv").write_text(as_csv(lines) if scores else "", "utf-8")
    content = {
        "model": name,
        **about,
        "rows": [vars(score) for score in scores],
        "other": {title: [dict(zip(rows[0], r, strict=True)) for r in rows[1:]] for title, rows in other.items()},
    }
    (folder / "results.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return text
