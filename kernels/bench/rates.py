"""recipe=sft at two learning rates in ten minutes, the real model's shape, as a table: the part `rates` of gpu.py.

    conversations, a vocabulary -> train.py recipe=sft scale=135m, once for each rate -> metrics.jsonl -> rows

Conversations: --data, else those of $AQUILA_REAL_DATA (instruct_*/train.jsonl), else the bundled world's. Vocabulary:
the published one with --ranks, else the bundled world's small one, in a model that has all 151,851 entries; with --base
that base's own. Without --base the weights are fresh, so the figures say that and how fast the real path learns, not
how good a tuned Aquila is. Each run has half of the time; one that needs more is stopped in good order (SIGTERM: it
writes a checkpoint) and its row says so.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from beside import with_one_gpu

ROOT = Path(__file__).parents[2]
SETTINGS = {"train.tokens_per_step": 65536, "train.max_steps": 300, "train.num_epochs": "null"}
VOCABULARY = 151851


def rows(
    work: Path,
    *,
    rates: list[float],
    data: list[str],
    ranks: Path | None,
    base: str | None,
    limit_s: float = 570,
    settings: dict | None = None,
) -> list[dict]:
    """One for each rate; without rates: recipe=sft's own, and a third of it. `settings` are train.py's."""
    ends = time.monotonic() + limit_s
    given = SETTINGS | inputs(work, data, ranks, base) | (settings or {})
    rates = rates or [own_rate(), own_rate() / 3]
    found = []
    for number, rate in enumerate(rates):
        share = (ends - time.monotonic()) / (len(rates) - number)
        out = work / f"rate-{number}"
        words = [f"{name}={value}" for name, value in (given | {"optim.lr": rate, "output_dir": out}).items()]
        ended = run(["recipe=sft", "scale=135m", *words], share)
        found.append({"rate": f"{rate:.3g}", "data": short(given["data.files"])} | figures(out) | {"ended": ended})
    return found


def own_rate() -> float:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from train import compose_run

    return compose_run(["recipe=sft", "scale=135m"]).optim.lr


def inputs(work: Path, data: list[str], ranks: Path | None, base: str | None) -> dict:
    """Settings that name base, vocabulary and conversations; the bundled world's are made here."""
    files = data or real_data()
    if not files:
        from aquila_sft.data import world

        files = [str(world.write(work / "world")["conversations"])]
    told = {"data.files": f"[{','.join(files)}]", "data.cache": work / "cache"}
    if base:
        return told | {"model.path": base}
    told |= {"model.path": "random"}
    if ranks:
        return told | {"tokenizer": "aquila", "tokenizer.ranks": ranks}
    status = run(["recipe=tokenizer", "scale=mini", f"output_dir={work / 'tokenizer'}"], 300)
    if status != "done":
        raise SystemExit(f"error: recipe=tokenizer, for a vocabulary without --ranks: {status}")
    return told | {"tokenizer.path": work / "tokenizer/final", "model.vocab_size": VOCABULARY}


def short(files: str) -> str:
    return " ".join("/".join(Path(file).parts[-2:]) for file in files.strip("[]").split(","))


def real_data() -> list[str]:
    folder = os.environ.get("AQUILA_REAL_DATA")
    return sorted(map(str, Path(folder).glob("instruct_*/train.jsonl"))) if folder else []


def run(words: list[str], limit_s: float) -> str:
    """How train.py ended."""
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, env=with_one_gpu())
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        return f"stopped after {limit_s:.0f} s"
    return "done" if status == 0 else f"status {status}"


def figures(out: Path) -> dict:
    """What metrics.jsonl says; nothing where there is none."""
    file = out / "metrics.jsonl"
    logged = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    trained = [line for line in logged if line.get("loss") is not None]
    if not trained:
        return {}
    last, steady = trained[-1], trained[1:] or trained
    told = {
        "steps": last["step"],
        "seconds": round(last["seconds"]),
        "tokens_per_s": round(sum(line["tokens_per_s"] for line in steady) / len(steady)),
        "peak_gib": round(last["peak_memory_bytes"] / 2**30, 2),
        "loss": f"{trained[0]['loss']:.3f} -> {last['loss']:.3f}",
    }
    evaluated = [line for line in logged if any(key.startswith("eval_bits_per_byte") for key in line)]
    for key in sorted(key for key in (evaluated or [{}])[0] if key.startswith("eval_bits_per_byte")):
        before, after = evaluated[0][key], evaluated[-1][key] if len(evaluated) > 1 else None
        after = "*not measured*" if after is None else f"{after:.3f}"
        told[f"bits a byte, {key.removeprefix('eval_bits_per_byte_')}"] = f"{before:.3f} -> {after}"
    return told
