"""Learning rate as a pure function of the step: what optim.lr is multiplied with.

1 |   /‾‾‾\\__          cosine, linear, one_minus_sqrt, constant after a linear warm-up; wsd stays up until its last
  |  /       \\__       decay_steps. The first step already moves, and the rate reaches min_lr_ratio when the last
  +------------------> step is done, not before
"""

import math

from aquila_sft.config.model import Schedule, ScheduleKind


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """Whole steps of warm-up; a value below 1 is a fraction of all steps."""
    steps = schedule.warmup_steps * total_steps if schedule.warmup_steps < 1 else schedule.warmup_steps
    return min(int(steps), total_steps)


def remarks(schedule: Schedule, total_steps: int) -> list[str]:
    """A line for each part of the schedule that is longer than the run."""
    lines = []
    if schedule.warmup_steps > total_steps:
        lines.append(
            f"schedule.warmup_steps={schedule.warmup_steps:g} and the run has {total_steps:,}: "
            "the learning rate never reaches optim.lr"
        )
    if schedule.kind is ScheduleKind.wsd and schedule.decay_steps > total_steps:
        lines.append(
            f"schedule.decay_steps={schedule.decay_steps:g} and the run has {total_steps:,}: "
            "the learning rate falls from the end of the warm-up on"
        )
    return lines


def multiplier(step: int, schedule: Schedule, total_steps: int) -> float:
    """In [0, 1], for the update number `step` (the first is 0) of `total_steps`."""
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    kind, begin = schedule.kind, warmup
    if kind is ScheduleKind.wsd:
        decay = schedule.decay_steps * total_steps if schedule.decay_steps < 1 else schedule.decay_steps
        kind, begin = schedule.decay_kind, max(warmup, total_steps - int(decay))
    progress = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
    fallen = {
        ScheduleKind.constant: 0.0,
        ScheduleKind.linear: progress,
        ScheduleKind.one_minus_sqrt: math.sqrt(progress),  # Hägele et al., 2024, arXiv 2405.18392
        ScheduleKind.cosine: (1 - math.cos(math.pi * progress)) / 2,
    }[kind]
    return 1 - (1 - schedule.min_lr_ratio) * fallen
