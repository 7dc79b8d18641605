"""Bits per byte of texts or answers by language and source, with intervals: of one model, or before and after tuning.

    an Outcome for each, scores {nats, bytes}, about {language, source} -> sums of each part -> rows of a table

Independent of the vocabulary, so models compare.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from aquila_sft.evaluation.engine import Outcome

ALL = "all"
DRAWS, SEED = 1_000, 0
Part = tuple[str, str]  # language, source


def interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float] | None:
    """95 % of the bootstrap's draws of sum(above) / sum(below), items drawn whole. None for fewer than two."""
    count = len(above)
    if count < 2:
        return None
    both, generator = np.stack([above, below], axis=1), np.random.default_rng(SEED)
    sums = np.array([both[generator.integers(count, size=count)].sum(0) for _ in range(DRAWS)])
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    return float(low), float(high)


def by_part(outcomes: Sequence[Outcome]) -> dict[Part, list[int]]:
    """Places of the outcomes of every language, and of every source in it where there are several sources."""
    parts: dict[Part, list[int]] = defaultdict(list)
    several = len({outcome.about["source"] for outcome in outcomes}) > 1
    for place, outcome in enumerate(outcomes):
        language = outcome.about["language"]
        parts[language, ALL].append(place)
        if several:
            parts[language, outcome.about["source"]].append(place)
    return dict(sorted(parts.items(), key=lambda part: (part[0][0], part[0][1] != ALL, part[0][1])))


def column(outcomes: Sequence[Outcome], name: str) -> np.ndarray:
    return np.array([outcome.scores[name] for outcome in outcomes])


def table(counted: str, after: Sequence[Outcome], before: Sequence[Outcome] | None = None) -> list[list[str]]:
    """Header and rows. A change is drawn with its items in pairs: both models read the same."""
    rows = [["language", "source", counted, "bytes", "bits per byte", "low (95 %)", "high (95 %)"]]
    spent, size = column(after, "nats") / math.log(2), column(after, "bytes")  # bits, bytes
    if before is not None:
        rows[0] += ["before", "change", "change, low (95 %)", "change, high (95 %)"]
        earlier = column(before, "nats") / math.log(2)
    for part, places in by_part(after).items():
        row = [*part, str(len(places)), str(int(size[places].sum())), *told(spent[places], size[places])]
        if before is not None:
            row.append(told(earlier[places], size[places])[0])
            row += told(spent[places] - earlier[places], size[places], "+.4f")
        rows.append(row)
    return rows


def told(above: np.ndarray, below: np.ndarray, form: str = ".4f") -> list[str]:
    """The ratio of the sums and its interval."""
    value = format(above.sum() / below.sum(), form)
    ends = interval(above, below)
    return [value, *(format(end, form) for end in ends)] if ends else [value, "–", "–"]
