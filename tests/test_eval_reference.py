"""Item by item the reference: its log-likelihoods, choices and answers for the same model and items.

own_items.json and real_items.json hold what lighteval v0.3.0 with OpenSeek's task file gave for the tiny model below
(eval_reference/make.py says how); real_items.json holds no text of a benchmark, only hashes of its prompts.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from aquila_sft.evaluation import benchmarks, items

HERE = Path(__file__).parent / "eval_reference"
OURS = {
    "arc:easy": "arc_easy",
    "arc:challenge": "arc_challenge",
    "commonsense_qa": "commonsenseqa",
    "trivia_qa": "triviaqa",
}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    from aquila_sft import model as models
    from aquila_sft import swap
    from aquila_sft.evaluation.journal import Journal
    from aquila_sft.evaluation.scorer import Scorer, Settings, autocast_of

    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(folder)
    tiny_model(folder, tokenizer, initializer_range=0.08, max_position_embeddings=8192)
    tokenizer.model_max_length = 10**9
    model = models.load(folder).eval()
    swap.install(model, "torch")
    settings = Settings(4096, True, autocast_of("cpu", "fp32"))
    return Scorer(model, tokenizer, Journal(folder / "journal", "0" * 64), settings)


def expected(name: str) -> dict[tuple[str, str], dict]:
    listed = json.loads((HERE / name).read_text("utf-8"))["items"]
    return {(OURS.get(i["task"], i["task"].replace("mmlu_cloze:", "mmlu:")), i["prompt"]): i for i in listed}


def compare(scorer, data: Path, wanted: dict, per_part: int | None) -> tuple[int, float]:
    """(items compared, largest difference of a log-likelihood). Fails at the first choice or answer that differs."""
    from aquila_sft.evaluation import engine

    parts = {part for part, _ in wanted}
    tasks, listed = [], {}
    for name in benchmarks.GROUPS["card"]:
        benchmark = benchmarks.load(name)
        there = {part: source for part, source in benchmark.parts.items() if part in parts}
        benchmark = dataclasses.replace(benchmark, parts=there)
        limit = None if per_part is None else per_part * len(there)
        for part, found in items.read(benchmark, str(data), Path("unused"), limit).items():
            tasks.append(engine.task(benchmark, part, found))
            listed[part] = found
    outcomes = engine.run(scorer, tasks)
    compared, worst = 0, 0.0
    for part, found in listed.items():
        for item, outcome in zip(found, outcomes[part], strict=True):
            theirs = wanted.pop((part, hashlib.sha256(item.prompt.encode()).hexdigest()[:16]))
            if outcome.written is None:
                assert {rule: outcome.scores[rule] for rule in ("acc", "acc_norm")} == theirs["scores"], (part, item)
                pairs = zip(outcome.log_probs, theirs["log_probs"], strict=True)
                worst = max(worst, *(abs(ours - reference) for ours, reference in pairs))
            else:
                assert outcome.written == theirs["written"], (part, item)
                assert set(outcome.scores.values()) == set(theirs["scores"].values()), (part, item)
            compared += 1
    assert not wanted, list(wanted)[:3]
    return compared, worst


def test_items_of_every_task_score_as_the_reference_scores_them(scorer):
    compared, worst = compare(scorer, HERE / "items", expected("own_items.json"), None)
    assert compared == 43
    assert worst < 1e-4


@pytest.mark.real_data
@pytest.mark.skipif("AQUILA_REAL_DATA" not in os.environ, reason="AQUILA_REAL_DATA is not set")
def test_real_items_of_every_task_and_subject_score_as_the_reference_scores_them(scorer):
    compared, worst = compare(scorer, Path(os.environ["AQUILA_REAL_DATA"]), expected("real_items.json"), 2)
    assert compared == 372
    assert worst < 1e-4
