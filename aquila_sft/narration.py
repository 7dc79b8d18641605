"""The lines a run begins and ends with, the same for every recipe.

A recipe that is made on the way to another one is a stage of that run: it reports what it did, and leaves the lines on
scale and on what to type next to the run that was asked for.
"""

import contextlib
import contextvars
import time
from collections.abc import Iterator

from aquila_sft import runtime
from aquila_sft.config.runs import Run

SCALES = {
    "mini": "scale=mini: a demonstration on the bundled world; for the real thing add scale=135m",
    "135m": "scale=135m: Aquila-135M's architecture; scale=mini shows everything in minutes",
}

is_stage = contextvars.ContextVar("is_stage", default=False)


@contextlib.contextmanager
def stage(number: int, total: int, run: Run) -> Iterator[None]:
    """A recipe that is made for another one."""
    runtime.say(f"\nstage {number} of {total}, {run.recipe} -> {run.output_dir}")
    begun = time.monotonic()
    token = is_stage.set(True)
    try:
        yield
    finally:
        is_stage.reset(token)
    runtime.say(f"  stage {number} took {time.monotonic() - begun:.0f} s")


def opening(cfg: Run) -> None:
    if not is_stage.get():
        runtime.say(f"{SCALES[cfg.scale]}\nrecipe={cfg.recipe} -> {cfg.output_dir}")


def closing(cfg: Run, *lines: str, what_next: dict[str, str]) -> None:
    """`what_next`: what one may want to do -> what to type."""
    for line in lines:
        runtime.say(line)
    if not is_stage.get():
        for purpose, command in what_next.items():
            runtime.say(f"{purpose}:\n  {command}")
        runtime.say(SCALES[cfg.scale])


def before_and_after(summary: dict) -> str:
    """'en 3.577 -> 2.592, zh …': bits per byte by language, at a run's beginning and end."""
    before = summary["before"]["bits_per_byte"]
    return ", ".join(
        f"{name} {before.get(name, float('nan')):.3f} -> {value:.3f}"
        for name, value in summary["bits_per_byte"].items()
        if "." not in name  # not the single parts of shards
    )
