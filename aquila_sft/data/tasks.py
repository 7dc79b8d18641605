"""Work in steps, steps in tasks, each whole or absent: what is killed is made again, and nothing else is.

    Work.steps -> Step.tasks(work) -> names -> Step.run(work, task) -> <folder>/<step>/<task>, written aside and renamed

A task reads what earlier steps left and leaves one file or folder. What it holds follows from the input alone, so the
bytes are the same from one worker or a thousand (workers.py). steps.py makes shards this way, sft_steps.py rows.
"""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aquila_sft import checkpoint
from aquila_sft.data.slices import Slice

ASIDE = ".writing-"  # the name of what is not whole yet begins so


class Work(Protocol):
    """What every task is given."""

    folder: Path
    slices: tuple[Slice, ...]
    policy: Any  # PreparePolicy or RowPolicy: what the tasks go by
    steps: "tuple[Step, ...]"
    settings: str  # the group of settings that say who works: prepare, data
    is_durable: bool  # whether what is done shall survive a power cut; little work is quicker done again


@dataclass(frozen=True)
class Step:
    """A task has a name, `target` of which it makes; `tasks` may be asked for when the steps before are done."""

    name: str
    tasks: Callable[[Work], list[str]]
    make: Callable[[Work, str, Path], None]  # work, task, where to write

    def target(self, work: Work, task: str) -> Path:
        return work.folder / self.name / task

    def run(self, work: Work, task: str) -> None:
        """Make what is not there yet."""
        target = self.target(work, task)
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{ASIDE}{target.name}-{os.uname().nodename}-{os.getpid()}")
        checkpoint.remove(aside)
        try:
            self.make(work, task, aside)
            for path in ([*aside.rglob("*"), aside] if aside.is_dir() else [aside]) if work.is_durable else ():
                checkpoint.sync(path)
            try:
                os.rename(aside, target)
            except OSError as error:  # another worker, given the same task, was faster with the same bytes
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if work.is_durable:
                checkpoint.sync(target.parent)
        finally:
            checkpoint.remove(aside)


def slice_tasks(work: Work) -> list[str]:
    return [f"{number:06d}" for number in range(len(work.slices))]


def of_slices(work: Work, step: str) -> list[Path]:
    """What a step with a task a slice has left, in the order of the input."""
    return [work.folder / step / task for task in slice_tasks(work)]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
