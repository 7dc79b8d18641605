"""What a run says while it trains: a progress bar for the person, metrics.jsonl for everything else."""

import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from aquila_sft import checkpoint, runtime


class MetricsFile:
    """metrics.jsonl: one object a logged step, in order; a run that goes on continues where its checkpoint was.

    What was logged after that checkpoint is dropped, to be logged again: steps after `from_step`, roll-backs to it, and
    the evaluation that follows the last step.
    """

    def __init__(self, path: Path, *, from_step: int, last_step: int) -> None:
        self.path, self.last_step = path, last_step
        kept = [
            m
            for m in self.read()
            if m["step"] <= from_step
            and (m["step"] < last_step or "loss" in m)
            and (m["step"] < from_step or "rolled_back_from" not in m)
        ]
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.started = time.monotonic()
        if runtime.is_main():
            checkpoint.write_text(path, "".join(json.dumps(m) + "\n" for m in kept))

    def again_from(self, step: int) -> "MetricsFile":
        """The file after the run went back to an earlier step; the time that cost counts, and that it did so before."""
        before = [m for m in self.read() if m["step"] == step and "rolled_back_from" in m]
        again = MetricsFile(self.path, from_step=step, last_step=self.last_step)
        again.seconds_before = self.seconds()
        for line in before:
            again.write(**line)
        return again

    def seconds(self) -> float:
        """Training time so far, over all sittings."""
        return self.seconds_before + time.monotonic() - self.started

    def write(self, **figures: float | int | dict | None) -> None:
        """One line; a figure that is no finite number is null, since JSON has no word for it."""
        figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        if runtime.is_main():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(figures, allow_nan=False) + "\n")

    def read(self) -> list[dict]:
        return self.lines(self.path)

    @staticmethod
    def lines(path: Path) -> list[dict]:
        """The objects of a file; a line that a kill cut off is not one, nor is a damaged one."""
        if not path.is_file():
            return []
        lines = []
        for line in path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return [line for line in lines if isinstance(line, dict) and "step" in line]


class Bar:
    """Steps, loss, tokens a second and time left on stderr, from the main process."""

    def __init__(self, total_steps: int, done_steps: int) -> None:
        self.bar = tqdm(
            total=total_steps,
            initial=done_steps,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=not runtime.is_main(),
            bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
        )

    def step(self, steps: int) -> None:
        self.bar.update(steps)

    def show(self, loss: float, tokens_per_s: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s")

    def close(self) -> None:
        self.bar.close()
