"""What an operation gives in float64, and how far a result is from it: the error is norm(result - exact) / norm(exact).

Computed in plain torch from the inputs as they are given (rounded to bf16, if they are), a few rows at a time, so that
float64 logits of the real shape never exist at once. Gradients are compared whole.
"""

import dataclasses
from pathlib import Path

import torch
from cases import EPS, IGNORE, Case, Inputs
from torch import Tensor

# Shapes (this file): N tokens, n of them at a time, H hidden size, V vocabulary

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of float64 logits


def errors(case: Case, inputs: Inputs, out: Tensor, gradients: tuple[Tensor, ...], folder: Path | None) -> dict:
    """Errors of the output, of dX (dlogits in cross_entropy) and of dW. folder keeps what was computed, if given."""
    given = [t.detach() for t in inputs.given]
    if case.operation == "cross_entropy":
        return errors_of_cross_entropy(case, inputs.kept, given[1], out, gradients[0])
    kept = folder and folder / ("-".join(map(str, dataclasses.astuple(case))) + ".pt")
    if kept and kept.exists():
        exact = torch.load(kept, mmap=True, map_location=case.device)
    else:
        exact = linear(case, *given) if case.operation == "linear_cross_entropy" else rms_norm(*given, inputs.upstream)
        if kept:
            torch.save(exact, kept)
    names = ("error_out", "error_dx", "error_dw")
    return {name: _error(a, b) for name, a, b in zip(names, (out, *gradients), exact, strict=True)}


def linear(case: Case, hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, dhidden, dweight."""
    weight_VH = weight_VH.double()
    loss, dhidden_NH = 0.0, torch.zeros_like(hidden_NH, dtype=torch.float64)
    dweight_VH = torch.zeros_like(weight_VH)
    for rows in _chunks(case):
        hidden_nH = hidden_NH[rows].double()
        nll_n, dlogits_nV = _softmax_gradient(hidden_nH @ weight_VH.T, target_N[rows], (target_N != IGNORE).sum())
        loss += nll_n.sum()
        torch.mm(dlogits_nV, weight_VH, out=dhidden_NH[rows])
        dweight_VH.addmm_(dlogits_nV.T, hidden_nH)
    return loss, dhidden_NH, dweight_VH


def errors_of_cross_entropy(case: Case, logits_NV: Tensor, target_N: Tensor, out: Tensor, dlogits_NV: Tensor) -> dict:
    loss, off, size = 0.0, 0.0, 0.0
    for rows in _chunks(case):
        nll_n, exact_nV = _softmax_gradient(logits_NV[rows].double(), target_N[rows], (target_N != IGNORE).sum())
        loss += nll_n.sum()
        size += exact_nV.square().sum()
        off += exact_nV.sub_(dlogits_NV[rows]).square().sum()
    return {"error_out": _error(out, loss), "error_dx": (off / size).sqrt().item(), "error_dw": None}


def rms_norm(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy.double()))


def _softmax_gradient(logits_nV: Tensor, target_n: Tensor, num_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss over num_targets, and its gradient, written over the logits."""
    is_target_n, index_n1 = target_n != IGNORE, target_n.clamp(min=0)[:, None]
    lse_n1 = logits_nV.logsumexp(1, keepdim=True)
    nll_n = torch.where(is_target_n, (lse_n1 - logits_nV.gather(1, index_n1))[:, 0], 0) / num_targets
    probs_nV = logits_nV.sub_(lse_n1).exp_()
    probs_nV.scatter_add_(1, index_n1, torch.full_like(lse_n1, -1))
    return nll_n, probs_nV.mul_(is_target_n[:, None] / num_targets)


def _chunks(case: Case) -> list[slice]:
    rows = max(CHUNK_BYTES[case.device] // (8 * case.vocab), 1)
    return [slice(start, min(start + rows, case.tokens)) for start in range(0, case.tokens, rows)]


def _error(result: Tensor, exact: Tensor) -> float:
    return ((result.detach().double() - exact).norm() / exact.norm()).item()
