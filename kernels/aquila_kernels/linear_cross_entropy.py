"""Cross entropy of a language-model head, without ever holding the [tokens, vocabulary] logits.

With N tokens, hidden size H and vocabulary V the logits are by far the largest tensor of a small model's step
(N=2048, V=151851: 1.2 GB in fp32, and the plain loss keeps several of that size). Here at most the logits of
n tokens exist, n chosen to fit a budget of memory, and the gradients are formed while they do:

    for each n tokens x:
        for each tile c of the vocabulary:  z_c = W_c @ x.T;  running max m and sum s of exp(z - m)
        lse = m + log s;  loss += sum(lse - z[target])
        for each tile c of the vocabulary:  g = (exp(z_c - lse) - onehot) / divisor, written over z_c
                                            dx += g.T @ W_c;  dW_c += g @ x  (both summed in fp32)

Forward keeps dhidden and dweight, and backward multiplies them by the upstream gradient into new tensors. So
a loss computed with gradients enabled costs its backward at once: evaluate under torch.no_grad, which needs
one tile of logits at a time and nothing else.

The other way is to keep only lse and compute the logits again in backward. That is less memory (no gradient
is held), but four matrix products instead of three: a CPU version of it took 1.0x the time of the plain loss
at the shape above. This takes less: kernels/bench/results/cpu_linear_cross_entropy.csv.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes (this file): N tokens, n of them whose logits exist at once, H hidden size, V vocabulary, C one tile

# Logits of n tokens. On CPU 300 and 600 MiB in fp32, 150 and 300 in bf16, took the same time within 5%.
# Elsewhere a guess: each tile costs some twenty kernel launches, so fewer and larger ones.
_BUDGET_BYTES_CPU, _BUDGET_BYTES_OTHER = 256 * 2**20, 2**30
# One fp32 tile, the working set of the element-wise steps, which are faster in cache; but most of the time is
# in the products, and on CPU 4 to 32 MiB took the same within 7%.
_TILE_BYTES_CPU, _TILE_BYTES_OTHER = 8 * 2**20, 128 * 2**20


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

    compute_dtype is what the matrix products run in, weight being cast one vocabulary tile at a time; by
    default autocast's dtype where autocast is on, else hidden.dtype. Softmax and loss are computed in fp32.
    memory_budget_bytes bounds the memory for logits, down to those of one token (default 256 MiB on CPU,
    1 GiB elsewhere). Besides it, gradients are held from forward to backward: dhidden in fp32, and dweight,
    summed in fp32 and then rounded to weight.dtype; a frozen hidden or weight costs neither time nor memory.
    No input is written to, and backward may run again (retain_graph).

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
    needs_grads = tuple(torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))

    if hidden.device.type == "cpu":
        rows = is_target.nonzero().squeeze(1)
        if len(rows) < len(target):
            # Differentiable: rows without a target get their zero gradient from index_select's own backward.
            hidden, target, is_target = (t.index_select(0, rows) for t in (hidden, target, is_target))
    return _TorchLoss.apply(
        hidden, weight, target, is_target, num_items, needs_grads, compute_dtype, memory_budget_bytes
    )


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
        lse, target_logit = _softmax_stats(hidden.to(compute_dtype), weight, target, memory_budget_bytes)
        return torch.where(is_target, target_logit - lse, 0)
    rows = is_target.nonzero().squeeze(1)
    hidden, target_of_rows = hidden.index_select(0, rows).to(compute_dtype), target.index_select(0, rows)
    lse, target_logit = _softmax_stats(hidden, weight, target_of_rows, memory_budget_bytes)
    return lse.new_zeros(len(target)).index_copy_(0, rows, target_logit - lse)


def _check_inputs(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Raise ValueError for what cannot be meant; return the mask of tokens that have a target."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H] with V > 0, got {tuple(hidden.shape)} and {tuple(weight.shape)}."
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
                f"target[{i}]={int(target[i])} is neither in [0, {len(weight)}) nor ignore_index={ignore_index}."
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


class _TorchLoss(torch.autograd.Function):
    """Sum of -log_probs over rows with is_target, divided by num_items."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_N, is_target_N, num_items, needs_grads, compute_dtype, budget_bytes):
        x_NH = hidden_NH.to(compute_dtype)
        divisor = torch.zeros((), dtype=_stats_dtype(x_NH), device=x_NH.device) + num_items
        if any(needs_grads):
            # where, not a product: without any target the divisor is 0, and 0 * inf would be nan.
            scale_N = torch.where(is_target_N, 1 / divisor, 0)
            lse_N, target_logit_N, dhidden_NH, dweight_VH = _softmax_stats_and_grads(
                x_NH, weight_VH, target_N, scale_N, needs_grads, budget_bytes
            )
            ctx.save_for_backward(dhidden_NH, dweight_VH)
            ctx.hidden_dtype = hidden_NH.dtype
        else:
            lse_N, target_logit_N = _softmax_stats(x_NH, weight_VH, target_N, budget_bytes)
        return torch.where(is_target_N, lse_N - target_logit_N, 0).sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dhidden_NH, dweight_VH = ctx.saved_tensors
        dhidden_NH = None if dhidden_NH is None else (dhidden_NH * grad).to(ctx.hidden_dtype)
        dweight_VH = None if dweight_VH is None else dweight_VH * grad
        return dhidden_NH, dweight_VH, None, None, None, None, None, None


def _softmax_stats(x_nH, weight_VH, target_n, budget_bytes, logits_Vn=None) -> tuple[Tensor, Tensor]:
    """Each row's log-sum-exp and target logit (nan where target is not in [0, V)), both fp32 (n,).

    The products run in x's dtype. The logits are left in logits_Vn if that is given.
    """
    max_n = x_nH.new_full(target_n.shape, -math.inf, dtype=_stats_dtype(x_nH))
    sum_exp_n = torch.zeros_like(max_n)
    target_logit_n = torch.full_like(max_n, math.nan)
    with torch.autocast(x_nH.device.type, enabled=False):
        for columns in _vocab_tiles(x_nH, weight_VH, budget_bytes):
            weight_CH = weight_VH[columns].to(x_nH.dtype)
            out = None if logits_Vn is None else logits_Vn[columns]
            logits_Cn = torch.mm(weight_CH, x_nH.T, out=out)
            has_target_n, target_index = _locate(target_n, columns)
            target_logit_n = torch.where(has_target_n, logits_Cn[target_index], target_logit_n)
            exp_Cn = logits_Cn.to(max_n.dtype, copy=True)
            new_max_n = torch.maximum(max_n, exp_Cn.amax(0))
            exp_Cn.sub_(new_max_n).exp_()
            sum_exp_n = sum_exp_n * (max_n - new_max_n).exp_() + exp_Cn.sum(0)
            max_n = new_max_n
    return max_n + sum_exp_n.log(), target_logit_n


def _softmax_stats_and_grads(x_NH, weight_VH, target_N, scale_N, needs_grads, budget_bytes):
    """_softmax_stats, and gradients of sum(scale * (lse - target_logit)): dhidden fp32, dweight as weight."""
    num_rows, vocab_size, stats_dtype = len(x_NH), len(weight_VH), scale_N.dtype
    needs_dhidden, needs_dweight = needs_grads
    dhidden_NH = torch.zeros_like(x_NH, dtype=stats_dtype) if needs_dhidden else None
    dweight_VH = torch.zeros_like(weight_VH, dtype=stats_dtype) if needs_dweight else None
    if budget_bytes is None:
        budget_bytes = _BUDGET_BYTES_CPU if x_NH.device.type == "cpu" else _BUDGET_BYTES_OTHER
    # At most half of the tokens at once, however few they are: the full logits never exist.
    max_rows = max(min(budget_bytes // (vocab_size * x_NH.dtype.itemsize), (num_rows + 1) // 2), 1)
    num_chunks = max(-(-num_rows // max_rows), 1)
    rows_per_chunk = max(-(-num_rows // num_chunks), 1)
    scratch = x_NH.new_empty(vocab_size * rows_per_chunk)

    stats = []
    for start in range(0, max(num_rows, 1), rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        x_nH, target_n, scale_n = x_NH[rows], target_N[rows], scale_N[rows]
        logits_Vn = scratch[: vocab_size * len(x_nH)].view(vocab_size, len(x_nH))
        lse_n, target_logit_n = _softmax_stats(x_nH, weight_VH, target_n, budget_bytes, logits_Vn)
        stats.append((lse_n, target_logit_n))
        with torch.autocast(x_NH.device.type, enabled=False):
            for columns in _vocab_tiles(x_nH, weight_VH, budget_bytes):
                dlogits_Cn = _dlogits_over(logits_Vn[columns], lse_n, scale_n, *_locate(target_n, columns))
                if needs_dhidden:
                    _add_product(dhidden_NH[rows], dlogits_Cn.T, weight_VH[columns].to(x_NH.dtype))
                if needs_dweight:
                    _add_product(dweight_VH[columns], dlogits_Cn, x_nH)
    del scratch, logits_Vn, dlogits_Cn  # one memory, to be free before dweight is copied to its dtype
    lse_N, target_logit_N = (torch.cat(s) for s in zip(*stats, strict=True))
    return lse_N, target_logit_N, dhidden_NH, dweight_VH.to(weight_VH.dtype) if needs_dweight else None


def _dlogits_over(logits_Cn, lse_n, scale_n, has_target_n, target_index) -> Tensor:
    """(softmax - onehot) * scale, written over the logits, formed in fp32: bf16 loses p - 1 near p = 1."""
    dlogits_Cn = logits_Cn.to(lse_n.dtype).sub_(lse_n).exp_()
    dlogits_Cn[target_index] -= has_target_n.to(lse_n.dtype)
    return logits_Cn.copy_(dlogits_Cn.mul_(scale_n))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; a bf16 product is summed inside in fp32, rounded once, and added to an fp32 total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _locate(target_n: Tensor, columns: slice) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Whether each target is among the columns, and where in the tile [C, n] (anywhere, if it is not).

    So every tile takes the same steps, and nothing asks the device how many targets it has.
    """
    offset_n = target_n - columns.start
    has_target_n = (offset_n >= 0) & (target_n < columns.stop)
    row_n = torch.arange(len(target_n), device=target_n.device)
    return has_target_n, (offset_n.clamp(0, columns.stop - columns.start - 1), row_n)


def _vocab_tiles(x_nH: Tensor, weight_VH: Tensor, budget_bytes: int | None) -> Iterator[slice]:
    """Column ranges whose fp32 logits for these rows make one tile; never the whole vocabulary."""
    vocab_size = len(weight_VH)
    tile_bytes = _TILE_BYTES_CPU if x_nH.device.type == "cpu" else _TILE_BYTES_OTHER
    if budget_bytes is not None:
        tile_bytes = min(tile_bytes, budget_bytes)
    width = min(tile_bytes // (_stats_dtype(x_nH).itemsize * max(len(x_nH), 1)), (vocab_size + 1) // 2)
    width = max(width // 64 * 64, min(width, 64), 1)
    for start in range(0, vocab_size, width):
        yield slice(start, min(start + width, vocab_size))


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
