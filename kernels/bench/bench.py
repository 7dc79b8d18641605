"""Operations of aquila_kernels beside other implementations: time, memory, share of what the device can do, error.

    python kernels/bench/bench.py                            # everything that can be run here, at a size for it
    python kernels/bench/bench.py --shape 2k --operations linear_cross_entropy --providers eager ours trl
    python kernels/bench/bench.py --shape 2048x576x32000 --dtype bfloat16 --logits trained --supervised 1 0.5

operation x shape x dtype x logits x provider: a row each in results/<name>.csv, a markdown table, a plot beside the
CSV. What cannot be run is a row with its reason; what fails is one with its message, and then the status is 1.

On a GPU each provider has a process of its own, and repeats a case there with a cold L2. On a CPU each step has one,
since memory is its process's high-water mark; providers take turns, so that a slow spell of the machine falls on all
alike, and ratios are to eager of the same turn. Compare those, not milliseconds, where others use the machine too.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cases
import goals
import plot
import providers
import report
import torch
from cases import Case
from run import CEILINGS, Job, in_processes

RESULTS = Path(__file__).parent / "results"
KNOWN = list(dict.fromkeys(name for operation in cases.OPERATIONS for name in providers.names(operation)))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def main() -> int:
    args = arguments()
    told = report.about(args.device)
    path = args.out / f"{args.name or told['device'].lower().replace(' ', '_')}.csv"
    results = {
        (case, name): [{"status": "not eligible", "reason": why}] if (why := providers.why_not(name, case)) else []
        for case in all_cases(args)
        for name in providers.names(case.operation)
        if name in args.providers
    }
    ceilings, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        all_groups = groups(all_jobs(args, results, folder), args.fresh)
        for number, group in enumerate(all_groups, 1):
            useless = {key for key, turns in results.items() if turns and turns[-1]["status"] != "ok"}
            group = [job for job in group if (Case(**job.case), job.provider) not in useless]
            for job, result in in_processes(group, args.limit_s):
                case = Case(**job.case)
                show(f"{number} of {len(all_groups)}", case, job.provider, result)
                if job.provider == CEILINGS:
                    ceilings[report.ceiling_key(case)] = result
                    continue
                if args.device == "cpu" and args.fresh != "step":
                    for one in result.get("passes", ()):
                        one["extra_bytes"] = None  # the high-water mark is that of an earlier job
                results[case, job.provider].append(result)
            measured = {key: turns for key, turns in results.items() if turns}
            rows = report.rows(measured, ceilings, told)
            report.write_csv(path, rows)  # now: a run that is cut off keeps what it has
    rows = rows or report.rows(results, ceilings, told)
    report.write_csv(path, rows)
    print(report.table(rows))
    print("\n| goal | |\n|---|---|")
    for verdict in goals.judge(rows, args.device):
        print(f"| {verdict.goal} | {verdict.verdict}{f': {verdict.why}' if verdict.why else ''} |")
    print(f"\nwrote {path}")
    no_plot = plot.draw(rows, path.with_suffix(".svg"))
    print(f"no plot: {no_plot}" if no_plot else f"wrote {path.with_suffix('.svg')}")
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        print(f"error: {row['operation']}, {row['provider']}: {row['reason']}", file=sys.stderr)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_of = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--operations", choices=cases.OPERATIONS, default=list(cases.OPERATIONS), **one_of)
    parser.add_argument("--shape", type=shape, nargs="+", metavar="SHAPE", help=f"{', '.join(cases.SHAPES)} or NxHxV")
    parser.add_argument("--dtype", choices=cases.DTYPES, help="default: both on a CPU, bfloat16 on a GPU", **one_of)
    parser.add_argument("--logits", choices=cases.LOGITS, default=list(cases.LOGITS), **one_of)
    parser.add_argument(
        "--supervised", type=fraction, nargs="+", default=[1.0], help="fractions of tokens with a target"
    )
    parser.add_argument("--providers", choices=KNOWN, default=KNOWN, help=", ".join(KNOWN), **one_of)
    parser.add_argument("--repeats", type=positive, help="default: 30 on a GPU, 3 on a CPU")
    parser.add_argument("--once", choices=KNOWN, default=[], help="providers that take only the first turn", **one_of)
    parser.add_argument("--fresh", choices=("step", "provider", "run"), help="what has a process of its own")
    parser.add_argument("--limit-s", type=positive, default=900, help="longest that one job may take")
    parser.add_argument("--name", help="of the files; default: the device's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="their folder")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no GPU here (torch.cuda.is_available() is False); rows for one stay *not measured*")
    if not any(name in providers.names(operation) for operation in args.operations for name in args.providers):
        parser.error(f"none of {', '.join(args.providers)} is a variant of {', '.join(args.operations)}")
    args.shape = args.shape or [cases.SHAPES["16k" if on_gpu else "small"]]
    args.dtype = args.dtype or (["bfloat16"] if on_gpu else list(cases.DTYPES))
    args.repeats = args.repeats or (30 if on_gpu else 3)
    args.fresh = args.fresh or ("provider" if on_gpu else "step")
    return args


def shape(text: str) -> tuple[int, ...]:
    sizes = cases.SHAPES.get(text) or tuple(int(part) if part.isdigit() else 0 for part in text.split("x"))
    if len(sizes) != 3 or not all(sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; use {', '.join(cases.SHAPES)} or NxHxV")
    return sizes


def fraction(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def all_cases(args: argparse.Namespace) -> Iterator[Case]:
    for operation in args.operations:
        for tokens, hidden, vocab in args.shape:
            for dtype in args.dtype:
                if operation == "rms_norm":
                    yield Case(operation, tokens, hidden, vocab, dtype, "", 1.0, args.device)
                    continue
                for logits in args.logits:
                    for supervised in args.supervised:
                        yield Case(operation, tokens, hidden, vocab, dtype, logits, supervised, args.device)


def all_jobs(args: argparse.Namespace, results: dict, folder: str) -> Iterator[Job]:
    """In the order of a CPU: ceilings, then case by case, the providers in turns."""
    eligible = [key for key, turns in results.items() if not turns]
    # linear_cross_entropy comes first, and has a ceiling more than the others
    for case in {report.ceiling_key(case): case for case, _ in reversed(eligible)}.values():
        yield Job(vars(case), CEILINGS, args.repeats)
    on_gpu = args.device == "cuda"
    for case in dict.fromkeys(case for case, _ in eligible):
        for turn in range(1 if on_gpu else args.repeats):
            for name in (name for of, name in eligible if of == case):
                if turn == 0 or name not in args.once:
                    kept = None if on_gpu else folder
                    yield Job(vars(case), name, args.repeats if on_gpu else 1, kept, compare=turn == 0)


def groups(jobs: Iterator[Job], fresh: str) -> list[list[Job]]:
    """Jobs that share a process."""
    found = {}
    for number, job in enumerate(jobs):
        found.setdefault({"step": number, "provider": job.provider, "run": 0}[fresh], []).append(job)
    return list(found.values())


def show(number: str, case: Case, name: str, result: dict) -> None:
    what = f"{case.operation} {case.dtype} {case.logits} {name}: {result['status']} {result['reason']}"
    print(f"[{number}] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
