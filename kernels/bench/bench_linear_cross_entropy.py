"""Time and peak memory of one loss + backward of the language-model head, on CPU.

    python kernels/bench/bench_linear_cross_entropy.py --providers plain ours
    python kernels/bench/bench_linear_cross_entropy.py --providers plain torch --repeats 1 \\
        --supervised-frac 1.0 --append                  # apart, because torch's takes minutes a step on CPU

Providers take turns, each step in a fresh process: peak memory is the process's high-water mark minus what
it was once the inputs existed (so it contains the gradients), and a slow spell of the machine falls on all
alike. Ratios are to the plain step of the same turn; on a shared machine the ratio of CPU seconds, summed
over threads, is the steadier one. Prints a markdown table and writes results/<name>.csv.
"""

import argparse
import csv
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from aquila_kernels.linear_cross_entropy import linear_cross_entropy

IGNORE = -100


def plain(hidden, weight, target):
    return F.cross_entropy((hidden @ weight.T).float(), target, ignore_index=IGNORE)


def torch_chunked(hidden, weight, target):
    # Without options, F.linear_cross_entropy is the plain computation; this is its chunked one, as it comes.
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, ignore_index=IGNORE, options=options)


PROVIDERS = {"plain": plain, "ours": linear_cross_entropy}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13 has it, 2.11 does not
    PROVIDERS["torch"] = torch_chunked


def peak_memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def make_inputs(tokens, hidden, vocab, dtype, supervised_frac):
    """Filled in place: a temporary here would raise the high-water mark that peaks are measured from."""
    rng = torch.Generator().manual_seed(0)
    hidden_NH = torch.empty(tokens, hidden, dtype=dtype).normal_(generator=rng).requires_grad_()
    weight_VH = torch.empty(vocab, hidden, dtype=dtype).normal_(std=0.02, generator=rng).requires_grad_()
    target_N = torch.randint(0, vocab, (tokens,), generator=rng)
    target_N[torch.rand(tokens, generator=rng) >= supervised_frac] = IGNORE
    return hidden_NH, weight_VH, target_N


def run_one_step(provider, tokens, hidden, vocab, dtype, supervised_frac) -> dict:
    loss_fn = PROVIDERS[provider]
    loss_fn(*make_inputs(64, 64, 512, dtype, supervised_frac)).backward()  # threads, code generation
    inputs = make_inputs(tokens, hidden, vocab, dtype, supervised_frac)
    base_mib, start, cpu_start = peak_memory_mib(), time.perf_counter(), time.process_time()
    loss = loss_fn(*inputs)
    loss.backward()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "extra_mib": peak_memory_mib() - base_mib,
        "loss": loss.item(),
    }


def run_in_fresh_process(*step) -> dict:
    command = [sys.executable, __file__, "--one-step", *map(str, step)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def summarize(steps: list[dict], plain_steps: list[dict]) -> dict:
    seconds = [s["seconds"] for s in steps]
    turns = list(zip(steps, plain_steps, strict=True))
    ratios = [s["seconds"] / p["seconds"] for s, p in turns]
    cpu_ratios = [s["cpu_seconds"] / p["cpu_seconds"] for s, p in turns]
    extra_mib = statistics.median(s["extra_mib"] for s in steps)
    return {
        "median_s": round(statistics.median(seconds), 3),
        "min_s": round(min(seconds), 3),
        "max_s": round(max(seconds), 3),
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_min": round(min(ratios), 3),
        "time_ratio_max": round(max(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "cpu_ratio_min": round(min(cpu_ratios), 3),
        "cpu_ratio_max": round(max(cpu_ratios), 3),
        "extra_mib": round(extra_mib),
        "memory_ratio": round(extra_mib / statistics.median(p["extra_mib"] for p in plain_steps), 3),
        "loss": round(steps[0]["loss"], 5),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=151851)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--supervised-frac", nargs="+", type=float, default=[1.0, 0.5], help="rows with a target")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="cpu_linear_cross_entropy", help="of the CSV file in results/")
    parser.add_argument("--append", action="store_true", help="to that CSV file, instead of replacing it")
    args = parser.parse_args()
    if args.providers[0] != "plain":
        parser.error("--providers must begin with plain: the ratios are to it")

    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    for dtype in args.dtype:
        for frac in args.supervised_frac:
            shape = (args.tokens, args.hidden, args.vocab)
            steps = {provider: [] for provider in args.providers}
            for _ in range(args.repeats):
                for provider in args.providers:
                    steps[provider].append(run_in_fresh_process(provider, *shape, dtype, frac))
            case = dict(zip(("tokens", "hidden", "vocab"), shape, strict=True))
            case |= {"dtype": dtype, "supervised_frac": frac, "repeats": args.repeats}
            for provider in args.providers:
                rows.append({**case, "provider": provider, **summarize(steps[provider], steps["plain"])})

    print("{cpu}, {threads} threads, torch {torch}, python {python}".format(**machine))
    print("tokens {}, hidden {}, vocab {}; {} repeats\n".format(*shape, args.repeats))
    print("| dtype | supervised | provider | seconds | time / plain | CPU time / plain | extra MiB | / plain |")
    print("|---|---|---|---|---|---|---|---|")  # times: median (min-max)
    for r in rows:
        print(
            "| {dtype} | {supervised_frac} | {provider} | {median_s:.2f} ({min_s:.2f}-{max_s:.2f}) "
            "| {time_ratio:.2f} ({time_ratio_min:.2f}-{time_ratio_max:.2f}) "
            "| {cpu_ratio:.2f} ({cpu_ratio_min:.2f}-{cpu_ratio_max:.2f}) "
            "| {extra_mib} | {memory_ratio:.2f} |".format(**r)
        )
    path = Path(__file__).parent / "results" / f"{args.name}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("a" if args.append else "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *machine])
        if not args.append:
            writer.writeheader()
        writer.writerows({**r, **machine} for r in rows)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-step"]:
        provider, *shape, dtype, frac = sys.argv[2:]
        print(json.dumps(run_one_step(provider, *map(int, shape), getattr(torch, dtype), float(frac))))
    else:
        main()
