"""How long a run is and how its rows are portioned: steps, rows a step, rows a forward pass."""

import math

from aquila_sft import runtime
from aquila_sft.config.model import Train
from aquila_sft.device import micro_batch_rows
from aquila_sft.errors import UserError


class Plan:
    """How many steps of how many rows, from lengths given in steps, tokens or epochs.

    A place is a row's turn in the run: step s takes the places from s * rows_per_step on, and every process an equal
    share of them. From `end` on places are blank: they fill the last step of a run that is measured in epochs.
    """

    def __init__(
        self,
        train: Train,
        num_rows: int,
        device: str,
        *,
        is_smoke: bool,
        processes: int | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """`processes` and `memory_bytes` are for a run that is only imagined (recipe=check); None: this machine's."""
        self.processes = world = processes or runtime.world_size()
        self.rows_per_step = train.tokens_per_step // train.max_length
        if self.rows_per_step % world:
            unit = world * train.max_length
            raise UserError(
                f"train.tokens_per_step={train.tokens_per_step} is not a multiple of processes x "
                f"train.max_length = {world} x {train.max_length} = {unit}; use "
                f"{-(-train.tokens_per_step // unit) * unit}"
            )
        self.micro_rows = micro_batch_rows(train, self.rows_per_step // world, device, memory_bytes)
        self.accumulation = self.rows_per_step // world // self.micro_rows
        if train.num_epochs is not None:
            self.end = math.ceil(num_rows * train.num_epochs)  # in places: rows to be trained on
            self.steps = math.ceil(self.end / self.rows_per_step)
        else:
            tokens = train.total_tokens or 0
            self.steps = train.max_steps or math.ceil(tokens / train.tokens_per_step)
            self.end = self.steps * self.rows_per_step
        if is_smoke:
            self.steps = min(self.steps, 2)
        self.places = self.steps * self.rows_per_step
        self.epochs = self.places / num_rows

    def __str__(self) -> str:
        return f"{self.processes} process(es) x {self.accumulation} x {self.micro_rows} rows"
