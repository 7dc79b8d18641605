"""Log-probabilities of continuations and answers of a transformers model, in batches that are given in tokens.

Several continuations of one context share it: the context stands once in a row and each continuation behind it as a
branch, which sees the context and itself:

    context  c0 c1 c2        row     c0 c1 | c2 a0 a1 | c2 b0       targets  .. a0 a1 a2 | b0 b1
    choices  a0 a1 a2, b0 b1         the branch begins with the context's last token, which predicts its first

Nothing of the size [tokens, vocabulary] is made: the loss path of swap.py asks for one target a position, and computes
the head for positions that have one alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from aquila_sft.data.rows import IGNORE
from aquila_sft.errors import UserError
from aquila_sft.evaluation.choosing import GREEDY, Chooser, Choosing


@dataclass(frozen=True)
class Group:
    """A context and what may follow it, as token ids; both cut to what the model can see."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return len(self.context) - 1 + sum(map(len, self.continuations))


def fitted(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Group:
    """The context cut at its left so that model inputs are at most max_length; a continuation longer than the model
    itself loses its first tokens, which the reference would count from the wrong end."""
    continuation = tuple(continuation[-max_length:])
    return Group(tuple(context[-(max_length + 1 - len(continuation)) :]), (continuation,))


def grouped(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int, window: int | None = None
) -> list[tuple[Group, list[int]]]:
    """Groups of neighbours with one context, and the places of their pairs. A row never outgrows the model, nor a
    shared one the window of its sliding attention, which our mask of branches does not know."""
    groups: list[tuple[Group, list[int]]] = []
    for place, (context, continuation) in enumerate(pairs):
        single = fitted(context, continuation, max_length)
        if groups and groups[-1][0].context == single.context:
            last, places = groups[-1]
            joined = Group(last.context, last.continuations + single.continuations)
            if joined.tokens <= min(max_length, window or max_length):
                groups[-1] = joined, [*places, place]
                continue
        groups.append((single, [place]))
    return groups


def batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places of `sizes`, longest first, in batches whose padded size is at most max_tokens (or one row)."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    made: list[list[int]] = []
    for place in order:
        if made and sizes[made[-1][0]] * (len(made[-1]) + 1) <= max_tokens:
            made[-1].append(place)
        else:
            made.append([place])
    return made


@torch.inference_mode()
def log_probs(
    model: torch.nn.Module, groups: Sequence[Group], pad_id: int, autocast: Callable[[], AbstractContextManager]
) -> list[list[float]]:
    """For each group the summed log-probability of each continuation. A model with swap.install."""
    device = next(model.parameters()).device
    length = max(group.tokens for group in groups)
    ids = torch.full((len(groups), length), pad_id)
    targets = torch.full_like(ids, IGNORE)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)
    for row, group in enumerate(groups):
        shared = len(group.context) - 1
        ids[row, :shared] = torch.tensor(group.context[:-1], dtype=torch.long)
        positions[row, :shared] = torch.arange(shared)
        branch[row, :shared] = 0
        at = shared
        for number, continuation in enumerate(group.continuations, 1):
            end = at + len(continuation)
            ids[row, at:end] = torch.tensor((group.context[-1], *continuation[:-1]))
            targets[row, at:end] = torch.tensor(continuation)
            positions[row, at:end] = torch.arange(shared, shared + len(continuation))
            branch[row, at:end] = number
            at = end
    if all(len(group.continuations) == 1 for group in groups):
        mask = None  # plain causal rows; padding stands behind them, where nothing looks
        positions[branch < 0] = 0
        given = {"position_ids": torch.arange(length).expand_as(ids)}
    else:
        sees = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
        mask = sees.tril()[:, None]  # [B, 1, T, T]; padding sees padding, so that no row of the softmax is empty
        given = {"position_ids": positions, "attention_mask": mask}
    given |= {"input_ids": ids, "targets": targets}
    with autocast():
        lost = model(**{name: tensor.to(device) for name, tensor in given.items()}, per_token=True).loss
    lost = lost.double().cpu()
    return [
        [-lost[row, branch[row] == number].sum().item() for number in range(1, len(group.continuations) + 1)]
        for row, group in enumerate(groups)
    ]


@torch.inference_mode()
def answers(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    is_done: Callable[[int, list[int]], bool],
    pad_id: int,
    vocabulary: int,
    autocast: Callable[[], AbstractContextManager],
    choosing: Choosing = GREEDY,
    streams: Sequence[str] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(place, new ids) of every prompt as it ends: at its length or when is_done(place, new ids) says so.

    Prompts are padded at the left; a row that has ended leaves the batch. Rows of the head beyond `vocabulary` spell
    nothing and are not chosen. streams: what the chance of each answer is drawn from; by default its place.
    """
    device = next(model.parameters()).device
    choose = Chooser(choosing, prompts, streams or [str(i) for i in range(len(prompts))], vocabulary, device)
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad_id)
    attended = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(list(prompt))
        attended[row, length - len(prompt) :] = 1
    places = list(range(len(prompts)))
    written: dict[int, list[int]] = {place: [] for place in places}
    cache, fed = None, ids.to(device)
    attended = attended.to(device)
    while places:
        positions = (attended.cumsum(-1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        with autocast():
            out = model(
                input_ids=fed,
                attention_mask=attended,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits = out.logits[:, -1, :vocabulary].float()
        if not logits.amax(-1).isfinite().all():  # the maximum of anything and a nan is a nan
            raise UserError("the model's outputs are not finite numbers: its weights are damaged")
        new_ids = choose(logits)
        cache, keep = out.past_key_values, []
        for row, (place, new_id) in enumerate(zip(places, new_ids.tolist(), strict=True)):
            written[place].append(new_id)
            if is_done(place, written[place]) or len(written[place]) >= max_new_tokens[place]:
                yield place, written.pop(place)
            else:
                keep.append(row)
        if len(keep) < len(places):
            places = [places[row] for row in keep]
            chosen = torch.tensor(keep, device=device, dtype=torch.long)
            if places:
                cache.batch_select_indices(chosen)
            attended, new_ids = attended[chosen], new_ids[chosen]
            choose.keep(keep)
        fed = new_ids[:, None]
        attended = torch.cat([attended, attended.new_ones(len(places), 1)], -1)
