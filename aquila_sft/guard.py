"""Which updates are not made: those of a loss or gradient that is no number, or far above what it has been.

    loss, gradient norm -> judge -> 0 or 1 on the device, which fused AdamW takes as "leave the weights as they are"

Everything stays on the device: no step waits for the host. The host looks where it looks anyway (`crossed`), and from
the step on that was one too many (train.max_skipped) no update is made until it does, so when it looks changes nothing.
All processes judge the same reduced figures and decide alike. The state is eight numbers, saved with a checkpoint.

A spike is an update whose loss or gradient norm lies more than `train.spike_sigma` standard deviations above its mean
over the last hundred good ones (means that fade out); six, after OLMo-core's SkipStepOptimizer.
"""

import torch
from torch import Tensor

WINDOW = 128  # good updates over which means fade out; there is no spike before so many were seen
FORGIVEN = 0.1  # of one skipped update, by each good one


class Guard:
    def __init__(self, *, spike_sigma: float, max_skipped: int, device: torch.device | str) -> None:
        self.spike_sigma, self.max_skipped, self.device = spike_sigma, max_skipped, device
        self.restore(
            {
                "seen": 0,  # good updates, up to WINDOW
                "mean": [0, 0],  # of loss and gradient norm
                "variance": [0, 0],
                "level": 0,  # skipped updates that are not forgiven yet
                "since": -1,  # the step with which the level rose from 0
                "crossed": -1,  # the step that was one too many
                "skipped": 0,  # in all
            }
        )

    def judge(self, loss: Tensor, grad_norm: Tensor, step: int) -> Tensor:
        """1.0 when the update of this step is to be left out, else 0.0; fp32, no dimension."""
        found = torch.stack([loss, grad_norm]).float()
        limit = self.mean + self.spike_sigma * self.variance.sqrt()
        bad = ~found.isfinite().all() | (self.crossed >= 0)
        if self.spike_sigma:
            bad |= (found > limit).any() & (self.seen >= WINDOW)
        was_calm = self.level == 0
        self.level = torch.where(bad, self.level + 1, (self.level - FORGIVEN).clamp(min=0))
        self.since = torch.where(bad & was_calm, step, torch.where(self.level == 0, -1, self.since))
        self.crossed = torch.where((self.crossed < 0) & (self.level > self.max_skipped), step, self.crossed)
        self.skipped = self.skipped + bad
        # a good one moves the means; the first so many count alike
        seen = torch.where(bad, self.seen, (self.seen + 1).clamp(max=WINDOW))
        weight = torch.where(bad, 0.0, 1 / seen.clamp(min=1))
        apart = torch.where(bad, 0.0, found - self.mean)
        self.mean = self.mean + weight * apart
        self.variance = (1 - weight) * (self.variance + weight * apart**2)
        self.seen = seen
        return bad.float()

    def state(self) -> dict:
        return {name: getattr(self, name).tolist() for name in self.names}

    def restore(self, state: dict) -> None:
        self.names = tuple(state)
        for name, value in state.items():
            setattr(self, name, torch.tensor(value, dtype=torch.float32, device=self.device))
