"""The lines a run begins and ends with, the same for every recipe."""

from aquila_sft import runtime
from aquila_sft.config import Run

OTHER_SCALE = {
    "mini": "this is scale=mini, a demonstration on the bundled world; scale=135m is the real thing",
    "135m": "this is scale=135m, Aquila-135M's architecture; scale=mini shows everything in minutes",
}


def opening(cfg: Run) -> None:
    runtime.say(f"recipe={cfg.recipe} -> {cfg.output_dir}; {OTHER_SCALE[cfg.scale]}")


def closing(cfg: Run, *lines: str) -> None:
    for line in lines:
        runtime.say(line)
    runtime.say(f"recipe={cfg.recipe}: {OTHER_SCALE[cfg.scale]}")


def before_and_after(summary: dict) -> str:
    """'en 3.577 -> 2.592, zh …': bits per byte by language, at a run's beginning and end."""
    before = summary["before"]["bits_per_byte"]
    return ", ".join(
        f"{name} {before.get(name, float('nan')):.3f} -> {value:.3f}"
        for name, value in summary["bits_per_byte"].items()
    )
