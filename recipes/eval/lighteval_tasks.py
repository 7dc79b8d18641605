"""The card's benchmarks as tasks of lighteval 0.13, for those who want to score with it, in an environment of its own:

    pip install lighteval==0.13.0 "transformers<5" "huggingface_hub<1" "datasets<5" "xxhash<4"

(its dependencies replace the parser that Hydra needs; without network its registry stops at tasks of its own that
download when they are imported). The items are written by this repository, prompts and examples included, so there is
one definition of each benchmark:

    python -m aquila_sft.evaluation.export <data: hub or a folder> <items> [limit]          # here
    AQUILA_ITEMS=<items> lighteval accelerate "model_name=<model>,override_chat_template=False" \\
        "siqa_aquila|0,piqa_aquila|0" --custom-tasks recipes/eval/lighteval_tasks.py         # there

Without override_chat_template=False every prompt is rendered as a chat if the tokenizer has a template, as Aquila's
does; v0.3.0 did that only if asked. Tasks are named as the files are, with _aquila behind; a row of several parts is
the plain mean of its tasks.
"""

import os
import re
import string
from pathlib import Path

import numpy as np
from lighteval.metrics.dynamic_metrics import LogLikelihoodAccMetric
from lighteval.metrics.metrics_sample import ExactMatches
from lighteval.metrics.normalizations import LogProbCharNorm
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod

ITEMS = Path(os.environ["AQUILA_ITEMS"])


def choices_of(line: dict, task_name: str | None = None) -> Doc:
    return Doc(task_name=task_name, query=line["prompt"], choices=line["choices"], gold_index=line["gold"])


def answer_to(line: dict, task_name: str | None = None) -> Doc:
    golds = line["golds"]
    return Doc(task_name=task_name, query=line["prompt"], choices=golds, gold_index=list(range(len(golds))))


def plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def number_of(text: str) -> str:
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1].replace(",", "") if found else "[invalid]"


def equal(name: str, **normalize) -> SampleLevelMetric:
    return SampleLevelMetric(
        metric_name=name,
        sample_level_fn=ExactMatches(strip_strings=True, **normalize),
        category=SamplingMethod.GENERATIVE,
        corpus_level_fn=np.mean,
        higher_is_better=True,
    )


METRICS = {
    "acc_norm": [LogLikelihoodAccMetric(), LogLikelihoodAccMetric(LogProbCharNorm(ignore_first_space=True))],
    "acc": [LogLikelihoodAccMetric()],
    "trivia": [equal("qem", normalize_pred=plain)],
    "gsm8k": [equal("qem", normalize_pred=number_of, normalize_gold=number_of)],
}


def task(folder: Path) -> LightevalTaskConfig:
    """<items>/<part>/: validation.jsonl, and in the folder's name what scores it: hellaswag.acc_norm"""
    part, score = folder.name.rsplit(".", 1)
    written = score in ("trivia", "gsm8k")
    return LightevalTaskConfig(
        name=f"{part}_aquila",
        prompt_function=answer_to if written else choices_of,
        hf_repo=str(folder.resolve()),
        hf_subset="default",
        hf_avail_splits=["validation"],
        evaluation_splits=["validation"],
        metrics=METRICS[score],
        generation_size={"trivia": 20, "gsm8k": 256}.get(score, -1),
        stop_sequence={"trivia": ["\n", ".", ","], "gsm8k": ["Question:", "Question"]}.get(score, []),
        version=0,
    )


TASKS_TABLE = [task(folder) for folder in sorted(p for p in ITEMS.iterdir() if p.is_dir())]
