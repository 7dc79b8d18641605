"""What each operation of this package means, in plain torch: short, memory-hungry, the text to read first.

Every fast path is tested against these functions, called with fp64 inputs. They work in any floating dtype;
below fp32 the logits are raised to fp32 before the softmax, as Transformers' loss does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes (this file): N tokens, H hidden size, V vocabulary


def linear_log_probs(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, *, ignore_index: int = -100) -> Tensor:
    """log softmax(hidden @ weight.T)[target] for each token, shape (N,); 0 where target is ignore_index."""
    logits_NV = hidden_NH @ weight_VH.T
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return -F.cross_entropy(logits_NV, target_N, ignore_index=ignore_index, reduction="none")


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Sum of -log_probs, divided by num_items if given, else by the number of targets for "mean"."""
    loss_sum = -linear_log_probs(hidden_NH, weight_VH, target_N, ignore_index=ignore_index).sum()
    if num_items is None:
        num_items = (target_N != ignore_index).sum() if reduction == "mean" else 1
    return loss_sum / num_items


def rms_norm(x: Tensor, weight_H: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2, -1) + eps) * weight, x (..., H); computed in fp32 at least, rounded once at the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_H
    return y.to(torch.promote_types(x.dtype, weight_H.dtype))
