"""Cross entropy of a language-model head, without ever holding the [tokens, vocabulary] logits in fp32.

    loss = cross_entropy(hidden @ weight.T, target)

With N tokens, hidden size H and vocabulary V the logits are by far the largest tensor of a small model's step
(N=2048, V=151851: 1.2 GB in fp32, and the plain loss keeps several of that size). Here the logits of some tokens exist
at a time, as many as a budget of memory holds, and the gradients are formed while they do.

Forward keeps dhidden and dweight, and backward multiplies them by the upstream gradient into new tensors. So a loss
computed with gradients enabled costs its backward at once: evaluate under torch.no_grad, which needs no more than the
logits. The per-token losses of reduction="none" have an upstream gradient each, which only backward knows: there the
logits are computed twice, four products instead of three, and no gradient is held in between.

linear_cross_entropy_torch.py computes it on any device, linear_cross_entropy_triton.py on a GPU; what they take and
give is the same. Time and memory: kernels/bench/results/.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aquila_kernels import linear_cross_entropy_torch
from aquila_kernels.arguments import Terms, check_options, divisor, refuse_targets_outside, token_weights_or_ones
from aquila_kernels.choice import pick_kernel

# Shapes (this file): N tokens, H hidden size, V vocabulary


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    check_targets: bool = False,
    compute_dtype: torch.dtype | None = None,
    memory_budget_bytes: int | None = None,
    kernel: str = "auto",
) -> Tensor:
    """reference.cross_entropy of the logits hidden @ weight.T: an fp32 scalar, or (N,) for reduction="none".

    hidden (N, H) and weight (V, H) in fp32 or bf16, any strides; target (N,) int64. fp64 works in plain torch, in fp64.
    Divisor: num_items if given (a number or a one-element tensor, for example the targets of all micro-batches and
    ranks), else the targets' number, or the sum of their token_weights (N,), for "mean", and 1 for "sum". Without any
    target "sum" is 0 and "mean" is 0/0 = nan, as in F.cross_entropy; gradients are 0 in both.

    compute_dtype is what the matrix products run in; by default autocast's dtype where autocast is on, else
    hidden.dtype. Softmax, loss, and the sums of dweight are in fp32. memory_budget_bytes bounds the memory for logits,
    down to those of one token (default 320 MiB on CPU, 1 GiB in plain torch elsewhere; 2 GiB, and at least 4,096
    tokens, in Triton). Besides it, gradients are held from forward to backward: dhidden in fp32, and dweight, summed
    in fp32 and then rounded to weight.dtype; a frozen hidden or weight costs neither time nor memory. No input is
    written to, backward may run again (retain_graph), and token_weights get no gradient. Reverse mode, once: a gradient
    of the gradient is refused, and torch.func.jvp sees a constant.

    A target that is neither in [0, V) nor ignore_index raises ValueError on a CPU, and with check_targets=True, which
    waits for the device; else nothing waits for it and the loss is nan. On a CPU only tokens that have a target are
    computed. kernel: "auto" is Triton's where there is a GPU for it, plain torch elsewhere; see choice.py.
    """
    _check_shapes(hidden, weight)
    check_options(target, len(hidden), reduction, label_smoothing, z_loss)
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights get no gradient here; multiply the losses of reduction='none', or detach them.")
    if memory_budget_bytes is not None and memory_budget_bytes < 1:
        raise ValueError(f"memory_budget_bytes={memory_budget_bytes}; use at least 1, or None for the default.")
    kernel = pick_kernel(kernel, hidden.device)
    products_in = _pick_compute_dtype(hidden, compute_dtype, kernel)
    terms = (ignore_index, float(label_smoothing), float(z_loss))
    how = (check_targets, products_in, memory_budget_bytes, kernel)
    is_target_N = target != ignore_index
    weight_N = token_weights_or_ones(token_weights, is_target_N).to(torch.promote_types(products_in, torch.float32))
    if reduction == "none":
        loss_N, _, _ = _per_token(hidden, weight, target, *terms, *how)
        return torch.where(is_target_N, loss_N * weight_N, 0)
    items = divisor(reduction, num_items, weight_N)
    needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    # where, not a quotient alone: without any target items is 0, and 0 / 0 nan
    upstream_N = torch.where(is_target_N, weight_N / items, 0)
    loss, _, _ = _reduced(hidden, weight, target, weight_N, upstream_N, items, *terms, *how, *needs)
    return loss


@torch.no_grad()
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    check_targets: bool = False,
    compute_dtype: torch.dtype | None = None,
    memory_budget_bytes: int | None = None,
    kernel: str = "auto",
) -> Tensor:
    """log softmax(hidden @ weight.T)[target] for each token, fp32 (N,); 0 where target is ignore_index.

    For evaluation: no gradient. Arguments, memory and errors are those of linear_cross_entropy.
    """
    return -linear_cross_entropy(
        hidden,
        weight,
        target,
        ignore_index=ignore_index,
        reduction="none",
        check_targets=check_targets,
        compute_dtype=compute_dtype,
        memory_budget_bytes=memory_budget_bytes,
        kernel=kernel,
    )


def _check_shapes(hidden: Tensor, weight: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H] with V > 0, got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    for name, given in (("hidden", hidden), ("weight", weight)):
        if hasattr(given, "full_tensor"):  # a DTensor: a part would be taken for the whole
            raise ValueError(
                f"{name} is sharded over processes (DTensor); gather it first, as FSDP does for a forward."
            )


def _pick_compute_dtype(hidden: Tensor, compute_dtype: torch.dtype | None, kernel: str) -> torch.dtype:
    if compute_dtype is None:
        device_type = hidden.device.type
        # Autocast leaves fp64 alone, and so do we.
        follows_autocast = torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64
        compute_dtype = torch.get_autocast_dtype(device_type) if follows_autocast else hidden.dtype
    if compute_dtype not in (torch.bfloat16, torch.float32, torch.float64):
        # fp16: the gradient of a logit, p / num_items, is often below its smallest number.
        raise ValueError(f"compute_dtype={compute_dtype} is not supported; use bfloat16 or float32.")
    if compute_dtype == torch.float64 and kernel == "triton":
        raise ValueError("float64 has no Triton kernel; use kernel='torch' for it.")
    return compute_dtype


# ---- operators: opaque to torch.compile, with shapes and gradients of their own ----


@torch.library.custom_op("aquila::linear_cross_entropy", mutates_args=())
def _reduced(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    weight_N: Tensor,
    upstream_N: Tensor,
    items: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    check_targets: bool,
    products_in: torch.dtype,
    budget_bytes: int | None,
    kernel: str,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(weight x loss) / items, and its gradients, which upstream = weight / items scales; an empty tensor where
    one is not needed. dhidden fp32, dweight like weight."""
    terms, needs = Terms(ignore_index, label_smoothing, z_loss), (needs_dhidden, needs_dweight)
    path, rows = _begin(hidden, weight, target, terms, check_targets, kernel)
    x_NH, target_N, weight_N, upstream_N = _of_rows(rows, hidden, target, weight_N, upstream_N)
    x_NH = x_NH.to(products_in).contiguous()
    dhidden_NH = dweight_VH = None
    with torch.autocast(hidden.device.type, enabled=False):
        if any(needs):
            loss_N, dhidden_NH, dweight_VH = path.losses_and_gradients(
                x_NH, weight, target_N, upstream_N, terms, needs, budget_bytes
            )
        else:
            loss_N, _, _ = path.losses(x_NH, weight, target_N, terms, budget_bytes)
    loss = torch.where(target_N == ignore_index, 0, loss_N * weight_N).sum() / items
    return loss, *_finished(dhidden_NH, dweight_VH, hidden, weight, rows, loss.dtype)


@_reduced.register_fake
def _(hidden, weight, target, weight_N, upstream_N, items, i, s, z, c, products_in, b, k, needs_dhidden, needs_dweight):
    stats = torch.promote_types(products_in, torch.float32)
    dhidden = hidden.new_empty(hidden.shape if needs_dhidden else 0, dtype=stats)
    return hidden.new_empty((), dtype=stats), dhidden, weight.new_empty(weight.shape if needs_dweight else 0)


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.hidden_dtype, ctx.needs = inputs[0].dtype, inputs[-2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


@once_differentiable  # the gradients that were kept do not know what they depend on
def _scale_gradients(ctx, upstream, *_):
    dhidden_NH, dweight_VH = (
        gradient * upstream if needed and upstream is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return None if dhidden_NH is None else dhidden_NH.to(ctx.hidden_dtype), dweight_VH, *[None] * 13


_reduced.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("aquila::linear_cross_entropy_per_token", mutates_args=())
def _per_token(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    check_targets: bool,
    products_in: torch.dtype,
    budget_bytes: int | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, 0 without a target, and the offset and scale that its gradient needs; fp32 (N,)."""
    terms = Terms(ignore_index, label_smoothing, z_loss)
    path, rows = _begin(hidden, weight, target, terms, check_targets, kernel)
    x_NH, target_N = _of_rows(rows, hidden, target)
    with torch.autocast(hidden.device.type, enabled=False):
        of_rows = path.losses(x_NH.to(products_in).contiguous(), weight, target_N, terms, budget_bytes)
    if rows is None:
        return of_rows
    return tuple(t.new_zeros(len(target)).index_copy_(0, rows, t) for t in of_rows)


@_per_token.register_fake
def _(hidden, weight, target, i, s, z, c, products_in, b, k):
    stats = torch.promote_types(products_in, torch.float32)
    return tuple(hidden.new_empty(target.shape, dtype=stats) for _ in range(3))


@torch.library.custom_op("aquila::linear_cross_entropy_per_token_backward", mutates_args=())
def _per_token_backward(
    upstream_N: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    offset_N: Tensor,
    scale_N: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    products_in: torch.dtype,
    budget_bytes: int | None,
    kernel: str,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dhidden like hidden and dweight like weight; an empty tensor where one is not needed."""
    terms, needs = Terms(ignore_index, label_smoothing, z_loss), (needs_dhidden, needs_dweight)
    path, rows = _begin(hidden, weight, target, terms, False, kernel)
    x_NH, target_N, *stats = _of_rows(rows, hidden, target, offset_N, scale_N, upstream_N)
    stats[-1] = torch.where(target_N == ignore_index, 0, stats[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = path.gradients(
            x_NH.to(products_in).contiguous(), weight, target_N, *stats, terms, needs, budget_bytes
        )
    return _finished(*gradients, hidden, weight, rows, hidden.dtype)


@_per_token_backward.register_fake
def _(upstream_N, hidden, weight, target, o, r, i, s, z, products_in, b, k, needs_dhidden, needs_dweight):
    return tuple(
        t.new_empty(t.shape if needed else 0) for t, needed in ((hidden, needs_dhidden), (weight, needs_dweight))
    )


def _keep_stats(ctx, inputs, output) -> None:
    hidden, weight, target, *terms, _, products_in, budget_bytes, kernel = inputs
    ctx.given = (*terms, products_in, budget_bytes, kernel)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, *output[1:])


def _recompute_gradients(ctx, upstream_N, *_):
    if upstream_N is None:
        return (None,) * 10
    needs = ctx.needs_input_grad[:2]
    gradients = _per_token_backward(upstream_N.contiguous(), *ctx.saved_tensors, *ctx.given, *needs)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 8


_per_token.register_autograd(_recompute_gradients, setup_context=_keep_stats)


# ---- what the operators have in common ----


def _begin(hidden: Tensor, weight: Tensor, target: Tensor, terms: Terms, check_targets: bool, kernel: str):
    """The module that computes, and which rows: on a CPU those with a target, elsewhere all (None)."""
    if check_targets or target.device.type == "cpu":
        refuse_targets_outside(target, len(weight), terms.ignore_index)
    if kernel == "torch":
        path = linear_cross_entropy_torch
    else:
        from aquila_kernels import linear_cross_entropy_triton as path  # Triton is not everywhere
    if hidden.device.type != "cpu":  # to know the rows is to wait for the device
        return path, None
    is_target = target != terms.ignore_index
    return path, None if is_target.all() else is_target.nonzero().squeeze(1)


def _of_rows(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() if rows is None else t.index_select(0, rows) for t in tensors]


def _finished(dhidden_nH, dweight_VH, hidden, weight, rows, dhidden_dtype) -> tuple[Tensor, Tensor]:
    """dhidden of all rows in the dtype asked for and dweight in weight's; an empty tensor for None."""
    if dhidden_nH is None:
        dhidden_NH = hidden.new_empty(0, dtype=dhidden_dtype)
    elif rows is None:
        dhidden_NH = dhidden_nH.to(dhidden_dtype)
    else:
        dhidden_NH = dhidden_nH.new_zeros(hidden.shape, dtype=dhidden_dtype)
        dhidden_NH.index_copy_(0, rows, dhidden_nH.to(dhidden_dtype))
    return dhidden_NH, weight.new_empty(0) if dweight_VH is None else dweight_VH.to(weight.dtype)
