"""Held-back data, language by language: loss of a target, and bits per byte of the text.

Bits per byte does not depend on the tokenizer, so languages and vocabularies compare: nats of the text's tokens (turn
ends and document ends left out) / ln 2 / UTF-8 bytes of the text.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from aquila_sft import runtime
from aquila_sft.config.model import PretrainTrain
from aquila_sft.data import text_rows
from aquila_sft.data.rows import IGNORE, PackedRows
from aquila_sft.data.text_rows import TextRows
from aquila_sft.swap import targets_of

Autocast = Callable[[], AbstractContextManager]


def answers(
    model: torch.nn.Module,
    parts: dict[str, PackedRows],
    *,
    length: int,
    rows_at_once: int,
    pad_id: int,
    turn_end_id: int,
    autocast: Autocast,
) -> dict[str, dict[str, float]]:
    """{language: {loss, bits_per_byte, answer_bytes}} of held-back conversations.

    loss: mean nats of a supervised token, turn ends included. A model with swap.install; left in the mode it had.
    Every process takes its share of rows, all get the sums.
    """

    def batches(rows: PackedRows) -> Iterable[dict]:
        for chosen in shared(len(rows), rows_at_once):
            batch = rows.batch(chosen, length, pad_id)
            yield batch | {"targets": targets_of(batch.pop("labels"))}

    results = {}
    for language, rows in sorted(parts.items()):
        total, tokens, inner, _ = nats(model, batches(rows), turn_end_id, autocast)
        answer_bytes = int(rows.bytes.sum())
        results[language] = {
            "loss": total / tokens,
            "answer_bytes": answer_bytes,
            "bits_per_byte": inner / math.log(2) / answer_bytes,
        }
    return results


def text(
    model: torch.nn.Module,
    parts: dict[str, TextRows],
    *,
    max_bytes: int,
    rows_at_once: int,
    pad_id: int,
    marks: tuple[int | None, int | None],
    autocast: Autocast,
) -> dict[str, dict[str, float]]:
    """{part: {loss, bits_per_byte, text_bytes}} of held-back documents, about the first `max_bytes` of each part.

    A part of which damage leaves nothing to read is left out.
    marks: the tokens that begin and end a document, None where there is none. Without one at the beginning the first
    token of a text is predicted by nothing; it counts as an average one.
    """
    marks_a_document = sum(mark is not None for mark in marks)
    results = {}
    for name, rows in sorted(parts.items()):
        part = rows.part
        count = rows_evaluated(rows, max_bytes)

        def batches(rows: TextRows = rows, count: int = count) -> Iterable[dict]:
            for chosen in shared(count, rows_at_once):
                yield text_rows.batch([(rows, row) for row in chosen], rows.length, pad_id)

        total, tokens, inner, inner_tokens = nats(model, batches(), marks[1], autocast)
        if not inner_tokens:
            continue
        text_tokens = part.tokens - part.documents * marks_a_document
        results[name] = {
            "loss": total / tokens,
            "text_bytes": round(part.text_bytes * count / len(rows)),
            "bits_per_byte": inner / inner_tokens * text_tokens / math.log(2) / part.text_bytes,
        }
    return results


def rows_evaluated(rows: TextRows, max_bytes: int) -> int:
    return math.ceil(len(rows) * min(1.0, max_bytes / rows.part.text_bytes))


def in_the_loop(train: PretrainTrain, eval_tokens: int, total_steps: int) -> tuple[int | None, str]:
    """Every how many steps to evaluate, and what that costs, in words. None: before the first and after the last alone.

    Predicting a token is a third of the work of training on it, so evaluations cost eval_tokens / (3 x tokens that are
    trained on between two of them). Without train.eval_steps they fall on checkpoints, as often as train.eval_share
    allows.
    """
    if not eval_tokens:
        return None, "nothing is held back to be evaluated"
    every = train.eval_steps
    if every is None:
        least = eval_tokens / (3 * train.tokens_per_step * train.eval_share) if train.eval_share else math.inf
        every = aligned(least, train.save_steps, train.intermediate_steps) if least <= total_steps else total_steps
    if every >= total_steps:
        return None, "evaluation before the first and after the last step"
    share = eval_tokens / (3 * every * train.tokens_per_step)
    told = f"evaluation every {every:,} steps, {share:.2%} of the compute"
    if share > train.eval_share:
        told += f": more than train.eval_share={train.eval_share:g}; fewer (train.eval_steps=null) or shorter ones "
        told += "(data.eval_bytes=) cost less"
    return every, told


def aligned(least: float, save_steps: int, intermediate_steps: int | None) -> int:
    """The smallest multiple of save_steps, at least `least`, that divides intermediate_steps or is a multiple of it."""
    fewest = math.ceil(least / save_steps)
    kept, rest = divmod(intermediate_steps or 0, save_steps)  # in checkpoints
    if not kept or rest:
        return fewest * save_steps
    divisors = (n for n in range(fewest, kept) if kept % n == 0)
    return next(divisors, math.ceil(fewest / kept) * kept) * save_steps


def shared(count: int, at_once: int) -> Iterable[list[int]]:
    """This process's share of 0 … count - 1, in lists of at most `at_once`."""
    mine = list(range(runtime.rank(), count, runtime.world_size()))
    for start in range(0, len(mine), at_once):
        yield mine[start : start + at_once]


@torch.no_grad()
def nats(
    model: torch.nn.Module, batches: Iterable[dict], end_id: int | None, autocast: Autocast
) -> tuple[float, float, float, float]:
    """(nats, targets, nats without those of `end_id`, targets without `end_id`), summed over all processes."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        targets = batch["targets"]
        with autocast():
            lost = model(**batch, per_token=True).loss.double()
        counted = targets != IGNORE
        inner = counted if end_id is None else counted & (targets != end_id)
        sums += torch.stack([lost.sum(), counted.sum().double(), lost[inner].sum(), inner.sum().double()]).cpu()
    model.train(was_training)
    if runtime.world_size() > 1:
        sums = sums.to(device, torch.float32 if device.type == "mps" else torch.float64)
        dist.all_reduce(sums)
    return tuple(sums.tolist())


def by_language(metrics: dict) -> dict[str, dict[str, float]]:
    """{"eval_loss_en": 1, "eval_bits_per_byte_en": 2} -> {"eval_loss": {"en": 1}, "bits_per_byte": {"en": 2}}

    What was no finite number (null in metrics.jsonl) has no entry.
    """
    table: dict[str, dict[str, float]] = {"bits_per_byte": {}, "eval_loss": {}}
    for key, value in metrics.items():
        for prefix, name in (("eval_bits_per_byte_", "bits_per_byte"), ("eval_loss_", "eval_loss")):
            if key.startswith(prefix) and value is not None:
                table[name][key.removeprefix(prefix)] = round(value, 4)
    return table


def of_run(logged: list[dict]) -> dict:
    """What summary.json says of a run's metrics: loss at its beginning and end, evaluations before and after."""
    losses = [m["loss"] for m in logged if "loss" in m]
    evaluations = [m for m in logged if any(key.startswith("eval_") for key in m)] or [{}]
    return {
        "loss": losses[-1] if losses else None,
        "first_loss": losses[0] if losses else None,
        **by_language(evaluations[-1]),
        "before": by_language(evaluations[0]),
    }
