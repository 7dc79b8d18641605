"""What a run measured, as rows that can be read alone, as a CSV file and as a table."""

import csv
import dataclasses
import datetime
import platform
import shlex
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cases
import providers
import torch
from cases import Case

ROOT = Path(__file__).parents[2]
COLUMNS = (
    *("operation", "pass", "tokens", "hidden", "vocab", "dtype", "logits", "supervised", "provider"),
    *("provider_version", "status", "reason", "repeats", "p20_ms", "p50_ms", "p80_ms"),
    *("time_ratio", "time_ratio_min", "time_ratio_max", "cpu_ratio", "cpu_ratio_min", "cpu_ratio_max"),
    *("extra_bytes", "memory_ratio", "tflop_per_s", "gb_per_s", "ceiling", "share_of_ceiling"),
    *("loss", "error_out", "error_dx", "error_dw"),
    *("device", "driver", "threads", "torch", "triton", "python", "commit", "date", "command"),
)
EMPTY = dict.fromkeys(COLUMNS)
LEGEND = """\
Times: median (20th to 80th percentile) of the repeats. / eager: ratio to eager's, of the same turn where they take
turns: median (smallest to largest). Extra memory: the peak beyond the inputs, gradients included. Of ceiling: for
linear_cross_entropy three products of 2 N H V at the faster product rate below, N being the tokens that have a target;
for the others the bytes that have to move (cross_entropy: the logits three times; rms_norm: x and y, dy, x and dx) at
the copy bandwidth below; above 100 % where a provider multiplies in another dtype. Errors: norm of the difference to
float64 over the norm of float64, inputs as given.
"""


def about(device: str) -> dict:
    """Of the machine and the program: the same in every row."""
    on_gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "driver": driver() if on_gpu else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if find_spec("triton") else "",
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "kernels/bench/bench.py", *sys.argv[1:]]),
    }


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # what a run writes does not count
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!kernels/bench/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""  # a copy without its history


def driver() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# ---- rows ----


def rows(results: dict[tuple[Case, str], list[dict]], ceilings: dict[tuple, dict], told: dict) -> list[dict]:
    """results: of each turn. ceilings: of ceiling_key(case). told: about()."""
    made = [row | told for key, result in ceilings.items() for row in rows_of_ceilings(key, result)]
    for (case, name), turns in results.items():
        rates = ceilings.get(ceiling_key(case), {}).get("rates", {})
        made += [row | told for row in rows_of(case, name, turns, results.get((case, "eager"), []), rates)]
    return made


def ceiling_key(case: Case) -> tuple:
    return case.tokens, case.hidden, case.vocab, case.dtype


def rows_of_ceilings(key: tuple, result: dict) -> list[dict]:
    row = EMPTY | {"operation": "ceiling", "provider": "torch", "status": result["status"], "reason": result["reason"]}
    row |= dict(zip(("tokens", "hidden", "vocab", "dtype"), key, strict=True)) | {"supervised": 1.0, "logits": ""}
    if result["status"] != "ok":
        return [row]
    unit = {True: ("gb_per_s", 1e9), False: ("tflop_per_s", 1e12)}
    return [
        row | {"pass": name, unit[name == "copy"][0]: rounded(rate / unit[name == "copy"][1])}
        for name, rate in result["rates"].items()
    ]


def rows_of(case: Case, name: str, turns: list[dict], eager: list[dict], rates: dict) -> list[dict]:
    """One for each pass; one without figures where there are none."""
    case_row = {key: value for key, value in dataclasses.asdict(case).items() if key != "device"}
    if case.operation == "rms_norm":
        case_row["vocab"] = None
    row = EMPTY | case_row | {"provider": name, "provider_version": providers.version(name)}
    worst = next((turn for turn in turns if turn["status"] != "ok"), turns[0])
    row |= {"status": worst["status"], "reason": worst["reason"]}
    if worst["status"] != "ok":
        return [row | {"pass": "both"}]
    row |= {key: rounded(turns[0].get(key)) for key in ("loss", "error_out", "error_dx", "error_dw")}
    if not all(turn["status"] == "ok" for turn in eager):
        eager = []
    return [
        row | figures(case, which, [t["passes"][i] for t in turns], [t["passes"][i] for t in eager], rates)
        for i, which in enumerate(case.passes)
    ]


def figures(case: Case, which: str, turns: list[dict], eager: list[dict], rates: dict) -> dict:
    seconds = sorted(s for turn in turns for s in turn["seconds"])
    p50 = percentile(seconds, 50)
    made = {"pass": which, "repeats": len(seconds)}
    made |= {f"p{q}_ms": rounded(1e3 * percentile(seconds, q)) for q in (20, 50, 80)}
    for column, key in (("time_ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        pairs = [(t[key], e[key]) for t, e in zip(turns, eager, strict=False) if t[key] and sum(e[key])]
        ratios = [statistics.median(ours) / statistics.median(theirs) for ours, theirs in pairs]
        if ratios:
            middle = statistics.median(ratios)
            made |= {
                column: rounded(middle),
                f"{column}_min": rounded(min(ratios)),
                f"{column}_max": rounded(max(ratios)),
            }
    extra, of_eager = (median([turn["extra_bytes"] for turn in of]) for of in (turns, eager))
    made |= {"extra_bytes": extra, "memory_ratio": rounded(extra / of_eager) if extra and of_eager else None}
    num_flops, num_bytes = cases.flops(case), cases.bytes_moved(case, which)
    if num_flops:
        made["tflop_per_s"] = rounded(num_flops / p50 / 1e12)
    else:
        made["gb_per_s"] = rounded(num_bytes / p50 / 1e9)
    if rates:
        rate = max(rate for key, rate in rates.items() if key.startswith("product")) if num_flops else rates["copy"]
        made |= {"ceiling": rounded(rate / (1e12 if num_flops else 1e9))}
        made |= {"share_of_ceiling": rounded((num_flops or num_bytes) / rate / p50)}
    return made


def percentile(ordered: list[float], q: float) -> float:
    """Of sorted values, linear between two of them."""
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: list) -> int | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known)) if known else None


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


# ---- output ----


def write_csv(path: Path, made: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(made)


def table(made: list[dict]) -> str:
    head = made[0]
    lines = [
        f"{head['device']}, {head['threads']} CPU threads, driver {head['driver'] or 'none'}, torch {head['torch']}, "
        f"triton {head['triton'] or 'none'}, python {head['python']}, commit {head['commit']}, {head['date']}",
        "",
        LEGEND,
    ]
    for row in made:
        if row["operation"] == "ceiling":
            rate = f"{row['gb_per_s']:.4g} GB/s" if row["gb_per_s"] else f"{row['tflop_per_s'] or 0:.4g} TFLOP/s"
            what = f"{row['pass']} ({row['tokens']} x {row['hidden']} x {row['vocab']}, {row['dtype']})"
            lines.append(f"Ceiling, {what}: {rate}" if row["status"] == "ok" else f"Ceilings: {row['reason']}")
    titles = ("operation", "pass", "shape", "dtype", "logits", "supervised", "provider", "ms", "/ eager")
    titles += ("CPU time / eager", "extra MiB", "/ eager", "TFLOP/s or GB/s", "of ceiling", "dX error", "dW error")
    lines += ["", f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    told = set()
    for row in made:
        reason = (row["operation"], row["provider"], row["reason"])
        if row["operation"] != "ceiling" and not (row["reason"] and reason in told):
            lines.append(f"| {' | '.join(cells(row))} |")
            told.add(reason)
    return "\n".join(lines)


def cells(row: dict) -> list[str]:
    shape = f"{row['tokens']} x {row['hidden']}" + (f" x {row['vocab']}" if row["vocab"] else "")
    case = [row["operation"], row["pass"], shape, row["dtype"], row["logits"], f"{row['supervised']:g}"]
    if row["status"] == "not eligible":  # said once, for all the cases that share the reason
        return [row["operation"], *[""] * 5, row["provider"], f"not eligible: {row['reason']}", *[""] * 8]
    if row["status"] != "ok":
        return [*case, row["provider"], f"{row['status']}: {row['reason']}", *[""] * 8]
    rate = row["tflop_per_s"] or row["gb_per_s"]
    return [
        *case,
        row["provider"],
        f"{row['p50_ms']:.4g} ({row['p20_ms']:.4g} to {row['p80_ms']:.4g})",
        spread(row, "time_ratio"),
        spread(row, "cpu_ratio"),
        shown(row["extra_bytes"] and row["extra_bytes"] / 2**20, ".0f"),
        shown(row["memory_ratio"], ".2f"),
        shown(rate, ".4g"),
        shown(row["share_of_ceiling"], ".0%"),
        shown(row["error_dx"], ".1e"),
        shown(row["error_dw"], ".1e"),
    ]


def spread(row: dict, column: str) -> str:
    if row[column] is None:
        return ""
    low, high = row[f"{column}_min"], row[f"{column}_max"]
    return f"{row[column]:.2f}" + ("" if low == high else f" ({low:.2f} to {high:.2f})")


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
