"""Jobs, each one provider on one case, in processes of their own; `python run.py` is such a process.

It reads jobs as JSON from stdin and answers each with a line of JSON. A job that fails ends its process, for what is
left of that may be broken (a GPU's memory, a heap written beyond); the jobs after it go to a new one.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CEILINGS = "ceilings"  # in place of a provider's name


@dataclasses.dataclass(frozen=True)
class Job:
    case: dict
    provider: str
    repeats: int
    exact_folder: str | None = None  # where float64 results are kept; None: compute them again
    compare: bool = True


def in_processes(jobs: list[Job], limit_s: float) -> Iterator[tuple[Job, dict]]:
    """Each job with its result: {"status": "ok" | "not eligible" | "failed", "reason": …, and what was measured}."""
    left = list(jobs)
    while left:
        results, died = one_process(left, limit_s)
        yield from zip(left, results, strict=False)
        left = left[len(results) :]
        if died and left:
            yield left.pop(0), {"status": "failed", "reason": died}


def one_process(jobs: list[Job], limit_s: float) -> tuple[list[dict], str]:
    """Results up to a failure or the end of the process, and why that ended early, '' if it was not its end."""
    given = json.dumps([dataclasses.asdict(job) for job in jobs])
    try:
        done = subprocess.run(
            [sys.executable, __file__], input=given, capture_output=True, text=True, timeout=limit_s * len(jobs)
        )
        told, said, died = done.stdout, done.stderr, f"its process ended with status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        told, said = ((text or b"").decode() for text in (late.stdout, late.stderr))
        died = f"took more than {late.timeout:.0f} s"
    results = [json.loads(line) for line in told.split("\n")[:-1]]
    if len(results) == len(jobs) or (results and results[-1]["status"] == "failed"):
        return results, ""
    last = (said.strip().split("\n") or [""])[-1][:200]
    return results, f"{died}; its last words: {last}" if last else died


def answer(job: Job) -> dict:
    import torch

    try:
        return {"status": "ok", "reason": "", **measured(job)}
    except ImportError as error:
        return {"status": "not eligible", "reason": f"cannot be imported: {first_line(error)}"}
    except torch.OutOfMemoryError:
        return {"status": "not eligible", "reason": "needs more memory than there is"}
    except Exception as error:  # whatever another library raises: its row says so, and the others are measured
        return {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}


def measured(job: Job) -> dict:
    import cases
    import exact
    import measure
    import providers
    import torch

    case = cases.Case(**job.case)
    if case.device == "cuda":
        torch.cuda.empty_cache()  # what the job before has left, in pieces
    if job.provider == CEILINGS:
        return {"rates": measure.ceilings(case, job.repeats)}
    make = providers.PROVIDERS[case.operation][job.provider].make
    if case.device == "cpu":  # a GPU warms up at full size
        small = cases.tiny(case)
        measure.passes(make(small), cases.make_inputs(small), small, 1)
    inputs = cases.make_inputs(case)
    records, (out, gradients) = measure.passes(make(case), inputs, case, job.repeats)
    told = {"passes": records, "loss": out.item() if out.numel() == 1 else None}
    if job.compare:
        folder = job.exact_folder and Path(job.exact_folder)
        told |= exact.errors(case, inputs, out, gradients, folder)
    return told


def first_line(error: Exception) -> str:
    return (str(error).strip().split("\n") or [""])[0][:200]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    for job in json.load(sys.stdin):
        result = answer(Job(**job))
        print(json.dumps(result), file=answers, flush=True)
        if result["status"] == "failed":
            return


if __name__ == "__main__":
    main()
