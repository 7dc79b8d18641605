"""Learning rate as a pure function of the step: what optim.lr is multiplied with.

1 |   /‾‾‾\\__          cosine, linear, constant after a linear warm-up; the first step already moves,
  |  /       \\__       and the rate reaches min_lr_ratio when the last step is done, not before
  +------------------> step
"""

import math

from aquila_sft.config import Schedule, ScheduleKind


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """Whole steps of warm-up; a value below 1 is a fraction of all steps."""
    steps = schedule.warmup_steps * total_steps if schedule.warmup_steps < 1 else schedule.warmup_steps
    return min(int(steps), total_steps)


def multiplier(step: int, schedule: Schedule, total_steps: int) -> float:
    """In [0, 1], for the update number `step` (the first is 0) of `total_steps`."""
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    fallen = {
        ScheduleKind.constant: 0.0,
        ScheduleKind.linear: progress,
        ScheduleKind.cosine: (1 - math.cos(math.pi * progress)) / 2,
    }[schedule.kind]
    return 1 - (1 - schedule.min_lr_ratio) * fallen
