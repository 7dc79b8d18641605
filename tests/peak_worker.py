"""What runs take, measured beside what recipe=check says they take: a line of JSON for each run on stdin.

    {"before": words, "runs": [words, …]} -> {"measured", "estimated", "program", "parameters"} of each run, in bytes

A forked process each for the check and for the run, after the libraries were imported once: that is most of the time.
Both begin with what a fork inherits, so the program's own share is smaller than in a process of its own, in both alike.
"""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from aquila_sft import evaluate, lora, pretrain, trainer  # noqa: E402, F401


def forked(words: list[str]) -> str:
    """What `python train.py <words>` prints, from a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = train.main(words)
        with os.fdopen(write, "w") as out:
            out.write(printed.getvalue())
        os._exit(status)
    os.close(write)
    with os.fdopen(read) as out:
        printed = out.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, printed
    return printed


given = json.load(sys.stdin)
forked(given["before"])
for words in given["runs"]:
    recipe = words[0].removeprefix("recipe=")
    checked = forked(["recipe=check", f"of={recipe}", *words[1:]])
    forked(words)
    folder = next(word.removeprefix("output_dir=") for word in words if word.startswith("output_dir="))
    summary = json.loads(Path(folder, "summary.json").read_text("utf-8"))
    print(
        json.dumps(
            {
                "measured": summary["peak_memory_bytes"],
                "estimated": float(re.search(r"memory +peak ([\d.]+)", checked)[1]) * 1e9,
                "program": float(re.search(r"program ([\d.]+)", checked)[1]) * 1e9,
                "parameters": summary["parameters"],
            }
        ),
        flush=True,
    )
