"""train.py in a process that kills itself, with SIGKILL, at an instant that its first argument names.

    dying.py 'in a write' <seed> <seconds> recipe=sft …        `seconds`: how long an undisturbed run takes

What surrounds the instant is found by looking at calls; whether it dies there and then, or a moment later in whatever
thread is running, is up to chance.
"""

import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path


def die(chance: random.Random, longest_s: float = 0.003) -> None:
    """Now or a moment later, so that it is not always the same line."""
    if chance.random() < 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(chance.uniform(0, longest_s), os.kill, (os.getpid(), signal.SIGKILL)).start()


def before(owner: object, name: str, act: Callable) -> None:
    """Call act(*arguments) before every call of owner.name(*arguments)."""
    original = getattr(owner, name)

    def call(*arguments, **named):
        act(*arguments)
        return original(*arguments, **named)

    setattr(owner, name, call)


def in_a_write(chance: random.Random, seconds: float) -> None:
    from aquila_sft import checkpoint

    left = [chance.randrange(1, 40)]  # a checkpoint has a dozen files

    def act(path: Path) -> None:
        if ".writing-0" in str(path):
            left[0] -= 1
            if not left[0]:
                die(chance)

    before(checkpoint, "sync", act)


def in_a_rotation(chance: random.Random, seconds: float) -> None:
    def act(path, *_) -> None:
        if ".deleting" in str(path):
            die(chance, 0.0005)

    before(shutil, "rmtree", act)


def in_an_evaluation(chance: random.Random, seconds: float) -> None:
    from aquila_sft import evaluate

    before(evaluate, "nats", lambda *_: chance.random() < 0.4 and die(chance, 0.02))


def at_an_epoch_edge(chance: random.Random, seconds: float) -> None:
    """When the order begins a new permutation of the rows, as it is asked for the first row of another epoch."""
    from aquila_sft.data import mixture, rows

    begun = set()

    def act(key: object) -> None:
        begun.add(key)
        if len(begun) > 2 and chance.random() < 0.5:
            die(chance, 0.02)

    before(rows.RowOrder, "__call__", lambda order, place: act(place // order.num_rows))
    before(mixture, "permuted", lambda indices, size, key: act(key))


def at_a_stage_edge(chance: random.Random, seconds: float) -> None:
    """Between the last step and the end: the last evaluation is over, final/ is written, the summary is not."""
    from aquila_sft import checkpoint, run_dir

    def commits(written: Path, target: Path) -> None:
        if target.name in ("final", "adapter") and chance.random() < 0.5:
            die(chance, 0.01)

    def ends(run: object, cfg: object, status: str) -> None:
        if status == "done":
            die(chance)

    before(checkpoint, "commit", commits)
    before(run_dir.RunDir, "write_summary", ends)


def any_time(chance: random.Random, seconds: float) -> None:
    threading.Timer(chance.uniform(0, seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()


INSTANTS = {  # in the order in which a run meets them
    "in a write": in_a_write,
    "in a rotation": in_a_rotation,
    "in an evaluation": in_an_evaluation,
    "at an epoch edge": at_an_epoch_edge,
    "any time": any_time,
    "at a stage edge": at_a_stage_edge,
}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import train

    instant, seed, seconds, *words = sys.argv[1:]
    INSTANTS[instant](random.Random(seed), float(seconds))
    sys.exit(train.main(words))
