"""Cross entropy of logits that exist: forward reads them once, backward reads them once and writes their gradient.

    S = sum over columns of exp(z - c)        lse = c + log S        k = 1 + 2 z_loss lse
    loss = lse - (1 - e) z[target] - e mean(z) + z_loss lse^2                                  e: label smoothing
    dz = g (k / S exp(z - c) - (1 - e) onehot - e / V)                                         g: the row's upstream

Any c gives the same lse; the largest logit is the usual one, but it is known only after a first pass. Here c is the
target's logit, known at once: what lies 87 below it vanishes, as it may, and what lies 40 above it is still far from
overflow. A row where a logit goes further takes that logit as its c from there on, and what it has summed (and written)
is scaled to it. So every row is right whatever its range, and nearly every row is read once.

Besides the sum the same kernel can write exp(z - c) over the logits, for linear_cross_entropy, which owns them: they
are the gradient but for a factor per row, which the products that follow carry.

With an odd vocabulary a row begins at an odd element, from which a GPU cannot load 16 bytes at once. So a row is read
from the multiple of 16 bytes before it, and what lies outside the row is masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquila_kernels import reference
from aquila_kernels.arguments import (
    check_options,
    divisor,
    refuse_targets_outside,
    targets_outside,
    token_weights_or_ones,
)
from aquila_kernels.choice import pick_kernel

# Shapes (this file): N tokens, V vocabulary

_LOG2_E = tl.constexpr(1.4426950408889634)
_HEADROOM = tl.constexpr(40.0)  # its exponential times any vocabulary is far from where fp32 and bf16 end
_ALIGNED = tl.constexpr(8)  # elements: 16 bytes of bf16, 32 of fp32


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    check_targets: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """The loss that reference.cross_entropy defines, in fp32: a scalar, or (N,) for reduction="none".

    logits (N, V) in fp32, bf16 or fp16, any strides; target (N,) int64. Nothing given is written to, and backward may
    run again. num_items, a number or a one-element tensor, is the divisor of "mean" and "sum" in place of their own.
    Without any target "mean" is nan, as in F.cross_entropy, and the gradient 0.

    A target that is neither in [0, V) nor ignore_index raises ValueError on a CPU, and with check_targets=True, which
    waits for the device; else, and under torch.compile, it makes the loss nan. kernel: "triton" for the kernels of this
    file, "torch" for the reference, which takes fp64 too, "auto" for the former on a GPU and the latter elsewhere.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"expected logits [N, V] with V > 0, got {tuple(logits.shape)}.")
    if not logits.dtype.is_floating_point:
        raise ValueError(f"logits are {logits.dtype}; use float32, bfloat16 or float16.")
    check_options(target, len(logits), ignore_index, reduction, label_smoothing, z_loss)
    vocab_size = logits.shape[1]
    if (check_targets or target.device.type == "cpu") and not torch.compiler.is_compiling():
        refuse_targets_outside(target, vocab_size, ignore_index)
    is_target_N = target != ignore_index
    if pick_kernel(kernel, logits.device) == "torch":
        # on a GPU an index outside ends the process: such a target is left out, and its loss nan
        is_wrong_N = targets_outside(target, vocab_size, ignore_index)
        loss_N = reference.cross_entropy(
            logits,
            torch.where(is_wrong_N, ignore_index, target),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        ).masked_fill(is_wrong_N, torch.nan)
    elif logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}; use float32, bfloat16 or float16.")
    else:
        loss_N, _, _ = _cross_entropy(logits, target, ignore_index, label_smoothing, z_loss)
    weight_N = token_weights_or_ones(token_weights, is_target_N).to(loss_N.dtype)
    loss_N = torch.where(is_target_N, loss_N * weight_N, 0)
    return loss_N if reduction == "none" else loss_N.sum() / divisor(reduction, num_items, weight_N)


def launch(dtype: torch.dtype) -> dict[str, int]:
    """The constants of a launch over logits of this dtype."""
    return {
        # 8 KiB of columns at a time in 8 warps: 64 registers in bf16, so four programs a multiprocessor; twice that
        # spills registers in fp32 (sm_80)
        "BLOCK": 8192 // dtype.itemsize,
        "num_warps": 8,
        "enable_fp_fusion": True,  # a product and a sum in one rounding; Triton's default is about to change
    }


# ---- kernels ----


@triton.jit
def _softmax_rows(
    logits_ptr,
    target_ptr,
    target_logit_ptr,
    loss_ptr,
    offset_ptr,
    scale_ptr,
    num_columns,
    stride,
    ignore_index,
    label_smoothing,
    z_loss,
    HAS_TARGET_LOGIT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WRITE_EXP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row: its loss, its c (offset) and k / S (scale). WRITE_EXP: exp(z - c) over z, with the target's entry such
    that scale x entry is the whole gradient there but for e / V; 0 from the last column to the stride."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    # int64: rows times columns passes 2^31 at 14,142 rows of 151,851
    shift = ((row * stride) % _ALIGNED).to(tl.int32)
    z_ptr = logits_ptr + tl.multiple_of(row * stride - shift, _ALIGNED)
    end = shift + num_columns
    lane = tl.arange(0, BLOCK)
    if target == ignore_index:
        if WRITE_EXP:
            for at in range(0, stride, BLOCK):
                tl.store(z_ptr + at + lane, tl.zeros((BLOCK,), z_ptr.dtype.element_ty), at + lane < stride)
        tl.store(loss_ptr + row, 0.0)
        tl.store(offset_ptr + row, 0.0)
        tl.store(scale_ptr + row, 0.0)
        return

    in_row = (target >= 0) & (target < num_columns)
    place = tl.where(in_row, target, -1 - _ALIGNED).to(tl.int32) + shift  # the target's column, from the aligned start
    if HAS_TARGET_LOGIT:
        target_logit = tl.load(target_logit_ptr + row)
    else:
        target_logit = tl.load(z_ptr + place, in_row, float("nan")).to(tl.float32)
    offset = target_logit
    total = tl.zeros((BLOCK,), tl.float32)
    difference = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, end, BLOCK):
        column = at + lane
        is_whole = (at >= shift) & (at + BLOCK <= end)
        in_columns = (column >= shift) & (column < end)
        if is_whole:  # without a mask, hence 16 bytes at once
            z = tl.load(z_ptr + column).to(tl.float32)
        else:
            z = tl.load(z_ptr + column, in_columns, float("-inf")).to(tl.float32)
        if HAS_TARGET_LOGIT:  # the logit before it was rounded to the logits' dtype
            z = tl.where(column == place, target_logit, z)
        if SMOOTHING:
            difference += tl.where(in_columns, z - target_logit, 0.0)
        top = tl.max(z, 0)
        if top - offset > _HEADROOM:
            factor = tl.exp2((offset - top) * _LOG2_E)
            total *= factor
            if WRITE_EXP:
                tl.debug_barrier()
                for back in range(0, at, BLOCK):
                    written = tl.load(z_ptr + back + lane).to(tl.float32) * factor
                    tl.store(z_ptr + back + lane, written.to(z_ptr.dtype.element_ty))
            offset = top
        # nothing but -inf so far: their exponential is 0, not that of -inf + inf
        exp = tl.exp2((z - tl.where(offset == float("-inf"), 0.0, offset)) * _LOG2_E)
        total += exp
        if WRITE_EXP:
            if is_whole:
                tl.store(z_ptr + column, exp.to(z_ptr.dtype.element_ty))
            else:
                tl.store(z_ptr + column, exp.to(z_ptr.dtype.element_ty), column < stride)

    sum_exp = tl.sum(total, 0)
    lse = tl.log(sum_exp) + offset
    nll = tl.log(sum_exp) + (offset - target_logit)  # not from lse, which is rounded where logits are large
    # where: the square of 1e30 is infinite, and 0 times that nan
    loss = nll + tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse)
    if SMOOTHING:
        loss -= label_smoothing * tl.sum(difference, 0) / num_columns
    k = 1.0 + tl.where(z_loss == 0.0, 0.0, 2.0 * z_loss * lse)
    k = tl.where(tl.abs(k) < 1e-6, 1e-6, k)  # it divides; what p loses so is less than fp32 can tell from 1 - p
    tl.store(loss_ptr + row, loss)
    tl.store(offset_ptr + row, offset)
    tl.store(scale_ptr + row, k / sum_exp)
    if WRITE_EXP:
        # p - 1 is formed here in fp32: from a bf16 p near 1 it would be nothing but rounding
        entry = tl.exp2((target_logit - offset) * _LOG2_E) - (1.0 - label_smoothing) * sum_exp / k
        tl.debug_barrier()
        tl.store(z_ptr + place, entry.to(z_ptr.dtype.element_ty), in_row)


@triton.jit
def _gradient_rows(
    logits_ptr,
    target_ptr,
    target_logit_ptr,
    offset_ptr,
    scale_ptr,
    upstream_ptr,
    dlogits_ptr,
    num_columns,
    stride,
    ignore_index,
    label_smoothing,
    HAS_TARGET_LOGIT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of dz; dlogits may be the logits. Both have the same stride, and 0 is written where there is no target."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    shift = ((row * stride) % _ALIGNED).to(tl.int32)
    first = tl.multiple_of(row * stride - shift, _ALIGNED)
    end = shift + num_columns
    lane = tl.arange(0, BLOCK)
    is_target = target != ignore_index
    in_row = (target >= 0) & (target < num_columns)
    place = tl.where(in_row, target, -1 - _ALIGNED).to(tl.int32) + shift
    offset = tl.load(offset_ptr + row)
    scale = tl.load(scale_ptr + row)
    upstream = tl.load(upstream_ptr + row)
    target_logit = 0.0
    if HAS_TARGET_LOGIT:
        target_logit = tl.load(target_logit_ptr + row)
    for at in range(0, end, BLOCK):
        column = at + lane
        is_whole = (at >= shift) & (at + BLOCK <= end)
        in_columns = (column >= shift) & (column < end)
        if is_whole:
            z = tl.load(logits_ptr + first + column).to(tl.float32)
        else:
            z = tl.load(logits_ptr + first + column, in_columns, float("-inf")).to(tl.float32)
        at_target = column == place
        if HAS_TARGET_LOGIT:
            z = tl.where(at_target, target_logit, z)
        dz = scale * tl.exp2((z - offset) * _LOG2_E) - tl.where(at_target, 1.0 - label_smoothing, 0.0)
        if SMOOTHING:
            dz -= label_smoothing / num_columns
        dz = tl.where(is_target, dz * upstream, 0.0).to(dlogits_ptr.dtype.element_ty)
        if is_whole:
            tl.store(dlogits_ptr + first + column, dz)
        else:
            tl.store(dlogits_ptr + first + column, dz, in_columns)


# ---- launches ----


def softmax_rows(
    logits_NV: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    target_logit_N: Tensor | None = None,
    write_exp: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss, offset and scale, fp32 (N,); columns of logits adjacent.

    target_logit_N replaces the target's logit by one in fp32. write_exp: see the kernel; the logits' row stride is
    then a multiple of 8 elements, and the columns up to it are ours to write.
    """
    loss_N, offset_N, scale_N = three_numbers_a_token(logits_NV, len(target_N))
    if len(target_N):
        _softmax_rows[(len(target_N),)](
            logits_NV,
            target_N,
            target_logit_N,
            loss_N,
            offset_N,
            scale_N,
            logits_NV.shape[1],
            logits_NV.stride(0),
            ignore_index,
            float(label_smoothing),
            float(z_loss),
            HAS_TARGET_LOGIT=target_logit_N is not None,
            SMOOTHING=label_smoothing != 0,
            WRITE_EXP=write_exp,
            **launch(logits_NV.dtype),
        )
    return loss_N, offset_N, scale_N


def three_numbers_a_token(like: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised fp32 (N,): a loss, an offset and a scale."""
    return tuple(torch.empty(num_tokens, dtype=torch.float32, device=like.device) for _ in range(3))


def gradient_rows(
    logits_NV: Tensor,
    target_N: Tensor,
    offset_N: Tensor,
    scale_N: Tensor,
    upstream_N: Tensor,
    dlogits_NV: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    target_logit_N: Tensor | None = None,
) -> None:
    """The gradient of sum(upstream x loss), written to dlogits, whose row stride is that of the logits."""
    if len(target_N):
        _gradient_rows[(len(target_N),)](
            logits_NV,
            target_N,
            target_logit_N,
            offset_N,
            scale_N,
            upstream_N,
            dlogits_NV,
            logits_NV.shape[1],
            logits_NV.stride(0),
            ignore_index,
            float(label_smoothing),
            HAS_TARGET_LOGIT=target_logit_N is not None,
            SMOOTHING=label_smoothing != 0,
            **launch(logits_NV.dtype),
        )


# ---- operators: opaque to torch.compile, with shapes and gradients of their own ----


@torch.library.custom_op("aquila::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, and the offset and scale that its gradient needs; fp32 (N,)."""
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    return softmax_rows(_with_adjacent_columns(logits), target.contiguous(), **options)


@_cross_entropy.register_fake
def _(logits, target, ignore_index, label_smoothing, z_loss):
    return three_numbers_a_token(logits, len(target))


@torch.library.custom_op("aquila::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    upstream_N: Tensor,
    logits: Tensor,
    target: Tensor,
    offset_N: Tensor,
    scale_N: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """dlogits, like logits."""
    logits = _with_adjacent_columns(logits)
    dlogits = _empty_beside(logits)
    gradient_rows(
        logits,
        target.contiguous(),
        offset_N,
        scale_N,
        upstream_N.contiguous(),
        dlogits,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return dlogits


@_cross_entropy_backward.register_fake
def _(upstream_N, logits, target, offset_N, scale_N, ignore_index, label_smoothing):
    return _empty_beside(_with_adjacent_columns(logits))


def _keep(ctx, inputs, output) -> None:
    logits, target, ctx.ignore_index, ctx.label_smoothing, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, *output[1:])


def _gradients(ctx, upstream_N, *_):
    logits, target, offset_N, scale_N = ctx.saved_tensors
    if upstream_N is None:
        return None, None, None, None, None
    given = (ctx.ignore_index, ctx.label_smoothing)
    return _cross_entropy_backward(upstream_N, logits, target, offset_N, scale_N, *given), None, None, None, None


_cross_entropy.register_autograd(_gradients, setup_context=_keep)


def _with_adjacent_columns(logits: Tensor) -> Tensor:
    """The logits, or a copy where columns are not adjacent or rows overlap."""
    is_plain = logits.stride(1) == 1 and (logits.stride(0) >= logits.shape[1] or len(logits) == 1)
    return logits if is_plain else logits.contiguous()


def _empty_beside(logits: Tensor) -> Tensor:
    """Of the same shape and row stride: one shift serves both."""
    return logits.new_empty_strided(logits.shape, (max(logits.stride(0), logits.shape[1]), 1))
