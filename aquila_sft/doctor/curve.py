"""The learning rate of a whole run, as numbers and as a picture for the terminal.

phases [(name, steps, rate of a step), ...] -> Curve -> plot

   3e-03 |  ████████████████████████████████▇▅▃▂
       0 | ▄████████████████████████████████████
           pretrain, 1,410,844 steps        anneal
"""

import dataclasses
from collections.abc import Callable

POINTS = 4000  # a longer run is looked at in so many places, and at every step of its first and last 200
BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 64, 6


@dataclasses.dataclass(frozen=True)
class Curve:
    """The learning rate of the updates `steps` (the first is 0) of `total`."""

    steps: list[int]
    rates: list[float]
    total: int

    @classmethod
    def of(cls, rate: Callable[[int], float], total: int) -> "Curve":
        ends = [*range(min(200, total)), *range(max(0, total - 200), total)]
        steps = sorted({*ends, *(total * i // POINTS for i in range(POINTS))}) if total > POINTS else list(range(total))
        return cls(steps, [rate(step) for step in steps], total)

    def longest(self, wanted: Callable[[float], bool]) -> tuple[int, int] | None:
        """The longest stretch of wanted rates: its first step, and the one behind its last."""
        best, begin = None, None
        for step, rate in [*zip(self.steps, self.rates, strict=True), (self.total, None)]:
            if rate is not None and wanted(rate):
                begin = step if begin is None else begin
            elif begin is not None:
                best = max(best or (0, 0), (begin, step), key=lambda span: span[1] - span[0])
                begin = None
        return best


@dataclasses.dataclass(frozen=True)
class Phase:
    """Part of the way to a model: a run, and what it is trained on."""

    name: str
    curve: Curve
    data: str  # in a few words


def plot(phases: list[Phase]) -> list[str]:
    """The rates of one phase after the other; widths in proportion to steps, none below a sixth."""
    total = sum(phase.curve.total for phase in phases)
    widths = [max(WIDTH // 6, round(WIDTH * phase.curve.total / total)) for phase in phases]
    top = max((rate for phase in phases for rate in phase.curve.rates), default=0) or 1
    columns = [
        max(0, sampled(phase.curve, i / max(1, width - 1)) / top) * HEIGHT
        for phase, width in zip(phases, widths, strict=True)
        for i in range(width)
    ]
    lines = []
    for row in reversed(range(HEIGHT)):
        mark = f"{top:8.1e} |" if row == HEIGHT - 1 else "       0 |" if row == 0 else "         |"
        cells = (BLOCKS[round(8 * min(1, max(0, column - row)))] for column in columns)
        lines.append((mark + "".join(cells)).rstrip())
    named = [f"└{phase.name}".ljust(width) for phase, width in zip(phases, widths, strict=True)]
    return [*lines, " " * 10 + "".join(named).rstrip()]


def sampled(curve: Curve, share: float) -> float:
    """The rate after a share of the run, of the nearest step that was looked at."""
    at = share * (curve.total - 1)
    return min(zip(curve.steps, curve.rates, strict=True), key=lambda pair: abs(pair[0] - at))[1]
