"""Everything that only a GPU can show, in four parts of less than ten minutes each: `make gpu`.

    correctness   tests marked gpu, then the kernel table: every operation and provider at the real shape (bench.py)
    logits        the head and its loss on the other kinds of logits, and in fp32, beside torch and Liger
    throughput    the real 193.7M-parameter model: tokens a second and peak memory over micro-batch and attention
    quality       recipe=sft on given conversations: loss and bits per byte before and after

Each part ends in a short table and writes kernels/bench/results/<gpu>_<part>.csv with GPU name, versions and command.
The tables say *not measured* until somebody has run this.

    python kernels/bench/gpu.py [--part correctness logits …] [--ranks qwen.tiktoken --data chat.jsonl …]
"""

import argparse
import csv
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PARTS = ("correctness", "logits", "throughput", "quality")
BESIDE = ("ours", "ours-5GB", "eager", "torch", "torch-large", "liger", "liger-large")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=Path, help="qwen.tiktoken, the published vocabulary (quality)")
    parser.add_argument("--data", nargs="+", default=[], help="conversations (quality)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU here (torch.cuda.is_available() is False); the rows stay *not measured*", file=sys.stderr)
        return 2
    for part in args.part:
        if part == "quality" and not (args.ranks and args.data):
            print("quality: left out, --ranks and --data are not given")
            continue
        rows = {"correctness": correctness, "logits": logits, "throughput": throughput, "quality": quality}[part](args)
        report(part, rows)
    return 0


def correctness(args: argparse.Namespace) -> list[dict]:
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    rows = [{"what": "pytest -m gpu", "result": tests.stdout.strip().split("\n")[-1]}]
    return rows + [kernel_table("kernels", "--shape", "16k", "--dtype", "bfloat16", "--logits", "trained")]


def logits(args: argparse.Namespace) -> list[dict]:
    heads = ["--operations", "linear_cross_entropy", "cross_entropy", "--providers", *BESIDE]
    return [
        kernel_table("logits", "--shape", "16k", "--dtype", "bfloat16", "--logits", "fresh", "peaked", *heads),
        kernel_table("fp32", "--shape", "4096x576x151851", "--dtype", "float32", "--logits", "fresh", *heads),
    ]


def kernel_table(name: str, *words: str) -> dict:
    """Run bench.py, which prints its table here; a row that says how it ended."""
    name = f"{torch.cuda.get_device_name().lower().replace(' ', '_')}_{name}"
    command = [sys.executable, str(Path(__file__).parent / "bench.py"), "--device", "cuda", "--name", name, *words]
    status = subprocess.run(command).returncode
    ended = {0: "done", 1: "done, with failed rows"}.get(status, f"ended with status {status}")
    return {"what": f"results/{name}.csv", "result": ended}


def throughput(args: argparse.Namespace) -> list[dict]:
    """Forward, backward and AdamW of the real model, bf16 autocast, packed rows of 2,048 tokens; median of 10 steps."""
    from transformers import MistralConfig, MistralForCausalLM

    from aquila_sft import settle, swap
    from aquila_sft.errors import UserError

    length, rows = 2048, []
    for attention in ("sdpa", "flex_attention", "flash_attention_2"):
        for micro_rows in (4, 8, 16, 32):
            told = {"attention": attention, "micro_batch_rows": micro_rows}
            try:
                torch.manual_seed(0)
                model = MistralForCausalLM(
                    MistralConfig(
                        vocab_size=151851,
                        hidden_size=576,
                        intermediate_size=1536,
                        num_hidden_layers=30,
                        num_attention_heads=9,
                        num_key_value_heads=3,
                        head_dim=64,
                        tie_word_embeddings=True,
                        max_position_embeddings=2048,
                        attn_implementation=attention,
                    )
                ).cuda()
                swap.install(model, swap.choose_kernel("auto", "cuda")[0])
                settle.check_isolation(model, "cuda", torch.autocast("cuda", torch.bfloat16))
            except (UserError, ImportError, RuntimeError, ValueError) as error:
                rows.append(told | {"tokens_per_s": f"not possible: {str(error).splitlines()[0][:80]}"})
                break
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            ids = torch.randint(0, 151851, (micro_rows, length), device="cuda")
            positions = torch.arange(length // 4, device="cuda").repeat(4).expand(micro_rows, -1)
            torch.cuda.reset_peak_memory_stats()
            seconds = []
            try:
                for _ in range(13):
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    with torch.autocast("cuda", torch.bfloat16):
                        loss = model(input_ids=ids, position_ids=positions, targets=swap.targets_of(ids)).loss
                    (loss / ids.numel()).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - began)
            except torch.OutOfMemoryError:
                rows.append(told | {"tokens_per_s": "out of memory"})
                break
            steady = sorted(seconds[3:])
            rows.append(
                told
                | {
                    "tokens_per_s": round(ids.numel() / steady[5]),
                    "spread": f"{steady[0]:.3f}-{steady[-1]:.3f} s",
                    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
                }
            )
            del model, optimizer
    return rows


def quality(args: argparse.Namespace) -> list[dict]:
    """recipe=sft from fresh weights for 300 steps: does the real path learn on a GPU as it does on a CPU."""
    folder = Path(tempfile.mkdtemp()) / "run"
    command = [
        sys.executable,
        "train.py",
        "recipe=sft",
        "scale=135m",
        "model.path=random",
        "tokenizer=aquila",
        f"tokenizer.ranks={args.ranks}",
        f"data.files=[{','.join(args.data)}]",
        f"output_dir={folder}",
        "train.max_length=1024",
        "train.tokens_per_step=65536",
        "train.max_steps=300",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    told = json.loads((folder / "summary.json").read_text())
    return [
        {"what": k, "result": json.dumps(told[k])}
        for k in (
            "tokens",
            "seconds",
            "tokens_per_s",
            "peak_memory_bytes",
            "first_loss",
            "loss",
            "before",
            "bits_per_byte",
        )
    ]


def report(part: str, rows: list[dict]) -> None:
    """A markdown table on stdout and the same as CSV."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{part} on {torch.cuda.get_device_name()}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(row.get(c, '')) for c in columns)} |")
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(sys.argv),
    }
    name = torch.cuda.get_device_name().lower().replace(" ", "_")
    with open(RESULTS / f"{name}_{part}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)


if __name__ == "__main__":
    sys.exit(main())
