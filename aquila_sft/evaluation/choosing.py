"""Which token follows, for the answers of a batch: the likeliest, or one that is drawn. Settings are generate()'s own.

    logits [rows, V] -> penalty of what was said -> likeliest | temperature -> top_p -> drawn -> ids [rows]

Each answer draws from a stream of its own: its chance does not depend on what else is in its batch or who computes it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choosing:
    temperature: float = 0.0  # 0: the likeliest
    top_p: float = 1.0  # drawn from the fewest tokens that are this likely together
    repetition_penalty: float = 1.0  # logits of what prompt and answer have are divided by it, negative ones multiplied
    seed: int = 0

    def told(self) -> str:
        how = f"temperature {self.temperature:g}, top_p {self.top_p:g}" if self.temperature else "greedy"
        return how if self.repetition_penalty == 1 else f"{how}, repetition penalty {self.repetition_penalty:g}"


GREEDY = Choosing()


class Chooser:
    """Of one batch. streams: a name for each row, from which its chance is drawn; vocabulary: ids from 0 on."""

    def __init__(
        self, how: Choosing, prompts: Sequence[Sequence[int]], streams: Sequence[str], vocabulary: int, device: object
    ) -> None:
        self.how = how
        self.streams = [random.Random(f"{how.seed} {name}") for name in streams]
        self.said: Tensor | None = None
        if how.repetition_penalty != 1:
            self.said = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.said[row, list(prompt)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """int64 [rows] of fp32 [rows, V]; of a row with a nan any id."""
        if self.said is not None:
            penalty = self.how.repetition_penalty
            logits = torch.where(self.said, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        chosen = logits.argmax(-1) if self.how.temperature == 0 else self.drawn(logits)
        if self.said is not None:
            self.said.scatter_(1, chosen[:, None], True)
        return chosen

    def drawn(self, logits: Tensor) -> Tensor:
        # the largest becomes 0: a small temperature cannot overflow
        scores = (logits - logits.amax(-1, keepdim=True)) / self.how.temperature
        likely, ids = scores.softmax(-1).sort(-1, descending=True)
        up_to = likely.cumsum(-1)
        eligible = (up_to - likely < self.how.top_p).sum(-1, keepdim=True).clamp(min=1)
        share = torch.tensor([[stream.random()] for stream in self.streams], device=logits.device)
        drawn = (up_to <= share * up_to.gather(-1, eligible - 1)).sum(-1, keepdim=True)
        return ids.gather(-1, torch.minimum(drawn, eligible - 1)).squeeze(-1)

    def keep(self, rows: list[int]) -> None:
        """The others have ended."""
        self.streams = [self.streams[row] for row in rows]
        if self.said is not None:
            self.said = self.said[rows]
