"""The loss of linear_cross_entropy on a GPU: a library product makes logits, one pass makes them exponentials.

    for each n tokens x:
        E = x @ W.T                             library product; bf16 logits, rows padded to 16 columns
        E = exp(E - c), S = sum                 cross_entropy's kernel: one read, one write, over the logits
        r = upstream k / S                      one number a token
        dx = r * (E @ W)                        library product, summed in fp32
        dW += E.T @ (r * x)                     library product, summed in fp32 over all chunks

At H = 576 storing a logit and loading it again costs less than computing it twice; it would not below some 370 (an
estimate: 4 bytes at 4.3 TB/s against 2 H operations at 790 TFLOP/s). The element-wise work is that one pass.

The target's own logit is computed once more, in fp32: the loss and p - 1 then do not see a rounded one.

The vocabulary may be odd, and a row of logits would then begin anywhere. So W is padded with rows of zeros to a
multiple of 16 where it is not one already: a copy that only a W in the products' dtype would not have cost anyway. What
the padded columns hold meets zeros in E @ W, and their rows of dW are left out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquila_kernels.arguments import Terms, empty_gradients
from aquila_kernels.cross_entropy import gradient_rows, softmax_rows, three_numbers_a_token

# Shapes (this file): N tokens, n of them whose logits exist at once, H hidden size, V vocabulary, P padded vocabulary

_PAD = 16  # columns: 16 bytes and more in any dtype, and what Triton takes as "divisible"
_BUDGET_BYTES = 2 * 2**30
_MIN_ROWS = 4096  # of a chunk, if memory is not limited: each chunk streams W and dW once more
_ROW_MULTIPLE = 128  # the side of a product's tile

_TARGET_LAUNCH = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}


def products_in(asked: torch.dtype, device: torch.device) -> torch.dtype:
    return asked


def losses(
    x_NH: Tensor, weight_VH: Tensor, target_N: Tensor, terms: Terms, budget_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, and the offset and scale of its softmax: p = scale / k exp(z - offset). fp32 (N,)."""
    weight_PH = _padded(weight_VH, x_NH.dtype)
    loss_N, offset_N, scale_N = three_numbers_a_token(x_NH, len(x_NH))
    for rows, logits_nP in _chunks(x_NH, weight_PH, budget_bytes):
        loss_N[rows], offset_N[rows], scale_N[rows] = softmax_rows(
            logits_nP[:, : len(weight_VH)],
            target_N[rows],
            target_logit_N=_target_logits(x_NH[rows], weight_PH, target_N[rows], len(weight_VH)),
            **terms._asdict(),
        )
    return loss_N, offset_N, scale_N


def gradients(
    x_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    offset_N: Tensor,
    scale_N: Tensor,
    upstream_N: Tensor,
    terms: Terms,
    needs: tuple[bool, bool],
    budget_bytes: int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden and dweight of sum(upstream x loss), fp32, where needed; the logits are computed again."""
    vocab_size, weight_PH = len(weight_VH), _padded(weight_VH, x_NH.dtype)
    dhidden_NH, dweight_PH = empty_gradients(x_NH, weight_PH, needs)
    for rows, logits_nP in _chunks(x_NH, weight_PH, budget_bytes):
        gradient_rows(
            logits_nP[:, :vocab_size],
            target_N[rows],
            offset_N[rows],
            scale_N[rows],
            upstream_N[rows],
            logits_nP[:, :vocab_size],
            ignore_index=terms.ignore_index,
            label_smoothing=terms.label_smoothing,
            target_logit_N=_target_logits(x_NH[rows], weight_PH, target_N[rows], vocab_size),
        )
        if dhidden_NH is not None:
            _product(dhidden_NH[rows], logits_nP, weight_PH)
        if dweight_PH is not None:
            _product(dweight_PH, logits_nP.T, x_NH[rows], add=rows.start > 0)
    return dhidden_NH, None if dweight_PH is None else dweight_PH[:vocab_size]


def losses_and_gradients(
    x_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    upstream_N: Tensor,
    terms: Terms,
    needs: tuple[bool, bool],
    budget_bytes: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each token's loss, and dhidden and dweight of sum(upstream x loss); all fp32."""
    vocab_size, weight_PH = len(weight_VH), _padded(weight_VH, x_NH.dtype)
    dhidden_NH, dweight_PH = empty_gradients(x_NH, weight_PH, needs)
    loss_N = torch.empty(len(x_NH), dtype=torch.float32, device=x_NH.device)
    for rows, exp_nP in _chunks(x_NH, weight_PH, budget_bytes):
        x_nH, target_n = x_NH[rows], target_N[rows]
        loss_N[rows], _, scale_n = softmax_rows(
            exp_nP[:, :vocab_size],
            target_n,
            target_logit_N=_target_logits(x_nH, weight_PH, target_n, vocab_size),
            write_exp=True,
            **terms._asdict(),
        )
        row_scale_n1 = (upstream_N[rows] * scale_n)[:, None]
        if dhidden_NH is not None:
            _product(dhidden_NH[rows], exp_nP, weight_PH)
            dhidden_NH[rows] *= row_scale_n1
        if dweight_PH is not None:
            _product(dweight_PH, exp_nP.T, (x_nH * row_scale_n1).to(x_nH.dtype), add=rows.start > 0)
    dweight_VH = None if dweight_PH is None else dweight_PH[:vocab_size]
    if terms.label_smoothing and len(x_NH):
        # - e / V for every column: a product of rank one, with the sum of W and with the sum of x
        share_N1 = (upstream_N * (target_N != terms.ignore_index) * (terms.label_smoothing / vocab_size))[:, None]
        if dhidden_NH is not None:
            dhidden_NH -= share_N1 * weight_VH.sum(0, dtype=torch.float32)
        if dweight_VH is not None:
            dweight_VH -= (share_N1 * x_NH).sum(0)
    return loss_N, dhidden_NH, dweight_VH


def _chunks(x_NH: Tensor, weight_PH: Tensor, budget_bytes: int | None):
    """Row ranges and their logits [n, P], each in the memory of the one before."""
    num_rows, row_bytes = len(x_NH), len(weight_PH) * x_NH.element_size()
    max_rows = max(rows_within(budget_bytes, row_bytes), 1)
    num_chunks = -(-num_rows // max_rows)
    if num_chunks == 0:
        return
    rows_per_chunk = -(-num_rows // num_chunks)
    if max_rows >= _ROW_MULTIPLE:
        rows_per_chunk = -(-rows_per_chunk // _ROW_MULTIPLE) * _ROW_MULTIPLE
    logits_nP = x_NH.new_empty(min(rows_per_chunk, num_rows), len(weight_PH))
    for start in range(0, num_rows, rows_per_chunk):
        x_nH = x_NH[start : start + rows_per_chunk]
        torch.mm(x_nH, weight_PH.T, out=logits_nP[: len(x_nH)])
        yield slice(start, start + len(x_nH)), logits_nP[: len(x_nH)]


def rows_within(budget_bytes: int | None, row_bytes: int) -> int:
    """Rows of logits that fit the budget; of the default at least _MIN_ROWS. A multiple of 128 where that many fit."""
    if budget_bytes is None:
        budget_bytes = max(_BUDGET_BYTES, _MIN_ROWS * row_bytes)
    rows = budget_bytes // row_bytes
    return rows // _ROW_MULTIPLE * _ROW_MULTIPLE if rows >= _ROW_MULTIPLE else rows


def _padded(weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the products' dtype with rows of zeros to a multiple of _PAD; itself where it is that already."""
    vocab_size, hidden_size = weight_VH.shape
    if vocab_size % _PAD == 0:
        return weight_VH.to(dtype).contiguous()
    padded_PH = weight_VH.new_empty(-(-vocab_size // _PAD) * _PAD, hidden_size, dtype=dtype)
    padded_PH[:vocab_size] = weight_VH
    padded_PH[vocab_size:] = 0
    return padded_PH


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; out is fp32, and a bf16 product is never rounded on its way there."""
    if a.dtype == torch.float32:
        out.addmm_(a, b, beta=float(add))
    elif not out.is_cuda:  # the interpreter's device has no product from bf16 to fp32
        out.addmm_(a.float(), b.float(), beta=float(add))
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@triton.jit
def _target_logit(x_ptr, weight_ptr, target_ptr, out_ptr, num_columns, x_stride, H: tl.constexpr, BLOCK: tl.constexpr):
    """x . W[target], nan where the target is none."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    in_columns = (target >= 0) & (target < num_columns)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, H, BLOCK):
        h = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + h, h < H, 0.0).to(tl.float32)
        w = tl.load(weight_ptr + target * H + h, (h < H) & in_columns, 0.0).to(tl.float32)
        total += x * w
    tl.store(out_ptr + row, tl.where(in_columns, tl.sum(total, 0), float("nan")))


def _target_logits(x_nH: Tensor, weight_PH: Tensor, target_n: Tensor, vocab_size: int) -> Tensor:
    """fp32 (n,), from the numbers that the products see."""
    out_n = torch.empty(len(x_nH), dtype=torch.float32, device=x_nH.device)
    hidden_size = weight_PH.shape[1]
    _target_logit[(len(x_nH),)](
        x_nH, weight_PH, target_n, out_n, vocab_size, x_nH.stride(0), H=hidden_size, **_TARGET_LAUNCH
    )
    return out_n
