"""What the losses of this package have in common: which arguments they refuse, and how per-token losses are reduced."""

from typing import NamedTuple

import torch
from torch import Tensor

# Shapes (this file): N tokens


class Terms(NamedTuple):
    """What a token's loss is made of: reference.cross_entropy."""

    ignore_index: int
    label_smoothing: float
    z_loss: float


def check_options(
    target: Tensor, num_tokens: int, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> None:
    """ValueError for what cannot be meant, without looking at any number on a device."""
    if type(ignore_index) is not int:
        raise ValueError(f"ignore_index={ignore_index!r}; use an integer, one that no target is.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}; use 'mean', 'sum' or 'none'.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing}; use a share between 0 and 1.")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss={z_loss}; use a number from 0 on.")
    if target.shape != (num_tokens,) or target.dtype != torch.int64:
        raise ValueError(
            f"expected target int64 [{num_tokens}], got {target.dtype} {tuple(target.shape)}; "
            "flatten batch and time together, and shift targets before the call."
        )


def refuse_targets_outside(target_N: Tensor, vocab_size: int, ignore_index: int) -> None:
    """ValueError that names the first target outside the vocabulary; waits for the device."""
    is_wrong_N = targets_outside(target_N, vocab_size, ignore_index)
    if is_wrong_N.any():
        i = int(is_wrong_N.nonzero()[0])
        raise ValueError(
            f"target[{i}]={int(target_N[i])} is neither in [0, {vocab_size}) nor ignore_index={ignore_index}."
        )


def targets_outside(target_N: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return (target_N != ignore_index) & ((target_N < 0) | (target_N >= vocab_size))


def token_weights_or_ones(token_weights: Tensor | None, is_target_N: Tensor) -> Tensor:
    """fp32 at least, 0 where there is no target."""
    if token_weights is None:
        return is_target_N.to(torch.float32)
    if not isinstance(token_weights, Tensor) or token_weights.shape != is_target_N.shape:
        given = tuple(token_weights.shape) if isinstance(token_weights, Tensor) else type(token_weights).__name__
        raise ValueError(f"expected token_weights, a tensor [{len(is_target_N)}], got {given}.")
    # where, not a product: a weight without a target may be anything
    return torch.where(is_target_N, token_weights.to(torch.promote_types(token_weights.dtype, torch.float32)), 0)


def divisor(reduction: str, num_items: int | float | Tensor | None, weight_N: Tensor) -> Tensor:
    """What the sum of the losses is divided by, on the device of `weight_N`, (): nothing waits for it."""
    if num_items is None:
        return weight_N.sum() if reduction == "mean" else weight_N.new_ones(())
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items has {num_items.numel()} elements; use a number or a tensor of one.")
        if num_items.requires_grad or num_items.is_complex():
            raise ValueError("num_items is a count and gets no gradient here; give a plain number, or detach it.")
        looks = num_items.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would be waited for
        if looks and not num_items > 0:
            raise ValueError(f"num_items={num_items.item()}; use the number of targets, or leave it out.")
        return num_items.to(weight_N).reshape(())
    if not num_items > 0:
        raise ValueError(f"num_items={num_items}; use the number of targets, or leave it out.")
    return weight_N.new_full((), num_items)


def empty_gradients(x_NH: Tensor, weight_VH: Tensor, needs: tuple[bool, bool]) -> list[Tensor | None]:
    """dhidden and dweight where needed, fp32 (fp64 of fp64), uninitialised; of no token they are 0."""
    make = torch.empty if len(x_NH) else torch.zeros
    return [
        make(t.shape, dtype=torch.promote_types(x_NH.dtype, torch.float32), device=t.device) if needed else None
        for t, needed in zip((x_NH, weight_VH), needs, strict=True)
    ]
