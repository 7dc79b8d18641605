"""RMSNorm, forward and backward, each in one pass over its rows.

    r = 1 / sqrt(mean(x^2) + eps), one number a row        y = x r w
    g = dy w        dx = r (g - x r mean(g x r))           dw = sum over rows of dy x r

In eager mode this is a chain of operations, each of which reads and writes the rows again. Here forward reads x and
writes y; backward reads dy and x and writes dx. Only r is kept in between. All arithmetic is fp32, rounded once.
dw is summed in fp32 by each program over its rows and then over the programs, in an order that is always the same.

A row is held whole, in two blocks whose sizes are powers of two: 576 = 512 + 64. One block of 1,024 would leave 44 %
of the lanes idle, and several rows a program keep enough loads in flight for rows as short as these.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquila_kernels import reference
from aquila_kernels.choice import pick_kernel

# Shapes (this file): R rows, H hidden size, P programs

# Backward: programs a multiprocessor, each of which leaves one row of partial sums of dw. Registers allow four (H=576).
_PROGRAMS_PER_SM = 4


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, kernel: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2, -1) + eps) * weight, in the dtype that x and weight promote to.

    x (..., H) in fp32, bf16 or fp16, any strides; weight (H,). Neither is written to, and backward may run again.
    kernel: "triton" for the kernels of this file, "torch" for reference.rms_norm, "auto" for the former on a GPU and
    the latter elsewhere. Raises ValueError for other shapes and dtypes.
    """
    if weight.shape != x.shape[-1:] or x.ndim == 0 or len(weight) == 0:
        raise ValueError(
            f"expected x [..., H] and weight [H] with H > 0, got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    if not eps >= 0:
        raise ValueError(f"eps={eps}; use a small positive number.")
    is_torch = pick_kernel(kernel, x.device) == "torch"
    dtypes = (torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if is_torch else []))
    if any(t.dtype not in dtypes for t in (x, weight)):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; use float32, bfloat16 or float16.")
    return reference.rms_norm(x, weight, eps) if is_torch else _rms_norm(x, weight, eps)[0]


def blocks(hidden_size: int) -> dict[str, int]:
    """How a row is split and how many rows a program takes: the constants of a launch."""
    head = 1 << (hidden_size.bit_length() - 1)
    tail = triton.next_power_of_2(hidden_size - head) if hidden_size > head else 0
    rows = max(min(8, 4096 // (head + tail)), 1)
    return {
        "H": hidden_size,
        "HEAD": head,
        "TAIL": tail,
        "ROWS": 1 << (rows.bit_length() - 1),
        "num_warps": 4 if head <= 2048 else 8 if head <= 8192 else 16,
        "enable_fp_fusion": True,  # a product and a sum in one rounding; Triton's default is about to change
    }


# ---- kernels ----


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    y_ptr,
    r_ptr,
    num_rows,
    x_stride,
    eps,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    # int64: rows times columns passes 2^31 at 3.7 million rows of 576
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    has_row = row < num_rows
    head = tl.arange(0, HEAD)
    x_head = tl.load(x_ptr + row[:, None] * x_stride + head[None, :], has_row[:, None], 0.0).to(tl.float32)
    square = tl.sum(x_head * x_head, 1)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        in_tail = has_row[:, None] & (tail < H)[None, :]
        x_tail = tl.load(x_ptr + row[:, None] * x_stride + tail[None, :], in_tail, 0.0).to(tl.float32)
        square += tl.sum(x_tail * x_tail, 1)
    r = tl.rsqrt(square / H + eps)
    tl.store(r_ptr + row, r, has_row)
    w_head = tl.load(weight_ptr + head).to(tl.float32)
    y_head = (x_head * r[:, None] * w_head[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * H + head[None, :], y_head, has_row[:, None])
    if TAIL > 0:
        w_tail = tl.load(weight_ptr + tail, tail < H, 0.0).to(tl.float32)
        y_tail = (x_tail * r[:, None] * w_tail[None, :]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row[:, None] * H + tail[None, :], y_tail, in_tail)


@triton.jit
def _backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    r_ptr,
    dx_ptr,
    dweight_ptr,
    num_rows,
    dy_stride,
    x_stride,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
):
    program = tl.program_id(0)
    head = tl.arange(0, HEAD)
    w_head = tl.load(weight_ptr + head).to(tl.float32)
    dw_head = tl.zeros((HEAD,), tl.float32)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        w_tail = tl.load(weight_ptr + tail, tail < H, 0.0).to(tl.float32)
        dw_tail = tl.zeros((TAIL,), tl.float32)
    for block in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        # the sum is a tensor and `block` may not be one: under the interpreter it is a Python number
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        has_row = row < num_rows
        r = tl.load(r_ptr + row, has_row, 0.0)
        dy_head = tl.load(dy_ptr + row[:, None] * dy_stride + head[None, :], has_row[:, None], 0.0).to(tl.float32)
        n_head = tl.load(x_ptr + row[:, None] * x_stride + head[None, :], has_row[:, None], 0.0).to(tl.float32)
        n_head *= r[:, None]  # the normalised row
        g_head = dy_head * w_head[None, :]
        product = tl.sum(g_head * n_head, 1)
        if NEEDS_DWEIGHT:
            dw_head += tl.sum(dy_head * n_head, 0)
        if TAIL > 0:
            in_tail = has_row[:, None] & (tail < H)[None, :]
            dy_tail = tl.load(dy_ptr + row[:, None] * dy_stride + tail[None, :], in_tail, 0.0).to(tl.float32)
            n_tail = tl.load(x_ptr + row[:, None] * x_stride + tail[None, :], in_tail, 0.0).to(tl.float32)
            n_tail *= r[:, None]
            g_tail = dy_tail * w_tail[None, :]
            product += tl.sum(g_tail * n_tail, 1)
            if NEEDS_DWEIGHT:
                dw_tail += tl.sum(dy_tail * n_tail, 0)
        mean = product / H
        dx_head = r[:, None] * (g_head - n_head * mean[:, None])
        tl.store(dx_ptr + row[:, None] * H + head[None, :], dx_head.to(dx_ptr.dtype.element_ty), has_row[:, None])
        if TAIL > 0:
            dx_tail = r[:, None] * (g_tail - n_tail * mean[:, None])
            tl.store(dx_ptr + row[:, None] * H + tail[None, :], dx_tail.to(dx_ptr.dtype.element_ty), in_tail)
    if NEEDS_DWEIGHT:
        tl.store(dweight_ptr + program * H + head, dw_head)
        if TAIL > 0:
            tl.store(dweight_ptr + program * H + tail, dw_tail, tail < H)


# ---- operators: opaque to torch.compile, with shapes and gradients of their own ----


@torch.library.custom_op("aquila::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and r fp32 (R,)."""
    x_RH = _rows(x)
    num_rows, hidden_size = x_RH.shape
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    r_R = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        launch = blocks(hidden_size)
        grid = (triton.cdiv(num_rows, launch["ROWS"]),)
        _forward[grid](x_RH, weight.contiguous(), y, r_R, num_rows, x_RH.stride(0), eps, **launch)
    return y, r_R


@_rms_norm.register_fake
def _(x, weight, eps):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("aquila::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r_R: Tensor, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dx like x, and dweight like weight; an empty tensor where it is not needed."""
    dy_RH, x_RH = _rows(dy), _rows(x)
    num_rows, hidden_size = x_RH.shape
    launch = blocks(hidden_size)
    num_programs = min(triton.cdiv(num_rows, launch["ROWS"]), _PROGRAMS_PER_SM * _multiprocessors(x.device))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial_PH = torch.empty(num_programs if needs_dweight else 0, hidden_size, dtype=torch.float32, device=x.device)
    if num_rows:
        strides = (dy_RH.stride(0), x_RH.stride(0))
        _backward[(num_programs,)](
            dy_RH,
            x_RH,
            weight.contiguous(),
            r_R,
            dx,
            partial_PH,
            num_rows,
            *strides,
            NEEDS_DWEIGHT=needs_dweight,
            **launch,
        )
    return dx, partial_PH.sum(0).to(weight.dtype) if needs_dweight else weight.new_empty(0)


@_rms_norm_backward.register_fake
def _(dy, x, weight, r_R, needs_dweight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if needs_dweight else 0)


def _keep(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx, dy, _):
    x, weight, r_R = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy, x, weight, r_R, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None


_rms_norm.register_autograd(_gradients, setup_context=_keep)


def _rows(x: Tensor) -> Tensor:
    """(R, H) with adjacent columns; a copy only where the strides ask for one."""
    x_RH = x.reshape(-1, x.shape[-1])
    return x_RH if x_RH.stride(1) == 1 else x_RH.contiguous()


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
