"""Cross entropy of a language-model head, without ever holding the [tokens, vocabulary] logits.

With N tokens, hidden size H and vocabulary V the logits are by far the largest tensor of a small model's step
(N=2048, V=151851: 1.2 GB in fp32, and the plain loss keeps several of that size). Here they exist one
vocabulary chunk at a time, in a scratch buffer that every chunk reuses:

    forward    for each chunk c:  z = x @ W_c.T;  running max m and sum s of exp(z - m);  z[target] if in c
               lse = m + log s,  loss = sum(lse - z[target]);  of all this only lse is kept for backward
    backward   for each chunk c:  z = x @ W_c.T again;  g = (exp(z - lse) - onehot) * upstream
               dx += g @ W_c (in fp32),  dW_c = g.T @ x (over all tokens at once, so it is rounded once)

That is four matrix products where the plain loss has three, and the fourth costs less than the passes over
full-size logits that it saves: see kernels/bench/results/cpu_linear_cross_entropy.csv. Forming the gradients
already in forward would need only three, and a CPU prototype of it was about a tenth faster. But it holds a
[V, H] gradient from forward to backward and copies it there to apply the upstream scale, adds up dW over
token chunks (in bf16: more roundings, or an fp32 copy), and does all the work even if no backward follows.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes (this file): N tokens, H hidden size, V vocabulary, C one vocabulary chunk

# CPU: 8 to 128 MiB took the same time (N=2048, H=576, fp32 and bf16). Elsewhere a guess: a chunk costs some
# twenty kernel launches, so fewer and larger ones.
_DEFAULT_BUDGET_BYTES = {"cpu": 64 * 2**20}
_DEFAULT_BUDGET_BYTES_OTHER = 512 * 2**20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Sum over targets of -log softmax(hidden @ weight.T)[target], divided as asked; an fp32 scalar.

    hidden (N, H) and weight (V, H) in fp32 or bf16, any strides; target (N,) int64. fp64 works, in fp64.
    Divisor: num_items if given (an int or a one-element tensor, for example the targets of all micro-batches
    and ranks), else the number of targets for reduction="mean" and 1 for "sum".
    Without any target, "sum" is 0 and "mean" is 0/0 = nan, as in F.cross_entropy; gradients are 0 in both.

    compute_dtype is what the matrix products run in, weight being cast one vocabulary chunk at a time; by
    default autocast's dtype where autocast is on, else hidden.dtype. Softmax, loss and dhidden sum in fp32.
    memory_budget_bytes bounds the scratch for logits (default 64 MiB on CPU, 512 MiB elsewhere). Besides it,
    backward holds hidden in compute_dtype, dhidden in fp32 and dweight; a frozen hidden or weight costs no
    gradient. No input is written to, and backward may run again (retain_graph).

    On CPU only rows that have a target are computed, and a target outside [0, V) raises ValueError. Elsewhere
    nothing waits for the device: all rows are computed, and a target outside [0, V) makes the loss nan.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; use 'mean' or 'sum'.")
    is_target = _check_inputs(hidden, weight, target, ignore_index)
    compute_dtype = _pick_compute_dtype(hidden, compute_dtype)
    if num_items is None:
        num_items = is_target.sum() if reduction == "mean" else 1
    elif isinstance(num_items, Tensor):
        num_items = num_items.reshape(())

    if hidden.device.type == "cpu":
        rows = is_target.nonzero().squeeze(1)
        if len(rows) < len(target):
            # Differentiable: rows without a target get their zero gradient from index_select's own backward.
            hidden, target, is_target = (t.index_select(0, rows) for t in (hidden, target, is_target))
    loss_sum = _TorchLossSum.apply(hidden, weight, target, is_target, compute_dtype, memory_budget_bytes)
    return loss_sum / num_items


@torch.no_grad()
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    compute_dtype: torch.dtype | None = None,
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target] for each token, fp32 (N,); 0 where target is ignore_index.

    For evaluation: no gradient. Arguments, memory and errors are those of linear_cross_entropy.
    """
    is_target = _check_inputs(hidden, weight, target, ignore_index)
    compute_dtype = _pick_compute_dtype(hidden, compute_dtype)
    if hidden.device.type != "cpu":
        lse, target_logit = _torch_forward(hidden, weight, target, compute_dtype, memory_budget_bytes)
        return torch.where(is_target, target_logit - lse, 0)
    rows = is_target.nonzero().squeeze(1)
    lse, target_logit = _torch_forward(
        hidden.index_select(0, rows), weight, target.index_select(0, rows), compute_dtype, memory_budget_bytes
    )
    return lse.new_zeros(len(target)).index_copy_(0, rows, target_logit - lse)


def _check_inputs(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Raise ValueError for what cannot be meant; return the mask of tokens that have a target."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H] with V > 0, got {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}."
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"expected target int64 [{len(hidden)}], got {target.dtype} {tuple(target.shape)}; "
            "flatten batch and time together, and shift targets before the call."
        )
    is_target = target != ignore_index
    if target.device.type == "cpu":
        is_wrong = is_target & ((target < 0) | (target >= len(weight)))
        if is_wrong.any():
            i = int(is_wrong.nonzero()[0])
            raise ValueError(
                f"target[{i}]={int(target[i])} is neither in [0, {len(weight)}) "
                f"nor ignore_index={ignore_index}."
            )
    return is_target


def _pick_compute_dtype(hidden: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    if compute_dtype is None:
        device_type = hidden.device.type
        # Autocast leaves fp64 alone, and so do we.
        follows_autocast = torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64
        compute_dtype = torch.get_autocast_dtype(device_type) if follows_autocast else hidden.dtype
    if compute_dtype not in (torch.bfloat16, torch.float32, torch.float64):
        # fp16: the gradient of a logit, p / num_items, is often below its smallest number.
        raise ValueError(f"compute_dtype={compute_dtype} is not supported; use bfloat16 or float32.")
    return compute_dtype


# ---- torch path: any device ----


class _TorchLossSum(torch.autograd.Function):
    """Sum of -log_probs over rows with is_target. The divisor is part of the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_N, is_target_N, compute_dtype, budget_bytes):
        lse_N, target_logit_N = _torch_forward(hidden_NH, weight_VH, target_N, compute_dtype, budget_bytes)
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, is_target_N, lse_N)
        ctx.compute_dtype, ctx.budget_bytes = compute_dtype, budget_bytes
        return torch.where(is_target_N, lse_N - target_logit_N, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden_NH, weight_VH, target_N, is_target_N, lse_N = ctx.saved_tensors
        needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
        dhidden_NH = torch.zeros_like(hidden_NH, dtype=lse_N.dtype) if needs_dhidden else None
        dweight_VH = torch.empty_like(weight_VH) if needs_dweight else None
        # where, not a product: without any target the divisor is 0, grad is inf, and inf * 0 would be nan.
        scale_N1 = torch.where(is_target_N, grad, 0)[:, None]

        with torch.autocast(hidden_NH.device.type, enabled=False):
            x_NH = hidden_NH.to(ctx.compute_dtype)
            for chunk in _logit_chunks(x_NH, weight_VH, target_N, ctx.budget_bytes):
                softmax_NC = chunk.logits_NC.sub_(lse_N[:, None]).exp_()
                # In fp32, before rounding: near p = 1 the difference p - 1 would be lost in bf16.
                softmax_NC[chunk.target_index] -= chunk.has_target_N.to(lse_N.dtype)
                dlogits_NC = chunk.product_NC.copy_(softmax_NC.mul_(scale_N1))
                if needs_dhidden and x_NH.dtype == dhidden_NH.dtype:
                    dhidden_NH.addmm_(dlogits_NC, chunk.weight_CH)
                elif needs_dhidden:
                    dhidden_NH += dlogits_NC @ chunk.weight_CH
                if needs_dweight:
                    dweight_VH[chunk.columns] = dlogits_NC.T @ x_NH
        if needs_dhidden:
            dhidden_NH = dhidden_NH.to(hidden_NH.dtype)
        return dhidden_NH, dweight_VH, None, None, None, None


def _torch_forward(hidden_NH, weight_VH, target_N, compute_dtype, budget_bytes) -> tuple[Tensor, Tensor]:
    """Each row's log-sum-exp and target logit (nan where target is not in [0, V)), both fp32 (N,)."""
    stats_dtype = torch.promote_types(compute_dtype, torch.float32)
    max_N = hidden_NH.new_full(target_N.shape, -math.inf, dtype=stats_dtype)
    sum_exp_N = torch.zeros_like(max_N)
    target_logit_N = torch.full_like(max_N, math.nan)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for chunk in _logit_chunks(hidden_NH.to(compute_dtype), weight_VH, target_N, budget_bytes):
            logits_NC = chunk.logits_NC
            target_logit_N = torch.where(chunk.has_target_N, logits_NC[chunk.target_index], target_logit_N)
            new_max_N = torch.maximum(max_N, logits_NC.amax(1))
            sum_exp_N *= (max_N - new_max_N).exp_()
            sum_exp_N += logits_NC.sub_(new_max_N[:, None]).exp_().sum(1)
            max_N = new_max_N
    return max_N + sum_exp_N.log(), target_logit_N


class _Chunk(NamedTuple):
    """One chunk of the vocabulary. The NC tensors are scratch: overwrite them freely, the next chunk will."""

    columns: slice
    weight_CH: Tensor  # in the dtype of the products
    product_NC: Tensor  # logits in that dtype
    logits_NC: Tensor  # logits in at least fp32; the same tensor as product_NC where dtypes agree
    has_target_N: Tensor
    target_index: tuple[Tensor, Tensor]  # (row, column) of the target; any column where not has_target_N


def _logit_chunks(x_NH, weight_VH, target_N, budget_bytes) -> Iterator[_Chunk]:
    """Compute x @ weight.T in x's dtype, chunk by chunk. Both passes see the same chunks: the same logits."""
    num_rows, vocab_size = len(x_NH), len(weight_VH)
    stats_dtype = torch.promote_types(x_NH.dtype, torch.float32)
    needs_copy = x_NH.dtype != stats_dtype
    if budget_bytes is None:
        budget_bytes = _DEFAULT_BUDGET_BYTES.get(x_NH.device.type, _DEFAULT_BUDGET_BYTES_OTHER)
    bytes_per_logit = stats_dtype.itemsize + (x_NH.dtype.itemsize if needs_copy else 0)
    # At most half of the vocabulary, however small the problem: the full logits never exist.
    width = min(budget_bytes // (bytes_per_logit * max(num_rows, 1)), (vocab_size + 1) // 2)
    width = max(width // 64 * 64, min(width, 64), 1)

    product = x_NH.new_empty(num_rows * width)
    logits = x_NH.new_empty(num_rows * width, dtype=stats_dtype) if needs_copy else None
    row_N = torch.arange(num_rows, device=x_NH.device)
    for start in range(0, vocab_size, width):
        columns = slice(start, min(start + width, vocab_size))
        num_columns = columns.stop - columns.start
        weight_CH = weight_VH[columns].to(x_NH.dtype)
        # Scratch viewed as contiguous [N, C] for the last, narrower chunk too.
        product_NC = product[: num_rows * num_columns].view(num_rows, num_columns)
        torch.mm(x_NH, weight_CH.T, out=product_NC)
        logits_NC = product_NC
        if needs_copy:
            logits_NC = logits[: num_rows * num_columns].view(num_rows, num_columns).copy_(product_NC)
        column_N = target_N - start
        has_target_N = (column_N >= 0) & (column_N < num_columns)
        target_index = (row_N, column_N.clamp(0, num_columns - 1))
        yield _Chunk(columns, weight_CH, product_NC, logits_NC, has_target_N, target_index)
