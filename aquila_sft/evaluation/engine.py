"""Benchmarks as lm-eval tasks, and its evaluation of them all with one model.

    Benchmark + items -> one ItemTask a part -> lm_eval.evaluate(scorer, …) -> an Outcome for every item

lm-eval asks for everything of one kind at once, over all tasks, so the scorer can sort across them.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task, TaskConfig
from lm_eval.evaluator import evaluate

from aquila_sft.evaluation import rules
from aquila_sft.evaluation.benchmarks import Benchmark
from aquila_sft.evaluation.items import Item


@dataclass(frozen=True)
class Outcome:
    """What one item came to: 1 or 0 by each rule, and for choices the bits per byte of the right one."""

    scores: dict[str, float]
    log_probs: tuple[float, ...] = ()
    written: str | None = None
    stopped: bool | None = None  # whether the model ended what it wrote by itself; of chats
    about: dict[str, str] = field(default_factory=dict)  # where, language, source; of texts and reference answers

    def as_line(self) -> dict:
        """As answers.jsonl has it, without what this kind of item does not have."""
        kept = {name: value for name, value in vars(self).items() if value not in (None, ())}
        return kept.pop("about") | kept


class ItemTask(Task):
    """Items that are there already, as a task: no data set, no examples, no filters of lm-eval's."""

    VERSION = 1

    def __init__(self, name: str, items: Sequence, requests_of: Callable, outcome_of: Callable) -> None:
        # it warns of settings that a task like this has no use for
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__()
        self._config = TaskConfig(task=name, num_fewshot=0, output_type="multiple_choice")
        self.items, self.requests_of, self.outcome_of = list(items), requests_of, outcome_of
        self.outcomes: list[Outcome] = []

    def download(self, *_, **__) -> None: ...

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list:
        return self.items

    def doc_to_text(self, doc) -> str:
        return doc.prompt

    def doc_to_target(self, doc) -> str:
        return ""

    def build_all_requests(self, **_) -> None:
        self._instances = [
            Instance(kind, {}, arguments, number, metadata=(self.task_name, place, 1))
            for place, item in enumerate(self.items)
            for number, (kind, arguments) in enumerate(self.requests_of(item))
        ]

    def construct_requests(self, *_, **__) -> list[Instance]:
        return self._instances  # all of them are made at once, above

    def process_results(self, doc, results: list) -> dict[str, float]:
        outcome = self.outcome_of(doc, results)
        self.outcomes.append(outcome)
        return outcome.scores

    def aggregation(self) -> dict[str, Callable]:
        return dict.fromkeys(self.outcomes[0].scores, np.mean)

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name != "bits_per_byte" for name in self.outcomes[0].scores}


def task(benchmark: Benchmark, part: str, items: list[Item]) -> ItemTask:
    if benchmark.form == "choices":
        return ItemTask(part, items, choices_of, chosen)

    def requests_of(item: Item) -> list:
        how = {"until": list(benchmark.stop), "max_gen_toks": benchmark.max_new_tokens}
        return [("generate_until", (item.prompt, how))]

    def written(item: Item, results: list[str]) -> Outcome:
        right = rules.is_right(benchmark.score, results[0], item.golds)
        return Outcome({benchmark.score: float(right)}, written=results[0])

    return ItemTask(part, items, requests_of, written)


def choices_of(item: Item) -> list:
    return [("loglikelihood", (item.prompt, choice)) for choice in item.choices]


def chosen(item: Item, results: list[tuple[float, None]]) -> Outcome:
    """By both rules, and the bits per byte of the right answer: it speaks where the choice is at chance."""
    values = [value for value, _ in results]
    scores = {rule: float(index == item.gold) for rule, index in rules.chosen(values, item.choices).items()}
    answer_bytes = len(item.choices[item.gold].encode())
    scores["bits_per_byte"] = -values[item.gold] / math.log(2) / answer_bytes
    return Outcome(scores, tuple(values))


def run(scorer, tasks: list[ItemTask]) -> dict[str, list[Outcome]]:
    """{task: an outcome for each of its items, in their order}."""
    evaluate(scorer, {task.task_name: task for task in tasks}, bootstrap_iters=0, log_samples=False)
    return {task.task_name: task.outcomes for task in tasks}
