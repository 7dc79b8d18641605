"""Training steps at the real shape, beside each other: the parts throughput, sft and pretrain of gpu.py.

    jobs -> steps.py, each in a process of its own -> trials of the other side's ways -> ours, theirs, ours, … -> rows

A way that is not possible here (out of memory, a package that is missing, a compiler's error) is a row that says why.
Trials take half of a part's time at most. What was not tried or repeated because it was up is said, too.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import flops
import goals

NAMES = {"sft": "ours", "trl": "TRL", "pretrain": "ours", "plain": "plain AdamW, compiled"}
TOKENS_PER_S = 300_000  # the goal of ours, at 151,851 entries and rows of 2,048
SPEEDUP = {"sft": 1.5, "pretrain": 1.3}  # the goals beside the other side
TRIAL = {"warm_ups": 2, "steps": 3}


class Failed(Exception):
    """Why there is no record, in a line."""


def in_its_own_process(job: dict, limit_s: float) -> dict:
    """The record of a job of steps.py; raises Failed."""
    command = [sys.executable, str(Path(__file__).with_name("steps.py")), json.dumps(job)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=with_one_gpu())
    except subprocess.TimeoutExpired:
        raise Failed(f"took more than {limit_s:.0f} s") from None
    if ended.returncode:
        lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
        raise Failed((lines or [f"ended with status {ended.returncode}"])[-1][:160])
    return json.loads(ended.stdout.strip().split("\n")[-1])


def with_one_gpu() -> dict:
    """This environment; a Trainer that sees several GPUs in one process would split its batches over them."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


@dataclasses.dataclass
class Bench:
    """One part: its time, and what its jobs have in common. `settings` are train.py's, beyond scale=135m."""

    device: str  # as torch calls it
    limit_s: float = 570
    settings: dict = dataclasses.field(default_factory=dict)
    is_compiled: bool = True
    warm_ups: int = 3
    steps: int = 10
    repeats: int = 3
    measure: Callable[[dict, float], dict] = in_its_own_process

    def __post_init__(self) -> None:
        self.ends, self.rows = time.monotonic() + self.limit_s, []

    def job(self, side: str, attention: str | None = None, micro_rows: int | None = None, **extra) -> dict:
        told = {"side": side, "attention": attention, "micro_rows": micro_rows, "extra": extra}
        shared = {"settings": self.settings, "is_compiled": self.is_compiled}
        return told | shared | {"warm_ups": self.warm_ups, "steps": self.steps}

    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def attempt(self, job: dict, turn: str, limit_s: float) -> dict | None:
        """The record, or None; either way a row more."""
        about = {"turn": turn, "side": NAMES[job["side"]], "settings": asked(job)}
        record = None
        try:
            if limit_s <= 0:
                raise Failed("the time was up")
            record = self.measure(job, limit_s)
            if not any(row["turn"] == "shape" for row in self.rows):
                self.rows.insert(0, {"turn": "shape", "settings": shape(record)})
            self.rows.append(about | {"settings": used(job, record)} | figures(record, self.device))
        except Failed as why:
            self.rows.append(about | {"tokens_per_s": f"not possible: {why}"})
        print(f"  {turn}, {about['side']}, {about['settings']}: tokens/s {self.rows[-1]['tokens_per_s']}", flush=True)
        return record

    # ---- parts ----

    def throughput(self, micro_rows: tuple[int, ...] = (4, 8, 16, 32)) -> list[dict]:
        """A tuning step of ours over micro-batch and attention; more rows are not tried where fewer were too many."""
        for attention in ("flash_attention_2", "flex_attention", "sdpa"):
            for rows in micro_rows:
                if self.attempt(self.job("sft", attention, rows) | TRIAL, "ladder", self.left_s()) is None:
                    break
        return self.rows

    def sft(self) -> list[dict]:
        has_flash = find_spec("flash_attn") is not None
        missing = [] if has_flash else ["flash_attention_2: flash-attn is not installed"]
        ways = [self.job("trl", "flash_attention_2", rows) for rows in (16, 32, 8) if has_flash]
        ways += [self.job("trl", "flex_attention", rows) | self.one_shape(rows) for rows in (16, 8)]
        ways += [self.job("trl", "sdpa", rows) for rows in (2, 1)]

        def improved(best: dict) -> list[dict]:
            of_one_shape = self.one_shape(best["micro_rows"])["extra"] | {"torch_compile": True}
            more = [best | {"extra": of_one_shape}]
            if find_spec("liger_kernel"):
                more.append(best | {"extra": best["extra"] | {"use_liger_kernel": True}})
            return more

        if find_spec("liger_kernel") is None:
            missing.append("Liger's layers (its loss is no choice of TRL's): liger-kernel is not installed")
        return self.compared("sft", ways, improved, missing)

    def one_shape(self, micro_rows: int) -> dict:
        """TRL's padding-free batches are as long as what is in them; a compiler wants one shape."""
        return {"extra": {"pad_to_multiple_of": micro_rows * self.settings.get("train.max_length", 2048)}}

    def pretrain(self) -> list[dict]:
        ways = [self.job("plain", None, rows) for rows in (8, 16, 4)]
        return self.compared("pretrain", ways, lambda best: [best | {"extra": {"compile": "whole"}}], [])

    def compared(
        self, side: str, ways: list[dict], improved: Callable[[dict], list[dict]], missing: list[str]
    ) -> list[dict]:
        """Ours by its defaults beside the other side's fastest way: of `ways`, and of the fastest one, improved."""
        other, tried = NAMES[ways[0]["side"]], []

        def trial(job: dict) -> None:
            if record := self.attempt(job | TRIAL, "trial", self.left_s() - self.limit_s / 2):
                tried.append((tokens_per_s(record), job))

        for job in ways:
            trial(job)
        best = max(tried, key=lambda pair: pair[0], default=(0, None))[1]
        for job in improved(best) if best else ():
            trial(job)
        best = max(tried, key=lambda pair: pair[0], default=(0, None))[1]

        pairs, lone, longest = [], [], 0.0
        for repeat in range(1, self.repeats + 1):
            if longest > self.left_s():
                break
            began = time.monotonic()
            ours = self.attempt(self.job(side), str(repeat), self.left_s() * (0.5 if best else 1))
            theirs = self.attempt(best, str(repeat), self.left_s()) if best else None
            lone += [ours] if ours else []
            pairs += [(ours, theirs)] if ours and theirs else []
            longest = max(longest, time.monotonic() - began)
        self.rows += [{"turn": "left out", "side": other, "settings": why} for why in missing]
        self.rows += verdicts(side, other, pairs, lone)
        return self.rows


# ---- rows ----


def asked(job: dict) -> str:
    words = [job["attention"] or "attention by default", f"{job['micro_rows'] or 'rows by default'}"]
    words[1] += " rows at once" if job["micro_rows"] else ""
    return ", ".join([*words, *(f"{key}={value}" for key, value in job["extra"].items())])


def used(job: dict, record: dict) -> str:
    words = [record["attention"], f"{record['accumulation']} x {record['micro_rows']} rows"]
    return ", ".join([*words, *(f"{key}={value}" for key, value in job["extra"].items())])


def shape(record: dict) -> str:
    supervised = sum(record["targets"]) / sum(record["tokens"])
    return (
        f"{record['parameters']:,} parameters, {record['vocab']:,} entries, rows of {record['length']:,}, "
        f"{supervised:.1%} supervised, products in {record['precision']}"
    )


def tokens_per_s(record: dict) -> float:
    return per_s(record, "tokens")


def per_s(record: dict, what: str) -> float:
    """Median over the steps."""
    return statistics.median(n / s for n, s in zip(record[what], record["seconds"], strict=True))


def figures(record: dict, device: str) -> dict:
    seconds = sorted(record["seconds"])
    share = flops.mfu(per_s(record, "flops"), 1.0, device)
    return {
        "tokens_per_s": round(tokens_per_s(record)),
        "supervised_tokens_per_s": round(per_s(record, "targets")),
        "step_s": f"{statistics.median(seconds):.4g} ({seconds[0]:.4g} to {seconds[-1]:.4g})",
        "peak_gib": round(record["peak_bytes"] / 2**30, 2),
        "mfu": "peak not known" if share is None else f"{share:.1%}",
        "mean_loss": round(record["loss"], 4),
    }


def verdicts(side: str, other: str, pairs: list[tuple[dict, dict]], ours: list[dict]) -> list[dict]:
    """The goals: ours beside the other side, turn by turn, and ours alone."""
    ratios = sorted(tokens_per_s(a) / tokens_per_s(b) for a, b in pairs)
    memory = sorted(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs)
    told = [
        (
            f"ours / {other}",
            goals.at_least(
                f"at least {SPEEDUP[side]} x the tokens a second",
                statistics.median(ratios) if ratios else None,
                SPEEDUP[side],
                "{:.2f} x",
            ),
            {"tokens_per_s": spread(ratios), "peak_gib": spread(memory)},
        )
    ]
    is_real = bool(ours) and (ours[0]["vocab"], ours[0]["length"]) == (151851, 2048)
    alone = statistics.median(tokens_per_s(record) for record in ours) if is_real else None
    goal = f"at least {TOKENS_PER_S:,} tokens a second at 151,851 entries and rows of 2,048"
    told.append(
        ("ours", goals.at_least(goal, alone, TOKENS_PER_S, "{:,.0f}"), {"tokens_per_s": alone and round(alone)})
    )
    return [
        {"turn": f"median of {len(pairs)}" if who != "ours" else f"median of {len(ours)}", "side": who}
        | {"settings": verdict.goal, "verdict": verdict.verdict}
        | {key: value for key, value in more.items() if value}
        for who, verdict, more in told
    ]


def spread(values: list[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.2f} x ({values[0]:.2f} to {values[-1]:.2f})" if values else ""
