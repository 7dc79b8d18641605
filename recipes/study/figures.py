"""What was measured of finished runs, with 95 % intervals.

    <run>/eval/answers.jsonl, <base>/answers.jsonl -> Measured -> figures of one run, of several seeds, of two runs

Intervals are bootstrap ones over answers, documents or prompts, drawn whole; with several seeds, over these as well. A
difference of two runs is drawn in pairs: both were asked the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DRAWS = 1000
ALL = "all"


@dataclass
class Items:
    """above / below of every item, of one seed or of several: float64 [seeds, items]."""

    above: np.ndarray
    below: np.ndarray

    def value(self) -> float:
        return float(self.above.sum() / self.below.sum())

    def interval(self, other: "Items | None" = None) -> tuple[float, float]:
        """Of the ratio; with `other`, of ours / theirs - 1, drawn in pairs."""
        generator = np.random.default_rng(0)
        items = generator.integers(self.above.shape[1], size=(DRAWS, self.above.shape[1]))
        drawn = self.drawn(items, generator)
        if other is not None:
            drawn = drawn / other.drawn(items, generator) - 1
        low, high = np.quantile(drawn, (0.025, 0.975))
        return float(low), float(high)

    def drawn(self, items: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The ratio for every draw of items, int64 [draws, items], each with seeds of its own."""
        seeds = generator.integers(len(self.above), size=(len(items), len(self.above)))
        above, below = (
            np.take_along_axis(side[seeds].sum(1), items, axis=1).sum(1) for side in (self.above, self.below)
        )
        return above / below


Measured = dict[tuple[str, str], Items]  # (measure, part) -> items


def of_folder(folder: Path, text_without: Sequence[str] = ()) -> Measured:
    """Of one run's evaluation. Measures: answers and text (bits per byte), followed, stopped (shares).

    An answer without a word has not stopped: a model that says nothing would seem to have learnt when to end.

    text_without: sources of text that do not count as such.
    """
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def add(measure: str, parts: tuple[str, ...], above: float, below: float) -> None:
        for part in parts:
            found.setdefault((measure, part), []).append((above, below))

    for line in lines:
        scores = line["scores"]
        match line["task"]:
            case "text" if line["source"] in text_without:
                continue
            case "references" | "text":
                measure = {"references": "answers"}.get(line["task"], line["task"])
                parts = (line["language"], f"{line['language']}, {line['source']}")
                add(measure, parts, scores["nats"] / np.log(2), scores["bytes"])
            case "instruct_en" | "instruct_zh":
                language = line["task"].removeprefix("instruct_")
                add("followed", (language,), scores["prompts, strict"], 1.0)
                add("stopped", (language, ALL), float(line["stopped"] and bool(line["written"].strip())), 1.0)
    return {key: Items(*np.array(pairs).T[:, None, :]) for key, pairs in found.items()}


def together(seeds: list[Measured]) -> Measured:
    """The same run with several seeds."""
    return {
        key: Items(*(np.concatenate([getattr(s[key], side) for s in seeds]) for side in ("above", "below")))
        for key in seeds[0]
    }
