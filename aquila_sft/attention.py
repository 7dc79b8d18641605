"""Attention of packed rows on a CPU, document by document: what a document cannot see is not computed.

    q, k, v [B, heads, T, D] -> cut where the positions begin again -> sdpa, causal, for each -> [B, T, heads, D]

transformers' sdpa computes every row whole, and masks most of it: a row of n equal documents costs it 2 n times as
much. Many small calls suit a CPU; a GPU has kernels that skip blocks in one call (device.choose_attention). Products
are in fp32: of documents this short torch's bf16 kernel takes twice the time (9 of 120 tokens, 4 heads of 64, forward
and backward on avx512_bf16: 17 ms and 9 ms; as two masked rows: 30 ms and 33 ms).
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

BY_DOCUMENT = "sdpa_by_document"  # as transformers and train.attention know it


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    position_ids: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_,
) -> tuple[Tensor, None]:
    """As transformers calls it. Raises ValueError for what positions alone do not tell: masks, caches, a window."""
    rows, _, length, _ = query.shape
    if attention_mask is not None or key.shape[2] != length:
        raise ValueError(f"attention {BY_DOCUMENT} is for whole rows without a mask or a cache; use sdpa")
    lengths = lengths_of(position_ids.expand(rows, -1))
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ValueError(f"attention {BY_DOCUMENT} knows no window, and a document exceeds {sliding_window}; use sdpa")

    def documents(tensor: Tensor) -> list[Tensor]:
        laid_end_to_end = tensor.transpose(1, 2).flatten(0, 1).to(torch.promote_types(tensor.dtype, torch.float32))
        return [piece.transpose(0, 1)[None] for piece in laid_end_to_end.split(lengths)]

    how = dict(is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=key.shape[1] != query.shape[1])
    pieces = zip(*map(documents, (query, key, value)), strict=True)
    with torch.autocast(query.device.type, enabled=False):
        attended = [scaled_dot_product_attention(*qkv, **how)[0].transpose(0, 1) for qkv in pieces]
    return torch.cat(attended).view(rows, length, *attended[0].shape[1:]), None


def lengths_of(positions: Tensor) -> list[int]:
    """Tokens of each document, row after row; one begins where a row does, and where positions do not go on by one."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff() != 1
    starts = begins.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], positions.numel()], strict=True)]


def refuse_mask(*, attention_mask: Tensor | None = None, **_) -> None:
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(f"attention {BY_DOCUMENT} knows positions alone, and was given a mask of padding; use sdpa")


AttentionInterface.register(BY_DOCUMENT, attend)
AttentionMaskInterface.register(BY_DOCUMENT, refuse_mask)
