"""What each step of a pretraining run is trained on, made ready while the step before it computes.

    step -> places -> MixtureOrder -> (part, row) -> micro-batches, and their entry for the ledger (consumed.py)

There is no iterator to save: the places of a step follow from its number and from the windows of places that were left
out after a roll-back, so any number of processes begins at any step at once.
"""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from aquila_sft import runtime
from aquila_sft.config.data import DamagedBlocks
from aquila_sft.config.runs import PretrainRun
from aquila_sft.data import mixture, text_rows
from aquila_sft.data.consumed import Consumed
from aquila_sft.data.mixture import MixtureOrder
from aquila_sft.data.shards import Prepared
from aquila_sft.data.text_rows import TextRows
from aquila_sft.errors import UserError
from aquila_sft.plan import Plan


@dataclasses.dataclass
class Loaded:
    """A step of this process."""

    step: int
    batches: list[dict[str, torch.Tensor]]  # input_ids, position_ids, targets, int64 [micro_rows, length] each
    targets: int  # to be predicted in them
    entry: Consumed
    waited: float  # seconds that training stood still for it


@dataclasses.dataclass
class Loader:
    plan: Plan
    order: MixtureOrder
    parts: list[TextRows]  # as order.parts
    length: int
    pad_id: int
    pin: bool = False  # page-locked memory, which a GPU copies from without stopping
    skipped: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # windows of places, ascending, apart

    def state(self, step: int) -> dict:
        """Where the data stand after `step` steps: all that going on needs."""
        return {"place": self.place(step), "skipped": [list(window) for window in self.skipped]}

    def place(self, step: int) -> int:
        """The first place of a step."""
        place = step * self.plan.rows_per_step
        for first, end in self.skipped:
            place += end - first if place >= first else 0
        return place

    def skip(self, first_step: int, end_step: int) -> None:
        """Leave out what these steps were trained on; from `first_step` on, steps get what comes behind it."""
        first, end = self.place(first_step), self.place(end_step)
        self.skipped = sorted([*(w for w in self.skipped if not first <= w[0] < end), (first, end)])

    def trained_on(self, first_step: int, end_step: int) -> list[tuple[int, int]]:
        """The places of these steps as ranges; blank ones, behind the run's end, are none."""
        begin, end = self.place(first_step), min(self.place(end_step), self.end)
        edges = [begin, *(edge for window in self.skipped if begin < window[0] < end for edge in window), end]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    @property
    def end(self) -> int:
        return self.plan.end + sum(end - first for first, end in self.skipped)

    @classmethod
    def of_run(cls, cfg: PretrainRun, prepared: Prepared, *, device: str, pad_id: int) -> "Loader":
        """The loader of a run's settings over the shards that its mixture asks for. Raises UserError."""
        order = mixture.order_of_run(cfg, prepared)
        leave_out = cfg.data.damaged_blocks is DamagedBlocks.leave_out
        parts = [
            TextRows(prepared.parts[name], cfg.train.max_length, leave_out_damaged=leave_out) for name in order.parts
        ]
        plan = Plan(cfg.train, int(order.rows.sum()), device, is_smoke=cfg.debug == "smoke")
        loader = cls(plan, order, parts, cfg.train.max_length, pad_id, pin=device == "cuda")
        loader.check_epochs(cfg.data.max_epochs)
        return loader

    def check_epochs(self, max_epochs: float) -> None:
        """No source is repeated more often than data.max_epochs allows, up to the run's end."""
        for line in mixture.repeated_too_often(self.order.epochs(self.place(self.plan.steps)), max_epochs):
            raise UserError(line)

    def load(self, step: int) -> Loaded:
        share = self.plan.rows_per_step // runtime.world_size()
        first = self.place(step) + runtime.rank() * share
        places = np.arange(first, min(first + share, max(first, self.end)))
        entry = Consumed.nothing(len(self.parts))
        chosen = list(zip(*(a.tolist() for a in self.order(places)), strict=True))
        blank = [None] * (share - len(chosen))
        ids, targets, positions = text_rows.arrays(
            [*((self.parts[part], row) for part, row in chosen), *blank], self.length, self.pad_id
        )
        for b, (part, row) in enumerate(chosen):
            entry.note(int(places[b]), part, self.parts[part], row, ids[b], targets[b])
        whole = text_rows.tensors(ids, targets, positions)
        if self.pin:
            whole = {name: tensor.pin_memory() for name, tensor in whole.items()}
        pieces = {name: tensor.split(self.plan.micro_rows) for name, tensor in whole.items()}
        batches = [dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True)]
        return Loaded(step, batches, int(entry.targets.sum()), entry, 0.0)

    def ahead(self, first: int, end: int) -> Iterator[Loaded]:
        """Steps first … end - 1; while one is used, the next is made."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            coming = pool.submit(self.load, first) if first < end else None
            for step in range(first, end):
                began = time.perf_counter()
                loaded = coming.result()
                loaded.waited = time.perf_counter() - began
                if step + 1 < end:
                    coming = pool.submit(self.load, step + 1)
                yield loaded
