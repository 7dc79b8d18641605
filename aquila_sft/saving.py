"""Checkpoints written while training goes on: the state is copied, and a thread writes the copy.

    state_dict()s  --copy, the loop waits-->  buffers in host memory  --thread: fill, checkpoint.write-->  step-000500/

Memory is bounded by one copy of the state: a save waits for the one before. The buffers are kept, because to fill fresh
memory takes ten times as long as to fill memory that is there (200 MB on a CPU: 0.43 s and 0.03 s). From a GPU they are
pinned, so that all copies run at the speed of the bus behind one wait. A run's last state, which nothing changes any
more, is written as it is where it is in host memory already.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aquila_sft import checkpoint, runtime
from aquila_sft.errors import UserError


class Saver:
    """Writes the checkpoints of one run, one at a time, and keeps the newest `keep` (None: all).

    What goes wrong in the thread is raised by the next save() or wait(). Leaving the `with` block waits, whatever
    ended it.
    """

    def __init__(self, parent: Path, keep: int | None) -> None:
        self.parent, self.keep = parent, keep
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None
        self.buffers: dict[str, torch.Tensor] = {}

    def save(
        self, step: int, state: dict, fill: Callable[[Path, dict], None], *, last: bool = False, **about: object
    ) -> None:
        """The checkpoint of `step`: what `fill(folder, copy of state)` writes, in the thread.

        `state` is nested dicts, lists and tensors; that of the `last` save stays as it is until wait(). `about` goes
        into the manifest. Raises UserError when the disk has no room; in the thread, when a tensor is not finite: such
        a state is not worth a checkpoint.
        """
        self.wait()
        copy, size = self.copy_of(state, may_share=last)
        checkpoint.preflight(self.parent, size)

        def checked_fill(folder: Path) -> None:
            check_finite(copy, step)
            fill(folder, copy)

        write = partial(checkpoint.write, self.parent, step, checked_fill, self.keep)
        self.pending = self.thread.submit(write, **about)

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong there."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def finish(self) -> None:
        """wait(), in all processes of the run: when one of them ends, its launcher ends the others."""
        self.wait()
        if self.keep is not None and runtime.is_main():
            checkpoint.keep_newest(self.parent, self.keep)  # a kill in the last rotation left one too many
        if dist.is_available() and dist.is_initialized():
            dist.barrier()

    def copy_of(self, state: dict, *, may_share: bool) -> tuple[dict, int]:
        """`state` with every tensor copied, and the bytes of it. Tied tensors are copied once and stay tied.

        may_share: host memory is not copied.
        """
        copied: dict[tuple, torch.Tensor] = {}

        def copy(value: Any, name: str) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, f"{name}/{key}") for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(copy(item, f"{name}/{i}") for i, item in enumerate(value))
            if not isinstance(value, torch.Tensor):
                return value
            same = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if same not in copied:
                if may_share and value.device.type == "cpu":
                    copied[same] = value.detach()
                else:
                    copied[same] = self.buffer(name, value).copy_(value.detach(), non_blocking=value.is_cuda)
            return copied[same]

        whole = copy(state, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return whole, sum(tensor.nbytes for tensor in copied.values())

    def buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Host memory for a tensor, the same at every save."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
            self.buffers[name] = buffer
        return buffer

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            self.wait()
        except UserError as error:
            if kind is None:
                raise
            runtime.say(f"the last checkpoint was not written: {error}")  # another error is on its way already
        finally:
            self.thread.shutdown()


def check_finite(state: dict | list | tuple, step: int) -> None:
    """Raises UserError when a tensor of the state holds NaN or infinity."""
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, (dict, list, tuple)):
            check_finite(value, step)
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            # NaN wins in both, so one pass without a mask of the same size is enough
            if not all(torch.isfinite(bound) for bound in torch.aminmax(value)):
                raise UserError(
                    f"{name} is not finite at step {step}: this checkpoint is not written, the ones before it are kept"
                )
