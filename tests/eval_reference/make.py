"""What the reference harness answers, item by item: the numbers that test_eval_reference.py compares with.

lighteval at v0.3.0 (e6fdcc76) with OpenSeek's task file, in an environment of its own: it needs transformers < 5, and
its successors replace Hydra's parser. Data sets come from a folder instead of the Hub, in the Hub's columns.

    git clone https://github.com/huggingface/lighteval && git -C lighteval checkout e6fdcc76
    pip install "transformers<5" accelerate datasets nltk rouge-score sacrebleu scikit-learn scipy aenum pytablewriter …
    python make.py lighteval/src OpenSeek/evaluation/lighteval/lighteval_tasks_v3.py <items> <model> <out.json> [number]

`number`: so many items a task, as the harness takes them. Nothing here is imported by the tests.
"""

import csv
import hashlib
import json
import os
import sys
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
source, task_file, items, model_folder, out = sys.argv[1:6]
number = int(sys.argv[6]) if len(sys.argv) > 6 else None
sys.path[:0] = [source, str(Path(task_file).parent)]
# Metrics that no task here has load models and packages when they are imported.
for name, attribute in (
    ("data_stats_metric", "DataStatsMetric"),
    ("bert_scorer", "BERTScorer"),
    ("summac", "SummaCZS"),
):
    stub = types.ModuleType(f"lighteval.metrics.imports.{name}")
    setattr(stub, attribute, type(attribute, (), {"__init__": lambda self, *_, **__: None, "compute": None}))
    sys.modules[stub.__name__] = stub

import torch.utils.data.distributed as distributed  # noqa: E402

distributed.T_co = distributed._T_co if hasattr(distributed, "_T_co") else object  # has another name in newer torch

import importlib  # noqa: E402

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from lighteval.models.base_model import BaseModel  # noqa: E402
from lighteval.models.model_config import BaseModelConfig, EnvConfig  # noqa: E402
from lighteval.tasks import lighteval_task  # noqa: E402

accelerator = Accelerator(cpu=True)
module = importlib.import_module(Path(task_file).stem)


def folder_of(name: str) -> Path:
    return next(p for p in (Path(items) / name, Path(items) / f"eval_{name}") if p.is_dir())


def lines(name: str, *patterns: str) -> list[dict]:
    file = next(f for p in patterns for f in sorted(folder_of(name).glob(p)))
    return [json.loads(line) for line in file.read_bytes().split(b"\n") if line.strip()]


def nested(rows: list[dict], stem: str = "question") -> list[dict]:
    return [
        {
            stem: row["question"]["stem"],
            "choices": {key: [c[key] for c in row["question"]["choices"]] for key in ("text", "label")},
            "answerKey": row["answerKey"],
        }
        for row in rows
    ]


def exam(name: str, pattern: str, subject: str, header: bool) -> list[dict]:
    with open(folder_of(name) / pattern.format(subject), encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    first = rows.pop(0) if header else ["question", *"ABCD", "answer"]
    at = {(c.lower() if len(c) > 1 else c): i for i, c in enumerate(first)}
    return [
        {
            "question": row[at["question"]],
            "subject": subject,
            "choices": [row[at[c]] for c in "ABCD"],
            "answer": "ABCD".index(row[at["answer"]]),
        }
        for row in rows
    ]


def piqa() -> list[dict]:
    golds = (folder_of("piqa") / "valid-labels.lst").read_text().split()
    return [row | {"label": int(gold)} for row, gold in zip(lines("piqa", "valid.jsonl"), golds, strict=True)]


def hellaswag() -> list[dict]:  # a copy that lost ctx_a and ctx_b has its context as a whole, and is not capitalized
    class Kept(str):
        def capitalize(self):
            return self

    return [
        row if "ctx_a" in row else row | {"ctx_a": row["ctx"], "ctx_b": Kept("")}
        for row in lines("hellaswag", "hellaswag_val.jsonl")
    ]


def trivia() -> list[dict]:
    return [
        {"question": row["Question"], "answer": {"aliases": list(row["Answer"]["Aliases"])}}
        for row in lines("triviaqa", "triviaqa*.jsonl", "*.json")
    ]


def data_set(repo: str, subset: str) -> dict[str, list[dict]]:
    if repo.endswith("gsm8k"):
        return {"train": lines("gsm8k", "train.jsonl", "train*.jsonl"), "test": lines("gsm8k", "test.jsonl")}
    found = {
        "hellaswag": hellaswag,
        "winogrande": lambda: lines("winogrande", "dev.jsonl"),
        "piqa": piqa,
        "lighteval/siqa": lambda: lines("siqa", "dev.jsonl"),
        "openbookqa": lambda: nested(lines("openbookqa", "dev.jsonl"), "question_stem"),
        "ai2_arc": lambda: nested(lines(subset.lower().replace("-", "_"), "test.jsonl")),
        "commonsense_qa": lambda: nested(lines("commonsenseqa", "dev_rand_split.jsonl")),
        "mandarjoshi/trivia_qa": trivia,
        "lighteval/mmlu": lambda: exam("mmlu", "test/{}_test.csv", subset, False),
        "ldwang/lighteval-cmmlu": lambda: exam("cmmlu", "test/{}.csv", subset, True),
        "ldwang/lighteval-ceval-exam": lambda: exam("ceval", "val/{}_val.csv", subset, True),
    }[repo]()
    return dict.fromkeys(("train", "dev", "validation", "val", "test"), found)


class Silent:
    def __getattr__(self, name):
        return Silent()

    def __call__(self, *_, **__):
        return None


lighteval_task.download_dataset_worker = lambda args: data_set(args[0], args[1])
chosen = {
    config["name"]: (config, 5 if config["name"] == "gsm8k" else 0)
    for config in module.TASKS_TABLE
    if config["name"].split(":")[0]
    in "hellaswag winogrande piqa siqa openbookqa arc commonsense_qa trivia_qa gsm8k mmlu_cloze cmmlu ceval".split()
}


def present(config: dict) -> bool:
    try:
        return bool(data_set(config["hf_repo"], config["hf_subset"]))
    except (StopIteration, FileNotFoundError):
        return False


chosen = {name: pair for name, pair in chosen.items() if present(pair[0])}
tasks = {
    f"custom|{name}": lighteval_task.LightevalTask(
        name, lighteval_task.LightevalTaskConfig(**config), custom_tasks_module=[module]
    )
    for name, (config, _) in chosen.items()
}
config = BaseModelConfig(pretrained=model_folder, accelerator=accelerator, dtype="float32", batch_size=1)
config.get_model_sha = lambda: "none"
model = BaseModel(config, EnvConfig())
few = {f"custom|{name}": [(shots, False)] for name, (_, shots) in chosen.items()}
requests, docs = lighteval_task.create_requests_from_tasks(
    tasks, few, 1, model, number, Silent(), use_chat_template=False, system_prompt=None
)
answers: dict[tuple[str, str], list] = {}
for kind, listed in requests.items():
    asked = sorted(listed, key=lambda r: (r.task_name, r.example_index, r.request_index))
    given = model.loglikelihood(asked, override_bs=1) if kind.name == "LOGLIKELIHOOD" else []
    given = model.greedy_until(asked, override_bs=1) if kind.name == "GREEDY_UNTIL" else given
    for request, answer in zip(asked, given, strict=True):
        answers.setdefault((request.task_name, request.example_index), []).append(answer)
found = []
for (task_name, place), listed in sorted(answers.items(), key=lambda x: (x[0][0], int(x[0][1].split("_")[0]))):
    doc = next(d for key, d in docs.items() if key == (task_name, place))
    values = [r.result for r in listed]
    scores = tasks[task_name.rsplit("|", 1)[0]].process_results(doc, list(listed))
    written = isinstance(values[0], str)
    found.append(
        {
            "task": task_name.split("|")[1],
            "prompt": hashlib.sha256(doc.ctx.encode()).hexdigest()[:16],
            "scores": {key: int(value) for key, value in scores.items()},
            **({"written": values[0]} if written else {"log_probs": [round(v[0], 6) for v in values]}),
        }
    )
Path(out).write_text(
    json.dumps({"torch": torch.__version__, "items": found}, ensure_ascii=False, indent=None).replace(
        '{"task"', '\n{"task"'
    )
    + "\n",
    "utf-8",
)
print(len(found), "items")
