"""Where a transformers model meets our kernels: the loss path, replaced on the instance, and proven there.

`install_loss` teaches a model's forward to return the summed cross-entropy without making logits; `check_loss` and
`check_isolation` compare it with the model's own arithmetic before a run trusts it. Nothing global is patched.
"""

import functools
import types
from contextlib import AbstractContextManager

import torch
from aquila_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from aquila_sft.data.rows import IGNORE
from aquila_sft.errors import UserError


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT one, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def install_loss(model: torch.nn.Module) -> None:
    """After this, model(input_ids, position_ids, targets=…) returns `loss`: the sum of -log p over targets.

    targets int64 [B, T]: what each position has to predict (labels shifted left), -100 where nothing. With
    per_token=True, `loss` is fp32 [B, T], 0 where ignored, without gradients. Without targets the forward is the
    class's own, so generation is unchanged. A PEFT or DDP wrapper around the model passes the arguments through.
    """
    base = base_of(model)
    head = base.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(f"{type(base).__name__} has no plain linear output head; its loss cannot be computed here")
    decoder, own_forward = base.base_model, type(base).forward

    @functools.wraps(own_forward)  # generate() checks its arguments against this signature
    def forward(self, *args, targets: Tensor | None = None, per_token: bool = False, **kwargs):
        if targets is None:
            return own_forward(self, *args, **kwargs)
        given = {k: v for k, v in kwargs.items() if v is not None}
        hidden = decoder(*args, **(given | {"use_cache": False})).last_hidden_state.flatten(0, 1)
        if per_token:
            return CausalLMOutput(loss=-linear_log_probs(hidden, head.weight, targets.flatten()).view_as(targets))
        return CausalLMOutput(loss=linear_cross_entropy(hidden, head.weight, targets.flatten(), reduction="sum"))

    base.forward = types.MethodType(forward, base)


def targets_of(labels: Tensor) -> Tensor:
    """What position t predicts: the label at t + 1; the last position of a row predicts nothing. int64 [B, T]."""
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    return targets


@torch.no_grad()
def check_loss(model: torch.nn.Module, device: str, autocast: AbstractContextManager) -> None:
    """Our loss equals the model's own on a few random tokens; a model that scales its logits is refused."""
    ids = probe_ids(model, (2, 12)).to(device)
    was_training = model.training
    model.eval()
    with autocast:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        ours = model(input_ids=ids, targets=targets_of(ids)).loss
    model.train(was_training)
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    if not torch.isfinite(plain):
        raise UserError("the base model's outputs are not finite numbers: its weights are damaged")
    if (ours.float() - plain).abs() > 1e-2 * plain.abs():  # bf16 products round at 2^-8, sums are fp32
        raise UserError(
            f"{type(base_of(model)).__name__} does more to its logits than its output head does: our loss is "
            f"{ours.item():.4f}, its own {plain.item():.4f}; this architecture is not supported"
        )


@torch.no_grad()
def check_isolation(model: torch.nn.Module, device: str, autocast: AbstractContextManager) -> float:
    """Two conversations in one row predict what each predicts alone; the largest difference, relative to the logits.

    Raises UserError for an attention that lets one see the other. Two rows, because flash attention tells packed
    conversations apart in a batch of one row only.
    """
    first, second = probe_ids(model, (2, 9)).to(device), probe_ids(model, (2, 7), seed=1).to(device)
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(9), torch.arange(7)]).expand(2, -1).to(device)
    was_training = model.training
    model.eval()
    with autocast:
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits.float()[:, 9:]
        alone = model(input_ids=second, position_ids=positions[:, 9:], use_cache=False).logits.float()
    model.train(was_training)
    difference = ((together - alone).abs().max() / alone.abs().max()).item()
    if not difference < 0.03:  # a leak changes logits by their own size; bf16 rounding by less than 1 %
        raise UserError(
            f"attention {base_of(model).config._attn_implementation} does not keep packed conversations apart "
            f"(their logits differ by {difference:.0%}); use train.attention=sdpa"
        )
    return difference


def probe_ids(model: torch.nn.Module, shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, base_of(model).config.vocab_size, shape, generator=generator)
