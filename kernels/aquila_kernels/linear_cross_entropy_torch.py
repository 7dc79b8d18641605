"""The loss of linear_cross_entropy in plain torch, for any device: chunks of tokens, tiles of the vocabulary.

    for each n tokens x:
        for each tile c of the vocabulary:  z = W_c @ x.T;  m_c = max of z and of all before
                                            E_c = exp(z - m_c), over z;  s = s exp(m_before - m_c) + sum E_c
        lse = m + log s
        for each tile c of the vocabulary:  g = upstream (k / s exp(m_c - m) E_c - (1 - e) onehot - e / V), over E_c
                                            dx += g.T @ W_c;  dW_c += g @ x  (both summed in fp32)

Three products, one exponential of each logit, and at most n rows of logits at once. E_c is at most 1, and so is
exp(m_c - m): nothing overflows, and what vanishes is nothing beside the row's largest. Where the upstream gradient of
each token is not known yet, the second half waits for backward and computes each tile of logits again: four products,
and one tile of logits.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from aquila_kernels.arguments import Terms, empty_gradients

# Shapes (this file): N tokens, n of them whose logits exist at once, H hidden size, V vocabulary, C one tile

# Logits of n tokens. On CPU 512 tokens at once, which at V=151851 are 297 MiB in fp32, took 3% less time than 342; much
# more memory brings no more. Elsewhere a guess: each tile costs some twenty kernel launches, so fewer and larger ones.
_BUDGET_BYTES_CPU, _BUDGET_BYTES_OTHER = 320 * 2**20, 2**30
# One fp32 tile, the working set of the element-wise steps, which are faster in cache; but most of the time is
# in the products, and on CPU 2 to 32 MiB took the same within 7%, 8 MiB least.
_TILE_BYTES_CPU, _TILE_BYTES_OTHER = 8 * 2**20, 128 * 2**20


def products_in(asked: torch.dtype, device: torch.device) -> torch.dtype:
    """fp32 for bf16 on a CPU that cannot multiply it: torch's own bf16 product is a plain loop there."""
    return torch.float32 if asked == torch.bfloat16 and device.type == "cpu" and not _cpu_has_bf16() else asked


@functools.cache
def _cpu_has_bf16() -> bool:
    """What torch asks before it hands a bf16 product to its library (oneDNN)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def losses(
    x_NH: Tensor, weight_VH: Tensor, target_N: Tensor, terms: Terms, budget_bytes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, and the offset and scale of its softmax: p = scale / k exp(z - offset). fp32 (N,)."""
    return _losses(x_NH, weight_VH, target_N, terms, _mean_weight(weight_VH, terms, _stats_dtype(x_NH)), budget_bytes)


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
    dhidden_NH, dweight_VH = empty_gradients(x_NH, weight_VH, needs)
    softmax = (offset_N, scale_N)
    _gradients(dhidden_NH, dweight_VH, x_NH, weight_VH, target_N, *softmax, upstream_N, terms, budget_bytes, add=False)
    return dhidden_NH, dweight_VH


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
    num_rows, vocab_size = len(x_NH), len(weight_VH)
    dhidden_NH, dweight_VH = empty_gradients(x_NH, weight_VH, needs)
    mean_weight_H = _mean_weight(weight_VH, terms, _stats_dtype(x_NH))
    if budget_bytes is None:
        budget_bytes = _BUDGET_BYTES_CPU if x_NH.device.type == "cpu" else _BUDGET_BYTES_OTHER
    # At most half of the tokens at once, however few they are: the full logits never exist.
    max_rows = max(min(budget_bytes // (vocab_size * x_NH.dtype.itemsize), (num_rows + 1) // 2), 1)
    num_chunks = max(-(-num_rows // max_rows), 1)
    rows_per_chunk = max(-(-num_rows // num_chunks), 1)
    scratch = x_NH.new_empty(vocab_size * rows_per_chunk)

    loss_N = x_NH.new_zeros(num_rows, dtype=_stats_dtype(x_NH))
    for start in range(0, num_rows, rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        x_nH, target_n = x_NH[rows], target_N[rows]
        exp_Vn = scratch[: vocab_size * len(x_nH)].view(vocab_size, len(x_nH))
        max_of_tiles = []
        loss_N[rows], offset_n, scale_n = _losses(
            x_nH, weight_VH, target_n, terms, mean_weight_H, budget_bytes, exp_Vn, max_of_tiles
        )
        _gradients(
            None if dhidden_NH is None else dhidden_NH[rows],
            dweight_VH,
            x_nH,
            weight_VH,
            target_n,
            offset_n,
            scale_n,
            upstream_N[rows],
            terms,
            budget_bytes,
            add=start > 0,
            exp_Vn=exp_Vn,
            max_of_tiles=max_of_tiles,
        )
    return loss_N, dhidden_NH, dweight_VH


def _losses(x_nH, weight_VH, target_n, terms, mean_weight_H, budget_bytes, exp_Vn=None, max_of_tiles=None):
    """See losses. exp_Vn and the list max_of_tiles, if given, are left with each tile's E_c and m_c.

    The loss is nan where target is not in [0, V).
    """
    max_n = x_nH.new_full(target_n.shape, -math.inf, dtype=_stats_dtype(x_nH))
    sum_exp_n = torch.zeros_like(max_n)
    target_logit_n = torch.full_like(max_n, math.nan)
    for columns in _vocab_tiles(x_nH, weight_VH, budget_bytes):
        out = None if exp_Vn is None else exp_Vn[columns]
        logits_Cn = torch.mm(weight_VH[columns].to(x_nH.dtype), x_nH.T, out=out)
        has_target_n, target_index = _locate(target_n, columns)
        target_logit_n = torch.where(has_target_n, logits_Cn[target_index], target_logit_n)
        exp_Cn = logits_Cn.to(max_n.dtype)  # in fp32 the logits themselves
        new_max_n = torch.maximum(max_n, exp_Cn.amax(0))
        # nothing but -inf so far: their exponential is 0, not that of -inf + inf
        finite_n = torch.where(new_max_n == -math.inf, 0, new_max_n)
        exp_Cn.sub_(finite_n).exp_()
        sum_exp_n = sum_exp_n * (max_n - finite_n).exp_() + exp_Cn.sum(0)
        max_n = new_max_n
        if exp_Vn is not None:
            logits_Cn.copy_(exp_Cn)
            max_of_tiles.append(finite_n)
    lse_n = max_n + sum_exp_n.log()
    loss_n = (max_n - target_logit_n) + sum_exp_n.log()
    if terms.label_smoothing:
        mean_logit_n = x_nH.to(max_n.dtype) @ mean_weight_H
        loss_n += terms.label_smoothing * (target_logit_n - mean_logit_n)
    if terms.z_loss:
        loss_n += terms.z_loss * lse_n.square()
    k_n = 1 + 2 * terms.z_loss * lse_n if terms.z_loss else 1
    # not exp(z - lse): of a large lse the rounding alone would be an error of every p, and of p - 1
    return torch.where(target_n == terms.ignore_index, 0, loss_n), max_n, k_n / sum_exp_n


def _gradients(
    dhidden_nH,
    dweight_VH,
    x_nH,
    weight_VH,
    target_n,
    offset_n,
    scale_n,
    upstream_n,
    terms,
    budget_bytes,
    *,
    add: bool,
    exp_Vn=None,
    max_of_tiles=None,
) -> None:
    """Write the gradients of sum(upstream x loss), or add them to dweight.

    exp_Vn, if given, is written over, else logits are computed again.
    """
    factor_n = scale_n * upstream_n
    onehot_n, uniform_n = (1 - terms.label_smoothing) * upstream_n, terms.label_smoothing / len(weight_VH) * upstream_n
    for i, columns in enumerate(_vocab_tiles(x_nH, weight_VH, budget_bytes)):
        weight_CH = weight_VH[columns].to(x_nH.dtype)
        if exp_Vn is None:
            dlogits_Cn = torch.mm(weight_CH, x_nH.T)
            wide_Cn = dlogits_Cn.to(factor_n.dtype).sub_(offset_n).exp_().mul_(factor_n)
        else:
            dlogits_Cn = exp_Vn[columns]
            wide_Cn = dlogits_Cn.to(factor_n.dtype).mul_((max_of_tiles[i] - offset_n).exp_().mul_(factor_n))
        if terms.label_smoothing:
            wide_Cn.sub_(uniform_n)
        has_target_n, target_index = _locate(target_n, columns)
        wide_Cn[target_index] -= torch.where(has_target_n, onehot_n, 0)  # in fp32: bf16 loses p - 1 near p = 1
        dlogits_Cn.copy_(wide_Cn)
        if dhidden_nH is not None:
            _product(dhidden_nH, dlogits_Cn.T, weight_CH, add=i > 0)
        if dweight_VH is not None:
            _product(dweight_VH[columns], dlogits_Cn, x_nH, add=add)


def _mean_weight(weight_VH: Tensor, terms: Terms, dtype: torch.dtype) -> Tensor | None:
    """The mean of all rows, whose product with x is the mean of its logits."""
    return weight_VH.mean(0, dtype=dtype) if terms.label_smoothing else None


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b; a bf16 product is summed inside in fp32, and rounded once on its way to fp32."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=float(add))
    elif add:
        out += torch.mm(a, b)
    else:
        out.copy_(torch.mm(a, b))


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
