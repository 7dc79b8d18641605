"""Held-back conversations, language by language: loss of a supervised token, and bits per byte of the answers.

Bits per byte does not depend on the tokenizer, so languages and vocabularies compare: nats of the answers' tokens
(their turn ends left out) / ln 2 / UTF-8 bytes of the answers.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from aquila_sft import runtime
from aquila_sft.data.rows import IGNORE, PackedRows
from aquila_sft.swap import targets_of


@torch.no_grad()
def answers(
    model: torch.nn.Module,
    parts: dict[str, PackedRows],
    *,
    length: int,
    rows_at_once: int,
    pad_id: int,
    turn_end_id: int,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, dict[str, float]]:
    """{language: {loss, bits_per_byte, answer_bytes}}; every process takes its share of rows, all get the sums.

    loss: mean nats of a supervised token, turn ends included. A model with swap.install_loss; left in the mode it had.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    results = {}
    for language, rows in sorted(parts.items()):
        sums = torch.zeros(3, dtype=torch.float64)  # nats, supervised tokens, nats without turn ends
        mine = list(range(runtime.rank(), len(rows), runtime.world_size()))
        for start in range(0, len(mine), rows_at_once):
            batch = {k: v.to(device) for k, v in rows.batch(mine[start : start + rows_at_once], length, pad_id).items()}
            targets = targets_of(batch.pop("labels"))
            with autocast():
                nats = model(**batch, targets=targets, per_token=True).loss
            sums += torch.stack(
                [nats.double().sum(), (targets != IGNORE).sum().double(), nats.double()[targets != turn_end_id].sum()]
            ).cpu()
        if runtime.world_size() > 1:
            sums = sums.to(device, torch.float32 if device.type == "mps" else torch.float64)
            dist.all_reduce(sums)
            sums = sums.cpu()
        answer_bytes = int(rows.bytes.sum())
        results[language] = {
            "loss": (sums[0] / sums[1]).item(),
            "answer_bytes": answer_bytes,
            "bits_per_byte": sums[2].item() / math.log(2) / answer_bytes,
        }
    model.train(was_training)
    return results
