"""Cross entropy of a language-model head, without ever holding the [tokens, vocabulary] logits in fp32.

    loss = cross_entropy(hidden @ weight.T, target)

With N tokens, hidden size H and vocabulary V the logits are by far the largest tensor of a small model's step
(N=2048, V=151851: 1.2 GB in fp32, and the plain loss keeps several of that size). Here the logits of some tokens exist
at a time, as many as a budget of memory holds, and the gradients are formed while they do.

Forward keeps dhidden and dweight, and backward multiplies them by the upstream gradient, into new tensors where that
changes anything. So a loss
computed with gradients enabled costs its backward at once: evaluate under torch.no_grad, which needs no more than the
logits. The per-token losses of reduction="none" have an upstream gradient each, which only backward knows: there the
logits are computed twice, four products instead of three, and no gradient is held in between.

linear_cross_entropy_torch.py computes it on any device, linear_cross_entropy_triton.py on a GPU; what they take and
give is the same. Time and memory: kernels/bench/results/.
"""

import torch
from torch import Tensor

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
    hidden.dtype. A CPU without bf16 products runs them in fp32, and rounds nothing to bf16 in between. Softmax, loss,
    and the sums of dweight are in fp32. memory_budget_bytes bounds the memory for logits, down to one of them
    (default 320 MiB on CPU, 1 GiB in plain torch elsewhere; 2 GiB, and at least 4,096 tokens, in Triton). Besides it,
    gradients are held from forward to backward: dhidden and dweight in fp32, which backward rounds to their inputs'
    dtypes; a frozen hidden or weight costs neither time nor memory. No input is written to, backward may run again
    (retain_graph; torch refuses it where a gradient from autograd.grad was written to, which on a CPU may be the one
    that is kept), and token_weights get no gradient. Reverse mode, once: a gradient of the gradient is refused,
    torch.func.grad is not supported, and torch.func.jvp sees a constant.

    A target that is neither in [0, V) nor ignore_index raises ValueError on a CPU, and with check_targets=True, which
    waits for the device; else nothing waits for it and the loss is nan. On a CPU only tokens that have a target are
    computed. kernel: "auto" is Triton's where there is a GPU for it, plain torch elsewhere; see choice.py.
    """
    _check_tensors(hidden, weight, target)
    check_options(target, len(hidden), ignore_index, reduction, label_smoothing, z_loss)
    if isinstance(token_weights, Tensor) and token_weights.requires_grad:
        raise ValueError("token_weights get no gradient here; multiply the losses of reduction='none', or detach them.")
    if memory_budget_bytes is not None and not (type(memory_budget_bytes) is int and memory_budget_bytes >= 1):
        raise ValueError(
            f"memory_budget_bytes={memory_budget_bytes!r}; use an integer from 1 on, or None for the default."
        )
    kernel = pick_kernel(kernel, hidden.device)
    compute_dtype = _pick_compute_dtype(hidden, compute_dtype, kernel)
    terms = (ignore_index, float(label_smoothing), float(z_loss))
    how = (check_targets, compute_dtype, memory_budget_bytes, kernel)
    is_target_N = target != ignore_index
    weight_N = token_weights_or_ones(token_weights, is_target_N).to(torch.promote_types(compute_dtype, torch.float32))
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


def _check_tensors(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H] with V > 0, got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if not hidden.device == weight.device == target.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device} and target on {target.device}; "
            "they have to be on one device (an offloaded weight is on none: load it first)."
        )
    for name, given in (("hidden", hidden), ("weight", weight)):
        if given.dtype not in (torch.bfloat16, torch.float32, torch.float64):
            # fp16: the gradient of a logit, p / num_items, is often below its smallest number.
            raise ValueError(f"{name} is {given.dtype}; use float32 or bfloat16.")
        if hasattr(given, "full_tensor"):  # a DTensor: a part would be taken for the whole
            raise ValueError(
                f"{name} is sharded over processes (DTensor); gather it first, as FSDP does for a forward."
            )


def _pick_compute_dtype(hidden: Tensor, compute_dtype: torch.dtype | None, kernel: str) -> torch.dtype:
    if compute_dtype is None:
        device_type = hidden.device.type
        # Autocast leaves fp64 alone, and so do we.
        has_autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
        follows_autocast = has_autocast and hidden.dtype != torch.float64
        compute_dtype = torch.get_autocast_dtype(device_type) if follows_autocast else hidden.dtype
    if compute_dtype not in (torch.bfloat16, torch.float32, torch.float64):
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
    compute_dtype: torch.dtype,
    budget_bytes: int | None,
    kernel: str,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(weight x loss) / items, and its gradients in fp32, which upstream = weight / items scales; an empty tensor
    where one is not needed."""
    terms, needs = Terms(ignore_index, label_smoothing, z_loss), (needs_dhidden, needs_dweight)
    path, rows, x_NH = _begin(hidden, weight, target, terms, check_targets, compute_dtype, kernel)
    target_N, weight_N, upstream_N = _of_rows(rows, target, weight_N, upstream_N)
    dhidden_NH = dweight_VH = None
    with torch.autocast(hidden.device.type, enabled=False):
        if any(needs):
            loss_N, dhidden_NH, dweight_VH = path.losses_and_gradients(
                x_NH, weight, target_N, upstream_N, terms, needs, budget_bytes
            )
        else:
            loss_N, _, _ = path.losses(x_NH, weight, target_N, terms, budget_bytes)
    loss = torch.where(target_N == ignore_index, 0, loss_N * weight_N).sum() / items
    dhidden = _of_all_rows(dhidden_NH, rows, hidden, loss.dtype)
    return loss, dhidden, _or_empty(dweight_VH, weight, loss.dtype)


@_reduced.register_fake
def _(hidden, weight, target, weight_N, upstream_N, items, i, s, z, c, compute_dtype, b, k, *needs):
    stats = torch.promote_types(compute_dtype, torch.float32)
    return hidden.new_empty((), dtype=stats), *_like((hidden, weight), needs, dtype=stats)


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.dtypes, ctx.needs = [t.dtype for t in inputs[:2]], inputs[-2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx, upstream, *_):
    if torch.is_grad_enabled():  # create_graph: the gradients that were kept do not know what they depend on
        raise RuntimeError(
            "linear_cross_entropy's gradient has no gradient of its own; leave create_graph=True out, or use plain "
            "logits and F.cross_entropy"
        )
    kept = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    return *(_scaled(g, upstream, dtype) if needed and upstream is not None else None for g, dtype, needed in kept), *(
        [None] * 13
    )


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient x upstream, rounded to dtype once; the kept tensor itself where a CPU sees that to be the same.

    A caller has it so by num_items instead of a division of the loss. Elsewhere to look would be to wait. Into .grad
    autograd adds, or it copies what is kept for another backward.
    """
    functorch = torch._C._functorch  # of the two kinds of vmap
    is_mapped = functorch.is_functorch_wrapped_tensor(upstream) or functorch.is_legacy_batchedtensor(upstream)
    is_plain = type(upstream) is Tensor and not is_mapped
    looks = upstream.device.type == "cpu" and is_plain  # what is traced or mapped has no one value to look at
    if looks and gradient.dtype == dtype and upstream == 1:
        return gradient
    if gradient.dtype == dtype or torch.compiler.is_compiling():  # a compiled product has no tensor in between
        return (gradient * upstream).to(dtype)
    scaled = torch.empty_like(gradient, dtype=dtype)
    # in parts: on a CPU a product whose result has another dtype takes a copy of it in fp32
    for part, scaled_part in zip(gradient.chunk(16), scaled.chunk(16), strict=True):
        torch.mul(part, upstream, out=scaled_part)
    return scaled


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
    compute_dtype: torch.dtype,
    budget_bytes: int | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, 0 without a target, and the offset and scale that its gradient needs; fp32 (N,)."""
    terms = Terms(ignore_index, label_smoothing, z_loss)
    path, rows, x_NH = _begin(hidden, weight, target, terms, check_targets, compute_dtype, kernel)
    (target_N,) = _of_rows(rows, target)
    with torch.autocast(hidden.device.type, enabled=False):
        of_rows = path.losses(x_NH, weight, target_N, terms, budget_bytes)
    return tuple(_of_all_rows(t, rows, target, t.dtype) for t in of_rows)


@_per_token.register_fake
def _(hidden, weight, target, i, s, z, c, compute_dtype, b, k):
    stats = torch.promote_types(compute_dtype, torch.float32)
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
    compute_dtype: torch.dtype,
    budget_bytes: int | None,
    kernel: str,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dhidden like hidden and dweight like weight; an empty tensor where one is not needed."""
    terms, needs = Terms(ignore_index, label_smoothing, z_loss), (needs_dhidden, needs_dweight)
    path, rows, x_NH = _begin(hidden, weight, target, terms, False, compute_dtype, kernel)
    target_N, *stats, upstream_N = _of_rows(rows, target, offset_N, scale_N, upstream_N)
    upstream_N = torch.where(target_N == ignore_index, 0, upstream_N)
    with torch.autocast(hidden.device.type, enabled=False):
        dhidden_NH, dweight_VH = path.gradients(x_NH, weight, target_N, *stats, upstream_N, terms, needs, budget_bytes)
    dhidden = _of_all_rows(dhidden_NH, rows, hidden, hidden.dtype)
    return dhidden, _or_empty(dweight_VH, weight, weight.dtype)


@_per_token_backward.register_fake
def _(upstream_N, hidden, weight, target, o, r, i, s, z, compute_dtype, b, k, *needs):
    return _like((hidden, weight), needs)


def _keep_stats(ctx, inputs, output) -> None:
    hidden, weight, target, *terms, _, compute_dtype, budget_bytes, kernel = inputs
    ctx.given = (*terms, compute_dtype, budget_bytes, kernel)
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


def _begin(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    terms: Terms,
    check_targets: bool,
    compute_dtype: torch.dtype,
    kernel: str,
):
    """The module that computes, which rows (on a CPU those with a target, elsewhere all: None), and those of hidden in
    the dtype of the products."""
    if check_targets or target.device.type == "cpu":
        refuse_targets_outside(target, len(weight), terms.ignore_index)
    if kernel == "torch":
        path = linear_cross_entropy_torch
    else:
        from aquila_kernels import linear_cross_entropy_triton as path  # Triton is not everywhere
    rows = None
    if hidden.device.type == "cpu":  # elsewhere, to know the rows is to wait for the device
        is_target = target != terms.ignore_index
        rows = None if is_target.all() else is_target.nonzero().squeeze(1)
    (x_NH,) = _of_rows(rows, hidden)
    return path, rows, x_NH.to(path.products_in(compute_dtype, hidden.device))


def _of_rows(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() if rows is None else t.index_select(0, rows) for t in tensors]


def _of_all_rows(of_rows: Tensor | None, rows: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """As many rows as `like` has, 0 where there is no target; an empty tensor for None."""
    if of_rows is None or rows is None:
        return _or_empty(of_rows, like, dtype)
    return like.new_zeros(like.shape, dtype=dtype).index_copy_(0, rows, of_rows.to(dtype))


def _or_empty(gradient: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype)


def _like(tensors: tuple[Tensor, Tensor], needs: tuple[bool, bool], dtype: torch.dtype | None = None) -> tuple:
    """What a fake operator gives for two gradients."""
    return tuple(t.new_empty(t.shape if n else 0, dtype=dtype or t.dtype) for t, n in zip(tensors, needs, strict=True))
