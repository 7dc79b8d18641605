"""recipe=sft beside TRL's own command on a CPU: the same weights, conversations, supervised tokens and settings.

    prepare    our recipe reads, cleans and packs the data; the conversations of the rows that a run of `steps` steps
               trains on are written out as messages, the base with our tokenizer and template beside them
    trial      TRL's packings, a few steps each; the fastest one that keeps conversations whole and apart goes on
    runs       ours, TRL's, ours, TRL's, …, each command in a process of its own
    evaluate   both finished models on the same held-back answers, by our evaluation

    python recipes/study/beside_trl.py model.path=<base> data.files=[a.jsonl,b.jsonl] train.max_length=512 \
        train.tokens_per_step=2048 train.max_steps=200 [--also words] [--out folder] [--repeats 3]

The words with a = are recipe=sft's own (scale=135m); model.path=random builds the weights once, for both. --also adds
another of ours to each round, with these words besides. Written to the folder: steps.csv (every step of every run),
runs.csv, table.md.

TRL tokenizes the messages itself, with the saved template and assistant_only_loss; that ids and labels are ours is
checked for every conversation before anything is timed. Its weights and moments are fp32, its products ours' (bf16
where the CPU has it), attention sdpa, activation checkpointing, evaluation, checkpoints and trackers off; optimizer,
rate, warm-up steps, seed, rows a step are those of recipe=sft. Where equality cannot be had:
- TRL packs the same conversations into other rows in another order (a few more or fewer rows, so at a fixed number of
  steps a few conversations are left out or come twice), and training losses of single steps do not compare.
- transformers' warm-up begins at a rate of 0 and its decay ends a step before 0; ours moves from the first step on.
- Its only loss of this kind is nll (chunked_nll is the same one, dft another objective, Liger's kernels need a GPU). It
  divides by the supervised tokens of all micro-batches, as ours does: no mean of means.
- Ours evaluates before the first step and after the last, proves its model, and writes a checkpoint: outside the timed
  steps, inside its peak memory. TRL's process tokenizes and packs, which ours did before.
Seconds of a step: ours from metrics.jsonl, TRL's from when its log lines arrive; the first step warms up and is left
out. Supervised tokens a second: tokens a second x the share of supervised tokens, which is one number, since the
conversations are the same. Peak memory: ru_maxrss of the process that trains.
"""

import argparse
import ast
import csv
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from aquila_sft.errors import UserError  # noqa: E402

TRIAL_STEPS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="settings of recipe=sft: model.path= data.files= train.…=")
    parser.add_argument("--out", type=Path, default=Path("outputs/beside_trl"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--also", action="append", default=[], help="such as train.activation_checkpointing=true")
    parser.add_argument("--packing", nargs="+", help="of TRL's, as a trial names them; a single one needs no trial")
    args = parser.parse_intermixed_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    about = apart(prepare, args.words, out)
    print(f"{about['conversations']:,} conversations in {about['rows']:,} rows, {about['supervised']:.1%} supervised")

    ways, tried = packings(about), {}
    if unknown := set(args.packing or ()) - set(ways):
        raise SystemExit(f"error: --packing {sorted(unknown)}: use some of {list(ways)}")
    names = args.packing or list(ways)
    for name in names if len(names) > 1 else ():
        tried[name] = run = run_trl(about, out / "trial", ways[name], TRIAL_STEPS)
        print(f"  TRL, {name}: {tokens_per_s(run):,.0f} tokens/s, {run['peak_bytes'] / 1e9:.2f} GB", flush=True)
    keeping = [name for name in tried if not name.startswith("wrapped")]
    best = max(keeping, key=lambda name: tokens_per_s(tried[name])) if tried else names[0]

    sides = {"ours": ""} | {f"ours, {words}": words for words in args.also} | {"TRL": None}
    runs = []
    for repeat in range(args.repeats):
        for number, (side, words) in enumerate(sides.items()):
            folder = out / f"run-{repeat}-{number}"
            shutil.rmtree(folder, ignore_errors=True)  # a finished run would be reused
            run = run_trl(about, folder, ways[best]) if words is None else run_ours(about, folder, words.split())
            run |= {"side": side, "repeat": repeat} | apart(evaluate, about, run.pop("final"))
            runs.append(run)
            print(f"  {side} {repeat}: {tokens_per_s(run):,.0f} tokens/s, {run['peak_bytes'] / 1e9:.2f} GB", flush=True)
    write(out, about, best, tried, runs)
    return 0


def apart(function, *given):
    """In a process of its own: this one stays small, because a child's ru_maxrss begins with its parent's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def prepare(words: list[str], out: Path) -> dict:
    """base/ and conversations/ for both sides, and what they have in common."""
    import contextlib

    import torch

    from aquila_sft import device, inputs, run_dir, runtime
    from aquila_sft import model as models
    from aquila_sft.data.rows import PackedRows, RowOrder
    from aquila_sft.plan import Plan
    from aquila_sft.schedule import warmup_steps
    from aquila_sft.stages import sft
    from train import compose_run

    runtime.settle(offline=True)
    words = ["recipe=sft", "scale=135m", "train.num_epochs=null", "train.logging_steps=1", *words]
    cfg = compose_run([*words, f"output_dir={out / 'prepare'}", f"data.cache={out / 'cache'}"])
    if cfg.schedule.kind.value not in ("cosine", "linear") or cfg.schedule.min_lr_ratio or not cfg.train.max_steps:
        raise SystemExit("error: compared with a cosine or a line to zero over train.max_steps= steps alone")
    found = inputs.find_inputs(cfg)
    folder = run_dir.RunDir(out / "prepare")
    folder.path.mkdir(exist_ok=True)
    tokenizer = inputs.load_tokenizer(cfg, found, folder)
    choices = device.choose(cfg.train, cfg.kernel)
    net, parameters, _ = sft.make_model(cfg, found, choices, tokenizer)
    models.save(net, tokenizer, out / "base")
    with contextlib.ExitStack() as stack:
        ledger = sft.prepare_rows(cfg, found, folder, tokenizer, found.contents()["data"], stack)
        rows = PackedRows(Path(ledger["prepared"]) / "train")
        plan = Plan(cfg.train, len(rows), "cpu", is_smoke=False)
        order = RowOrder(len(rows), cfg.seed, plan.end)
        items = [item for place in range(plan.places) for item in rows.items(order(place))]
        supervised = write_messages(tokenizer, rows, items, out / "conversations" / "train.jsonl")
    base = [f"model.path={out / 'base'}", f"data.cache={out / 'cache'}"]
    kept = [word for word in words if not word.startswith(("model.", "tokenizer", "data.cache="))]
    optim = cfg.optim
    return {
        "words": [*kept, *base],
        "out": str(out),
        "prepared": ledger["prepared"],
        "rows": plan.places,
        "conversations": len(items),
        "supervised": supervised,
        "parameters": parameters,
        "length": cfg.train.max_length,
        "rows_per_step": plan.rows_per_step,
        "steps": plan.steps,
        "threads": torch.get_num_threads(),
        "precision": choices.precision.value,
        "settings": {
            "learning_rate": optim.lr,
            "lr_scheduler_type": cfg.schedule.kind.value,
            "warmup_steps": warmup_steps(cfg.schedule, plan.steps),
            "optim": "adamw_torch_fused",
            "adam_beta1": optim.betas[0],
            "adam_beta2": optim.betas[1],
            "adam_epsilon": optim.eps,
            "weight_decay": optim.weight_decay,
            "max_grad_norm": optim.max_grad_norm,
            "seed": cfg.seed,
        },
    }


def write_messages(tokenizer, rows, items: list[int], path: Path) -> float:
    """Conversations of packed rows as TRL reads them, decoded turn by turn; the share of supervised tokens.

    Raises SystemExit where TRL's way from these messages to ids and labels would not lead back to ours.
    """
    from aquila_sft.chat_template import turn_end_id

    end, lines, tokens, supervised = turn_end_id(tokenizer), [], 0, 0
    for item in items:
        span = slice(int(rows.offsets[item]), int(rows.offsets[item + 1]))
        ids, targets = rows.tokens[span].tolist(), rows.targets[span].tolist()
        messages, begin = [], 0
        for at in (i for i, token in enumerate(ids) if token == end):
            text = tokenizer.decode(ids[begin:at], clean_up_tokenization_spaces=False)
            role, content = re.fullmatch(r"\n?<\|im_start\|>(\w+)\n(.*)", text, re.DOTALL).groups()
            messages.append({"role": role, "content": content})
            begin = at + 1
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if theirs["input_ids"] != ids or list(map(bool, theirs["assistant_masks"])) != targets:
            raise SystemExit(f"error: TRL would train on other tokens of this conversation: {messages}")
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        tokens, supervised = tokens + len(ids), supervised + sum(targets)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return supervised / tokens


def packings(about: dict) -> dict[str, dict]:
    """TRL's ways of filling a step with these rows. `wrapped` cuts conversations and lets them see each other."""
    rows, found = about["rows_per_step"], {}
    for micro in (n for n in (1, 2, 4) if rows % n == 0):
        portion = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
        for strategy in ("bfd", "bfd_split", "wrapped"):
            if strategy != "bfd_split" or micro == 1:  # nothing is longer than a row: bfd_split makes bfd's rows
                found[f"{strategy}, {rows // micro} x {micro} rows"] = portion | {"packing_strategy": strategy}
    return found


def trl_flags(about: dict, flags: dict, out: Path, steps: int) -> list[str]:
    given = {
        "model_name_or_path": f"{about['out']}/base",
        "dataset_name": f"{about['out']}/conversations",
        "output_dir": out,
        "max_steps": steps,
        "max_length": about["length"],
        "packing": True,
        "assistant_only_loss": True,
        "dtype": "float32",
        "bf16": about["precision"] == "bf16",
        "use_cpu": True,
        "attn_implementation": "sdpa",
        "activation_checkpointing": False,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [word for key, value in (given | about["settings"] | flags).items() for word in (f"--{key}", str(value))]


def run_trl(about: dict, out: Path, flags: dict, steps: int | None = None) -> dict:
    command = [str(Path(sys.executable).with_name("trl")), "sft"]
    command += trl_flags(about, flags, out, steps or about["steps"])
    lines, peak_bytes = watch(command, about, out)
    logged = [(at, ast.literal_eval(line)) for at, line in lines if line.startswith("{'loss'")]
    steps = [{"step": 1, "loss": float(logged[0][1]["loss"])}]
    for number, ((before, was), (at, log)) in enumerate(zip(logged, logged[1:], strict=False), 2):
        tokens = float(log["num_tokens"]) - float(was["num_tokens"])
        steps.append({"step": number, "loss": float(log["loss"]), "tokens": tokens, "seconds": at - before})
    return {"steps": steps, "peak_bytes": peak_bytes, "command": shlex.join(command), "final": str(out)}


def run_ours(about: dict, out: Path, also: list[str]) -> dict:
    command = [sys.executable, str(ROOT / "train.py"), *about["words"], *also, f"output_dir={out}"]
    _, peak_bytes = watch(command, about, out)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    logged = [line for line in logged if "loss" in line]
    steps = [{"step": 1, "loss": logged[0]["loss"]}]
    for was, log in zip(logged, logged[1:], strict=False):
        tokens = log["tokens"] - was["tokens"]
        steps.append({"step": log["step"], "loss": log["loss"], "tokens": tokens})
        steps[-1]["seconds"] = tokens / log["tokens_per_s"]
    return {"steps": steps, "peak_bytes": peak_bytes, "command": shlex.join(command), "final": str(out / "final")}


def watch(command: list[str], about: dict, out: Path) -> tuple[list[tuple[float, str]], int]:
    """(when, what) of every line that a command prints, and the most memory that it or a child of it had resident."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(about["threads"]), "HF_HUB_OFFLINE": "1"}
    env |= {"HF_DATASETS_CACHE": f"{about['out']}/datasets", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        lines = [(time.monotonic(), line.rstrip("\n")) for line in process.stdout]
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)  # trl's launcher would leave its worker behind
        raise
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("\n".join([*(line for _, line in lines[-30:]), f"error: failed: {shlex.join(command)}"]))
    return lines, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def evaluate(about: dict, folder: str) -> dict:
    """Loss and bits per byte of the held-back answers, by language."""
    import torch

    from aquila_sft import chat_template, swap
    from aquila_sft import evaluate as evaluation
    from aquila_sft import model as models
    from aquila_sft.data.rows import PackedRows
    from aquila_sft.tokenizer import load_tokenizer

    torch.set_num_threads(about["threads"])
    net, tokenizer = models.load(Path(folder)), load_tokenizer(Path(about["out"]) / "base")
    swap.install(net, "torch")
    figures = evaluation.answers(
        net,
        {part.name: PackedRows(part) for part in sorted((Path(about["prepared"]) / "held-back").glob("*"))},
        length=about["length"],
        rows_at_once=1,
        pad_id=tokenizer.pad_token_id,
        turn_end_id=chat_template.turn_end_id(tokenizer),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=about["precision"] == "bf16"),
    )
    return {f"{name} {language}": of[name] for language, of in figures.items() for name in ("loss", "bits_per_byte")}


def tokens_per_s(run: dict) -> float:
    return statistics.median(rates(run))


def rates(run: dict) -> list[float]:
    return [step["tokens"] / step["seconds"] for step in run["steps"][1:]]


def write(out: Path, about: dict, best: str, tried: dict[str, dict], runs: list[dict]) -> None:
    """steps.csv, runs.csv and table.md, which is printed as well."""
    with open(out / "steps.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["side", "repeat", "step", "loss", "tokens", "seconds"])
        writer.writeheader()
        writer.writerows({"side": r["side"], "repeat": r["repeat"]} | step for r in runs for step in r["steps"])
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "unknown CPU")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl"))
    machine = {"cpu": cpu, "threads": about["threads"], "versions": versions}
    machine["date"] = datetime.date.today().isoformat()

    def row(run: dict) -> dict:
        speeds, losses = sorted(rates(run)), [step["loss"] for step in run["steps"]]
        return {
            "supervised tokens/s": tokens_per_s(run) * about["supervised"],
            "tokens/s": tokens_per_s(run),
            "slowest step": speeds[0],
            "fastest step": speeds[-1],
            "peak GB": run["peak_bytes"] / 1e9,
            "training loss, first": losses[0],
            "training loss, mean of the last tenth": statistics.mean(losses[-max(1, len(losses) // 10) :]),
            **{f"held-back {k}": v for k, v in run.items() if k.startswith(("loss", "bits"))},
        }

    table = [{"side": run["side"], "repeat": run["repeat"]} | row(run) for run in runs]
    with open(out / "runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*table[0], *machine, "command"])
        writer.writeheader()
        writer.writerows(t | machine | {"command": run["command"]} for t, run in zip(table, runs, strict=True))
    sides: dict[str, list[dict]] = {}
    for line in table:
        sides.setdefault(line["side"], []).append(line)
    ours = [side for side in sides if side != "TRL"]
    text = [
        f"{about['parameters']:,} parameters, {about['steps']} steps of {about['rows_per_step']} rows x "
        f"{about['length']} tokens, {about['supervised']:.1%} of them supervised, {about['conversations']:,} "
        f"conversations, {about['precision']} products; {cpu}, {about['threads']} threads; {versions}; "
        f"{machine['date']}. TRL: {best}.\n",
        f"    python recipes/study/beside_trl.py {shlex.join(sys.argv[1:])}\n",
        f"| median of {len(sides['TRL'])} runs (lowest to highest) | "
        + " | ".join([*sides, *(f"{side}: / TRL" for side in ours)])
        + " |\n|---"
        + "|---" * (len(sides) + len(ours))
        + "|",
    ]
    for name in list(table[0])[2:]:
        of_side = {side: [line[name] for line in lines] for side, lines in sides.items()}
        ratios = [[a / b for a, b in zip(of_side[side], of_side["TRL"], strict=True)] for side in ours]
        text.append(" | ".join([f"| {name}", *map(spread, [*of_side.values(), *ratios])]) + " |")
    if tried:
        text.append("\n| TRL's packing, one trial | tokens/s | peak GB |\n|---|---|---|")
    text += [f"| {name} | {tokens_per_s(r):,.0f} | {r['peak_bytes'] / 1e9:.2f} |" for name, r in tried.items()]
    (out / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def spread(values: list[float]) -> str:
    """Median (lowest to highest), to four figures."""
    shown = [
        f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}" for v in (statistics.median(values), min(values), max(values))
    ]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
