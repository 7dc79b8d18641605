"""The processes of a run: who they are, what they may use, and how they end.

`rank()` and `world_size()` read what a launcher left in the environment, so they work before any process group exists.
`settle()` is called once, first thing in a stage, before torch is imported: no telemetry, no host look-ups when all is
local, no worker left behind by a dead launcher.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

from aquila_sft.errors import Stopped, UserError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    """Until every process has come here; they have a group by then (torch.distributed)."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def say(text: str) -> None:
    """One line to the person at the terminal, from the main process only."""
    if is_main():
        print(text, flush=True)


def settle(*, offline: bool) -> None:
    """Environment of a training process. `offline`: everything is local, so no host may be looked up."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that spin at every barrier starve each other as soon as another process wants a core: on two cores with
    # other work a small model trained three times slower than with threads that sleep. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if launched():
        die_with_parent()


def launched() -> bool:
    """True under `accelerate launch` or torchrun."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def die_with_parent() -> None:
    """On Linux: SIGTERM for this process when its launcher dies, so that a worker never trains on as an orphan."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig, parent = 1, os.getppid()
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it died between the two lines
        raise Stopped("the launcher of this worker is gone")


def set_threads(world_size: int = 1) -> int:
    """All cores, shared among the processes of this machine; returns the number of threads of this one.

    `accelerate launch` exports OMP_NUM_THREADS=1 for CPU runs, which would leave all but one core idle. A number that
    the user exported for a plain `python train.py` is respected.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ and not launched():
        return torch.get_num_threads()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    threads = max(1, cores() // local)
    torch.set_num_threads(threads)
    return threads


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Kept while the process lives. Without a launcher that holds the store (srun), the main process does, and closing it
# when it goes on would leave the others with a broken connection instead of an answer.
stores: list = []


@contextlib.contextmanager
def main_process_first() -> Iterator[bool]:
    """The main process runs the body first, alone; the others run it after it succeeded. Yields is_main().

    Used where the body writes files that the others then read. The wait is on the launcher's key-value store, before
    any process group exists: tokenizing a large set must not end in a collective's time-out. When the main process
    fails, the others leave with one line instead of waiting for ever.
    """
    if world_size() == 1:
        yield True
        return
    import datetime

    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://"))
    stores.append(store)
    key = f"aquila-prepared-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_main():
        try:
            yield True
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")
    else:
        store.wait([key], datetime.timedelta(days=7))
        if store.get(key) != b"done":
            raise UserError("the main process stopped while preparing; its message says why")
        yield False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What the main process runs in here is a run of its own, in one process, whatever a launcher started."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
    names += [name for name in os.environ if name.startswith(("ACCELERATE_", "TORCHELASTIC_"))]
    if launched():  # its one thread, not the user's
        names.append("OMP_NUM_THREADS")
    launcher = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(launcher)


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 end a run in good order: at once, or with `finish_step` at the step's end.

    A second SIGINT does not wait for the step.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.group: object = None
        self.finish_step = False
        self.previous: dict = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                self.previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if not self.finish_step or (name == "SIGINT" and self.name == "SIGINT"):
            raise Stopped(f"{name}; the same command goes on from what is saved")
        self.name = name
        os.write(2, f"\n{name}: finishing the step and writing a checkpoint …\n".encode())

    def agreed(self) -> bool:
        """Whether any process has had a signal; asked at the end of every step, the same answer in all of them.

        The processes ask over their CPUs: what a GPU still has in its queue is not waited for.
        """
        if world_size() == 1:
            return self.name is not None
        import torch
        import torch.distributed as dist

        self.group = self.group or dist.new_group(backend="gloo")
        number = torch.tensor(signal.Signals[self.name] if self.name else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
        self.name = signal.Signals(number.item()).name if number else None
        return self.name is not None
