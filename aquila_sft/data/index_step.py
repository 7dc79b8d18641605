"""The step `index`, of documents and of conversations alike: the n-grams of benchmark items, read back by every task.

<settings>.decontaminate=<folder> -> decontaminate.Index -> index/benchmarks.npz -> index_of(work)
"""

import functools
from pathlib import Path

from aquila_sft.data import decontaminate
from aquila_sft.data.tasks import Step, Work

FILE = "benchmarks.npz"


def tasks(work: Work) -> list[str]:
    return [FILE] if work.policy.decontaminate else []


def make(work: Work, task: str, target: Path) -> None:
    folder = Path(work.policy.decontaminate).expanduser()
    items = decontaminate.read(folder, setting=f"{work.settings}.decontaminate")
    decontaminate.Index(items, work.policy.ngram_words, work.policy.ngram_characters).save(target)


INDEX = Step("index", tasks, make)


def index_of(work: Work) -> decontaminate.Index | None:
    """None where nothing is looked for."""
    return loaded(INDEX.target(work, FILE)) if work.policy.decontaminate else None


@functools.lru_cache(maxsize=1)
def loaded(path: Path) -> decontaminate.Index:
    return decontaminate.Index.load(path)
