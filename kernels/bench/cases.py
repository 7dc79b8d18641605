"""What is timed: an operation at a shape, in a dtype, on one kind of logits; its inputs, and the least work it takes.

fresh     untrained weights (std 0.02), any target as likely as another: a loss of about ln V
trained   a Zipf-like vocabulary, and every target's logit raised as a model's is that predicts it: a loss near 4.5
peaked    the target's logit raised further: most rows are sure of it (p near 1)
"""

import dataclasses
import math

import torch
from torch import Tensor

# Shapes (this file): N tokens, H hidden size, V vocabulary

OPERATIONS = ("linear_cross_entropy", "cross_entropy", "rms_norm")
LOGITS = ("fresh", "trained", "peaked")
DTYPES = ("float32", "bfloat16")
SHAPES = {"tiny": (64, 64, 512), "small": (256, 576, 8192), "2k": (2048, 576, 151851), "16k": (16384, 576, 151851)}
IGNORE = -100
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    operation: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    logits: str
    supervised: float  # fraction of the tokens that have a target
    device: str = "cpu"

    @property
    def passes(self) -> tuple[str, ...]:
        return ("both", "forward", "backward") if self.operation == "rms_norm" else ("both",)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclasses.dataclass
class Inputs:
    given: tuple[Tensor, ...]  # arguments of the operation, those with a gradient first
    upstream: Tensor | None  # gradient of the result; None where that is a loss
    kept: Tensor | None  # a copy of logits, which some implementations overwrite

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.given if t.requires_grad)


def tiny(case: Case) -> Case:
    """The same in small: threads are started and code is generated before anything is timed."""
    tokens, hidden, vocab = SHAPES["tiny"]
    return dataclasses.replace(case, tokens=tokens, hidden=hidden, vocab=vocab)


def flops(case: Case) -> float:
    """Of the products: logits, and from their gradient dX and dW, over the tokens that have a target."""
    num_products = 3 if case.operation == "linear_cross_entropy" else 0
    return num_products * 2.0 * round(case.tokens * case.supervised) * case.hidden * case.vocab


def bytes_moved(case: Case, which: str) -> float:
    """The least that is read and written: each tensor once in the pass that needs it."""
    itemsize = case.torch_dtype.itemsize
    if case.operation == "cross_entropy":  # forward reads the logits, backward reads them and writes their gradient
        return 3.0 * case.tokens * case.vocab * itemsize
    if case.operation == "rms_norm":  # forward: x, y; backward: dy, x, dx
        return {"forward": 2.0, "backward": 3.0, "both": 5.0}[which] * case.tokens * case.hidden * itemsize
    return 0.0


def make_inputs(case: Case) -> Inputs:
    """The same on every call. Filled in place: a temporary would raise the high-water mark that a CPU's peaks are
    measured from."""
    rng = torch.Generator(case.device).manual_seed(0)
    like = {"dtype": case.torch_dtype, "device": case.device}
    if case.operation == "rms_norm":
        x_NH = torch.empty(case.tokens, case.hidden, **like).normal_(generator=rng).requires_grad_()
        weight_H = torch.empty(case.hidden, **like).uniform_(0.5, 1.5, generator=rng).requires_grad_()
        dy_NH = torch.empty(case.tokens, case.hidden, **like).normal_(generator=rng)
        return Inputs((x_NH, weight_H), dy_NH, None)
    hidden_NH, weight_VH, target_N = head(case, rng)
    target_N[torch.rand(case.tokens, generator=rng, device=case.device) >= case.supervised] = IGNORE
    if case.operation == "linear_cross_entropy":
        return Inputs((hidden_NH.requires_grad_(), weight_VH.requires_grad_(), target_N), None, None)
    logits_NV = hidden_NH @ weight_VH.T
    return Inputs((logits_NV.clone().requires_grad_(), target_N), None, logits_NV)


def head(case: Case, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight of the head, targets."""
    num_tokens, hidden_size, vocab_size = case.tokens, case.hidden, case.vocab
    like = {"dtype": case.torch_dtype, "device": case.device}
    hidden_NH = torch.empty(num_tokens, hidden_size, **like).normal_(generator=rng)
    weight_VH = torch.empty(vocab_size, hidden_size, **like).normal_(std=0.02, generator=rng)
    if case.logits == "fresh":
        return hidden_NH, weight_VH, torch.randint(0, vocab_size, (num_tokens,), generator=rng, device=case.device)

    # Logits are log f + spread * N(0, 1), f being Zipf-like frequencies. A token drawn from their softmax has frequency
    # f, and its own noise is shifted by spread (a Gaussian weighted by its exponential): so its logit is raised by
    # spread^2. Here the target is drawn from f, and the hidden state is moved along its weight for that.
    log_f_V = -torch.log(torch.arange(vocab_size, device=case.device) + 2.7)
    log_f_V -= torch.logsumexp(log_f_V, 0)
    entropy = -(log_f_V.exp() * log_f_V).sum().item()
    loss = min(4.0, entropy / 2)  # comes out some 0.4 higher, as V is finite
    spread = math.sqrt(2 * (entropy - loss))  # E log sum exp is spread^2 / 2, the target's raise spread^2
    raised = spread**2 + (loss + 6 if case.logits == "peaked" else 0)

    draws_N = torch.rand(num_tokens, generator=rng, device=case.device, dtype=torch.float64)
    target_N = torch.searchsorted(log_f_V.double().exp().cumsum(0), draws_N).clamp_(max=vocab_size - 1)
    weight_VH.mul_(spread / math.sqrt(hidden_size) / 0.02)
    for start in range(0, num_tokens, 256):  # a few at a time: see make_inputs
        rows = slice(start, start + 256)
        hidden_NH[rows] += weight_VH[target_N[rows]] * (raised / spread**2)
    common = math.sqrt(hidden_size) / 2  # the first column is the frequencies', the same for every token
    hidden_NH[:, 0], weight_VH[:, 0] = common, log_f_V / common
    return hidden_NH, weight_VH, target_N
