"""Where a transformers model meets our kernels: norms and the loss path, replaced on the built model, proven there.

    choose_kernel -> install (RMSNorm and the loss, counted) -> settle (each compared with the model's own arithmetic)

Nothing global is patched. Weights, their names, copies, adapters and saved files stay what they were.
"""

import functools
import types
from contextlib import AbstractContextManager

import torch
from aquila_kernels.choice import is_interpreted, why_not_triton
from aquila_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from aquila_sft import runtime
from aquila_sft.data.rows import IGNORE
from aquila_sft.errors import Stopped, UserError


def choose_kernel(asked: str, device: str) -> tuple[str, str]:
    """'triton' or 'torch', and why. UserError where Triton is asked for and cannot run."""
    missing = why_not_triton(torch.device(device))
    if not missing and is_interpreted():
        missing = "TRITON_INTERPRET is set, and Triton's interpreter is for tests"
    if asked == "triton" and missing:
        raise UserError(f"kernel=triton: {missing}; use kernel=auto or torch")
    if asked == "torch":
        return "torch", "asked for"
    return ("torch", missing) if missing else ("triton", "norms and loss, on a GPU that Triton's kernels support")


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT one, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


# ---- replacing ----


class TritonNorm:
    """RMSNorm by one kernel each way. A norm becomes one by its __class__, and stays the module that it was."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        from aquila_kernels.rms_norm import rms_norm  # imports Triton, which macOS does not have

        return rms_norm(hidden_states, self.weight, self.variance_epsilon, kernel="triton")


class TritonLlamaRMSNorm(TritonNorm, LlamaRMSNorm): ...


class TritonMistralRMSNorm(TritonNorm, MistralRMSNorm): ...


NORMS = {
    LlamaForCausalLM: (LlamaRMSNorm, TritonLlamaRMSNorm),
    MistralForCausalLM: (MistralRMSNorm, TritonMistralRMSNorm),
}


def install(model: torch.nn.Module, kernel: str, *, asked: bool = False) -> None:
    """Replace norms (kernel "triton" only) and the loss path of a built model, before or after PEFT; twice is once.

    `asked`: kernel=triton was asked for, so a model whose norms are not known here is refused; else it keeps them.
    Raises UserError where norms are more, fewer or others than expected, and for a head that is no plain matrix.
    """
    base = base_of(model)
    if kernel == "triton":
        name = type(base).__name__
        classes = next((classes for kind, classes in NORMS.items() if isinstance(base, kind)), None)
        if asked and not classes:
            raise UserError(f"kernel=triton knows the norms of Llama and Mistral, not those of {name}; use kernel=auto")
        told = f"{install_norms(base, *classes)} norms and the loss" if classes else f"the loss; {name} keeps its norms"
        runtime.say(f"  Triton's kernels compute {told}")
    install_loss(base, kernel)


def install_norms(base: torch.nn.Module, stock: type, ours: type) -> int:
    """Replace every norm, PEFT's trained copies too; how many norms the model has, counted against its layers."""
    norms = {name: module for name, module in base.named_modules() if "norm" in type(module).__name__.lower()}
    others = sorted({type(module).__name__ for module in norms.values() if type(module) not in (stock, ours)})
    expected, found = 2 * base.config.num_hidden_layers + 1, sum(".modules_to_save." not in name for name in norms)
    if found != expected or others:
        told = f"{found}, among them {', '.join(others)}" if others else found
        raise UserError(
            f"kernel=triton: expected {expected} norms, all {stock.__name__}, found {told}; use kernel=torch"
        )
    for module in norms.values():
        module.__class__ = ours
    return found


def install_loss(base: torch.nn.Module, kernel: str) -> None:
    """After this, model(input_ids, position_ids, targets=…) returns `loss`: the sum of -log p over targets.

    targets int64 [B, T]: what each position has to predict (labels shifted left), -100 where nothing. With
    per_token=True, `loss` is fp32 [B, T], 0 where ignored, without gradients. Without targets the forward is the
    class's own, so generation is unchanged. A PEFT or DDP wrapper around the model passes the arguments through.
    """
    head_weight(base)
    own_forward = type(base).forward

    @functools.wraps(own_forward)  # generate() checks its arguments against this signature
    def forward(self, *args, targets: Tensor | None = None, per_token: bool = False, **kwargs):
        if targets is None:
            return own_forward(self, *args, **kwargs)
        given = (decode(self, *args, **kwargs), head_weight(self), targets.flatten())
        if per_token:
            return CausalLMOutput(loss=-linear_log_probs(*given, kernel=kernel).view_as(targets))
        return CausalLMOutput(loss=linear_cross_entropy(*given, reduction="sum", kernel=kernel))

    base.forward = types.MethodType(forward, base)


def head_weight(base: torch.nn.Module) -> Tensor:
    """The output head's matrix, PEFT's trained copy of it where there is one."""
    head = base.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(f"{type(base).__name__} has no plain linear output head; its loss cannot be computed here")
    if hasattr(head, "base_layer"):
        raise UserError("an adapter on the output head would not be trained: the loss reads the head's own matrix")
    return head.weight


def decode(base, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **given) -> Tensor:
    """The decoder's last hidden states [B * T, H], made without a cache."""
    if base.config._attn_implementation.startswith("flash") and position_ids is not None and attention_mask is None:
        # Flash attention tells packed conversations apart in a batch of one row only: lay the rows end to end. Each
        # begins at position 0, so they stay apart as the conversations in them do.
        position_ids = position_ids.reshape(1, -1)
        input_ids = None if input_ids is None else input_ids.reshape(1, -1)
        inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[None]
    given |= dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
    given = {k: v for k, v in given.items() if v is not None} | {"use_cache": False}
    return base.base_model(inputs_embeds=inputs_embeds, **given).last_hidden_state.flatten(0, 1)


def targets_of(labels: Tensor) -> Tensor:
    """What position t predicts: the label at t + 1; the last position of a row predicts nothing. int64 [B, T]."""
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    return targets


# ---- proving ----


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
        if attention == "sdpa" or isinstance(error, Stopped):
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
def check_loss(model: torch.nn.Module, device: str, autocast: AbstractContextManager) -> None:
    """Our loss equals the model's own on a few random tokens; a model that scales its logits is refused."""
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


def probe(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def probe_ids(model: torch.nn.Module, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(base_of(model).config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
