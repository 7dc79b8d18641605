"""One process of an evaluation, for test_eval_model.py: scores own items, and may be killed on the way.

argv: model folder, output folder, answers after which the process ends at once (0: never)
"""

import json
import os
import sys
import time
from pathlib import Path

from test_eval_rules import own_parts

from aquila_sft import model as models
from aquila_sft import runtime, swap
from aquila_sft.evaluation import engine
from aquila_sft.evaluation.journal import Journal
from aquila_sft.evaluation.scorer import Scorer, Settings, autocast_of
from aquila_sft.stages.eval import join_processes, of_all_processes
from aquila_sft.tokenizer import load_tokenizer

folder, out, kill_after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
join_processes()
model = models.load(folder).eval()
swap.install(model, "torch")
time.sleep(runtime.rank() * float(os.environ.get("LATE_S", "0")))  # when the first one would have answers already
journal = Journal(out / "journal", "0" * 64)
known = len(journal.answers)
add = journal.add


def add_and_die(answers: dict) -> None:
    add(answers)
    if kill_after and len(journal.answers) >= kill_after:
        with open(journal.file, "a") as file:
            file.write('["half a line')
        os._exit(9)


journal.add = add_and_die
scorer = Scorer(model, load_tokenizer(folder), journal, Settings(256, True, autocast_of("cpu", "fp32")))
tasks = []
for name in ("hellaswag", "arc", "triviaqa", "cmmlu"):
    benchmark, items = own_parts(name)
    for part in benchmark.parts:
        tasks.append(engine.task(benchmark, part, [item for item in items if item.part == part]))
found = {
    name: [[outcome.scores, outcome.log_probs, outcome.written] for outcome in listed]
    for name, listed in engine.run(scorer, tasks).items()
}
told = {"known": known, "tokens": scorer.tokens, "of_all": of_all_processes(scorer.tokens), "outcomes": found}
(out / f"told-{runtime.rank()}.json").write_text(json.dumps(told))
