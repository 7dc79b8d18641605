"""What each operation of this package means, in plain torch: short, memory-hungry, the text to read first.

Every fast path is tested against these functions, called with fp64 inputs. They work in any floating dtype;
below fp32 the logits are raised to fp32 before the softmax, as Transformers' loss does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes (this file): N tokens, H hidden size, V vocabulary


def cross_entropy(
    logits_NV: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
) -> Tensor:
    """A token's loss is lse - z[target], 0 where target is ignore_index; reduced as asked.

    lse = log sum exp z. With label_smoothing the target is that share of the uniform distribution and the rest of the
    token itself; z_loss x lse^2 is added (PaLM, arXiv 2204.02311, section 5); token_weights (N,) multiply. "none"
    returns (N,), "sum" the sum, "mean" the sum divided by the weights of the tokens that have a target (their number
    where there are no weights); num_items, if given, is the divisor of both.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    is_target_N = target_N != ignore_index
    loss_N = F.cross_entropy(
        logits_NV, target_N, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        loss_N = loss_N + torch.where(is_target_N, z_loss * logits_NV.logsumexp(1) ** 2, 0)
    weight_N = is_target_N.to(loss_N.dtype) if token_weights is None else torch.where(is_target_N, token_weights, 0)
    loss_N = torch.where(is_target_N, loss_N * weight_N, 0)
    if reduction == "none":
        return loss_N
    if num_items is None:
        num_items = weight_N.sum() if reduction == "mean" else 1
    if isinstance(num_items, Tensor):
        num_items = num_items.to(loss_N.dtype).reshape(())
    return loss_N.sum() / num_items


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, **options) -> Tensor:
    """cross_entropy of the logits hidden @ weight.T."""
    return cross_entropy(hidden_NH @ weight_VH.T, target_N, **options)


def linear_log_probs(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, *, ignore_index: int = -100) -> Tensor:
    """log softmax(hidden @ weight.T)[target] for each token, shape (N,); 0 where target is ignore_index."""
    return -linear_cross_entropy(hidden_NH, weight_VH, target_N, ignore_index=ignore_index, reduction="none")


def rms_norm(x: Tensor, weight_H: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2, -1) + eps) * weight, x (..., H); computed in fp32 at least, rounded once at the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_H
    return y.to(torch.promote_types(x.dtype, weight_H.dtype))
