"""A swapped model proven before it trains, in the arithmetic it trains in: each part against the model's own.

settle -> check: the head -> the loss -> each norm -> packed conversations apart, else sdpa in the attention's place
compile_layers -> layers through torch.compile, against themselves before
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from aquila_sft import runtime
from aquila_sft.errors import UserError
from aquila_sft.swap import TritonNorm, base_of, decode, head_weight, targets_of


def settle(model: torch.nn.Module, device: str, autocast: AbstractContextManager, *, asked: bool) -> str:
    """Prove a model that is about to train, in the arithmetic it trains in; the attention that it then has.

    An attention that leaks or does not run is refused where it was `asked` for; where `auto` chose it, sdpa takes its
    place, and that is said. Whatever else is wrong raises UserError.
    """
    base, was_training = base_of(model), model.training
    attention = base.config._attn_implementation
    model.eval()
    try:
        check(model, device, autocast)
    except Exception as error:  # flash-attn and compilers raise errors of their own
        if attention == "sdpa":
            raise
        base.set_attn_implementation("sdpa")
        check(model, device, autocast)  # raises again what was not the attention's fault
        why = str(error).strip().split("\n")[0] or type(error).__name__
        if asked:
            raise UserError(f"train.attention={attention}: {why}; use train.attention=sdpa") from None
        runtime.say(f"  attention sdpa instead of {attention}: {why}")
    model.train(was_training)
    return base.config._attn_implementation


def check(model: torch.nn.Module, device: str, autocast: AbstractContextManager) -> None:
    check_head(model, device, autocast)
    check_loss(model, device, autocast)
    check_norms(model, device)
    check_isolation(model, device, autocast)


def check_norms(model: torch.nn.Module, device: str) -> None:
    """Each norm of ours computes what its stock class does, forward and backward."""
    size = torch.tensor([[1e-3], [1.0], [300.0]])  # of the rows: eps counts in the first
    for name, norm in model.named_modules():
        if not isinstance(norm, TritonNorm):
            continue
        x, dy = (probe(3, len(norm.weight), seed=seed).to(device, norm.weight.dtype) for seed in (0, 1))
        x = (x * size.to(x)).requires_grad_()
        wanted = [x, norm.weight] if norm.weight.requires_grad else [x]
        with torch.enable_grad():
            pair = norm(x), super(TritonNorm, norm).forward(x)
        ours, theirs = ([y, *torch.autograd.grad(y, wanted, dy)] for y in pair)
        tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2  # sums in another order; bf16 rounds at 2^-8
        if any(not (a - b).norm() <= tolerance * b.norm() for a, b in zip(ours, theirs, strict=True)):
            raise UserError(f"kernel=triton: {name} does not compute what its stock class does; use kernel=torch")


@torch.no_grad()
def check_head(model: torch.nn.Module, device: str, autocast: AbstractContextManager) -> None:
    """The model's logits are its head's matrix times its hidden states, nothing else: no scale, no cap.

    The loss of a fresh model does not tell: near uniform logits it is log(vocabulary) at any scale. So the decoder's
    output is enlarged, for this call, until the largest logit is 100, where caps (30 or 50) show too.
    """
    base, expected = base_of(model), []

    def enlarge(decoder, given, output):
        hidden, weight = output.last_hidden_state, head_weight(base)
        largest = torch.nn.functional.linear(hidden, weight).abs().max()
        output.last_hidden_state = hidden * (100 / largest.clamp(min=1e-6)).to(hidden)
        expected.append(torch.nn.functional.linear(output.last_hidden_state, weight))
        return output

    hook = base.base_model.register_forward_hook(enlarge)
    try:
        with autocast:
            logits = model(input_ids=probe_ids(model, (2, 12)).to(device), use_cache=False).logits
    finally:
        hook.remove()
    if not torch.isfinite(logits).all():
        raise UserError("the base model's outputs are not finite numbers: its weights are damaged")
    if not (logits.float() - expected[0].float()).norm() <= 1e-2 * expected[0].float().norm():
        raise UserError(
            f"{type(base).__name__} does more to its logits than its output head does (a scale or a cap), so our loss "
            "would be another than its own; this architecture is not supported"
        )


@torch.no_grad()
def check_loss(model: torch.nn.Module, device: str, autocast: AbstractContextManager) -> None:
    """Our loss equals the model's own on a few random tokens."""
    ids = probe_ids(model, (2, 12)).to(device)
    with autocast:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        ours = model(input_ids=ids, targets=targets_of(ids)).loss
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    if not torch.isfinite(plain):
        raise UserError("the base model's outputs are not finite numbers: its weights are damaged")
    if not (ours.float() - plain).abs() <= 1e-2 * plain.abs():  # bf16 products round at 2^-8, sums are fp32
        raise UserError(
            f"{type(base_of(model)).__name__} does more to its logits than its output head does: our loss is "
            f"{ours.item():.4f}, its own {plain.item():.4f}; this architecture is not supported"
        )


def check_isolation(model: torch.nn.Module, device: str, autocast: AbstractContextManager) -> float:
    """Two conversations in one row are what each is alone, forward and backward; the largest relative difference.

    Row 0 holds first and second, row 1 second and first: what stands first in a row is alone. Raises UserError for an
    attention that lets one see the other.
    """
    base = base_of(model)
    attention = base.config._attn_implementation
    n, m = (80, 48) if attention == "flex_attention" else (9, 7)  # below 128 tokens flex runs another kernel
    ids = [probe_ids(model, (length,), seed=length) for length in (n, m)]
    positions = [torch.arange(length) for length in (n, m)]
    ids, positions = (torch.stack([torch.cat(p), torch.cat(p[::-1])]).to(device) for p in (ids, positions))
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.enable_grad(), autocast:
        hidden = decode(base, inputs_embeds=embedded, position_ids=positions).float().view(embedded.shape)
        upstream = probe(m, hidden.shape[-1]).to(device)
        ((hidden[0, n:] + hidden[1, :m]) * upstream).sum().backward(inputs=[embedded])
    pairs = [(hidden[1, m:], hidden[0, :n]), *((t[0, n:], t[1, :m]) for t in (hidden, embedded.grad))]
    difference = max(((packed - alone).abs().max() / alone.abs().max()).item() for packed, alone in pairs)
    if not difference < 0.05:  # a leak changes them by their own size, rounding in bf16 by 1 %
        raise UserError(
            f"attention {attention} does not keep packed conversations apart (they differ by {difference:.0%})"
        )
    return difference


def compile_layers(
    model: torch.nn.Module, shape: tuple[int, int], device: str, autocast: AbstractContextManager
) -> None:
    """Each layer through torch.compile, then compared with what it was, forward and backward, as it trains.

    All are alike, so the compiler works on one, and starting takes seconds, not minutes. `shape`: rows and tokens of a
    micro-batch; another one here would be compiled, too, and make the training's a dynamic one. Raises UserError.
    """
    base, (rows, length) = base_of(model), shape
    ids = probe_ids(model, shape).to(device)
    positions = (torch.arange(length) % (length // 3 + 1)).repeat(rows, 1).to(device)
    upstream = probe(rows * length, base.config.hidden_size).to(device)

    def outcome() -> tuple[Tensor, Tensor]:
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
        with autocast:
            hidden = decode(base, inputs_embeds=embedded, position_ids=positions).float()
        (hidden * upstream).sum().backward(inputs=[embedded])
        return hidden.detach(), embedded.grad

    was_training = model.training
    model.train()
    plain = outcome()
    for layer in base.base_model.layers:
        layer.compile()
    try:
        compiled = outcome()
    except Exception as error:  # compilers raise errors of their own
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"train.compile: the layers cannot be compiled ({why}); use train.compile=false") from None
    model.train(was_training)
    for ours, theirs in zip(compiled, plain, strict=True):
        if not (ours - theirs).norm() <= 0.05 * theirs.norm():  # rounding in bf16 by 1 %
            raise UserError("train.compile: compiled layers compute something else; use train.compile=false")


def probe(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def probe_ids(model: torch.nn.Module, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(base_of(model).config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
