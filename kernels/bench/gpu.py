"""Everything that only a GPU can show, in parts of less than ten minutes each: `make gpu`.

    correctness   tests marked gpu, then the kernel table: every operation and provider at the real shape (bench.py)
    logits        the head and its loss on the other kinds of logits, and in fp32, beside torch and Liger
    throughput    a tuning step of the real 193.7M-parameter model over micro-batch and attention      (beside.py)
    sft           a tuning step beside TRL's, best configured: tokens a second, MFU, peak memory       (beside.py)
    pretrain      a pretraining step beside transformers' model, torch.compile and fused AdamW         (beside.py)
    rates         recipe=sft at two learning rates: loss and bits a byte before and after              (rates.py)

Each part ends in a short table and writes kernels/bench/results/<gpu>_<part>.csv with GPU name, versions and command.
The tables say *not measured* until somebody has run this. With a quarter of an hour: --part sft pretrain --minutes 4.5,
then --part rates --minutes 4.

    python kernels/bench/gpu.py [--part correctness logits …] [--minutes 9.5] [--rates 1e-3 3e-4]
                                [--data chat.jsonl …] [--ranks qwen.tiktoken] [--base <folder>]
"""

import argparse
import csv
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import beside
import rates
import report
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
RESULTS = Path(__file__).parent / "results"
PARTS = ("correctness", "logits", "throughput", "sft", "pretrain", "rates")
BESIDE = ("ours", "ours-5GB", "eager", "torch", "torch-large", "liger", "liger-large")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.5, help="of throughput, sft, pretrain and rates, each")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[], help="default: recipe=sft's own and a third of it"
    )
    parser.add_argument("--data", nargs="+", default=[], help="conversations (rates)")
    parser.add_argument("--ranks", type=Path, help="qwen.tiktoken, the published vocabulary (rates)")
    parser.add_argument("--base", help="a model to tune (rates); default: fresh weights")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU here (torch.cuda.is_available() is False); the rows stay *not measured*", file=sys.stderr)
        return 2
    name, seconds = torch.cuda.get_device_name(), 60 * args.minutes
    for part in args.part:
        match part:
            case "correctness":
                rows = correctness(args.out)
            case "logits":
                rows = logits(args.out)
            case "rates":
                with tempfile.TemporaryDirectory() as work:
                    told = {"rates": args.rates, "data": args.data, "ranks": args.ranks, "base": args.base}
                    rows = rates.rows(Path(work), **told, limit_s=seconds)
            case _:
                rows = getattr(beside.Bench(name, seconds), part)()
        show(part, rows, report.about("cuda") | {"command": shlex.join(["python", *sys.argv])}, args.out)
    return 0


def correctness(out: Path) -> list[dict]:
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    rows = [{"what": "pytest -m gpu", "result": tests.stdout.strip().split("\n")[-1]}]
    return rows + [kernel_table(out, "kernels", "--shape", "16k", "--dtype", "bfloat16", "--logits", "trained")]


def logits(out: Path) -> list[dict]:
    heads = ["--operations", "linear_cross_entropy", "cross_entropy", "--providers", *BESIDE]
    return [
        kernel_table(out, "logits", "--shape", "16k", "--dtype", "bfloat16", "--logits", "fresh", "peaked", *heads),
        kernel_table(out, "fp32", "--shape", "4096x576x151851", "--dtype", "float32", "--logits", "fresh", *heads),
    ]


def kernel_table(out: Path, name: str, *words: str) -> dict:
    """Run bench.py, which prints its table here; a row that says how it ended."""
    name = f"{in_a_file_name(torch.cuda.get_device_name())}_{name}"
    command = [sys.executable, str(Path(__file__).parent / "bench.py"), "--device", "cuda", *words]
    command += ["--name", name, "--out", str(out)]
    status = subprocess.run(command).returncode
    ended = {0: "done", 1: "done, with failed rows"}.get(status, f"ended with status {status}")
    return {"what": f"{name}.csv", "result": ended}


def in_a_file_name(device: str) -> str:
    return device.lower().replace(" ", "_")


def show(part: str, rows: list[dict], about: dict, folder: Path) -> None:
    """A markdown table on stdout and the same as CSV, each row with what `about` says of machine and program."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    told = f"{about['device']}, driver {about['driver'] or 'none'}, torch {about['torch']}, commit {about['commit']}"
    print(f"\n{part}: {told}, {about['date']}\n    {about['command']}\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(row.get(c, '')) for c in columns)} |")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{in_a_file_name(about['device'])}_{part}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)


if __name__ == "__main__":
    sys.exit(main())
