"""Where a transformers model meets our kernels: norms and the loss path, replaced on the built model.

    choose_kernel -> install (RMSNorm and the loss, counted) -> settle.py (compared with the model's own arithmetic)

Nothing global is patched. Weights, their names, copies, adapters and saved files stay what they were.
"""

import functools
import types

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
from aquila_sft.errors import UserError


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


NOT_WITH_TARGETS = (
    "labels",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "output_hidden_states",
    "output_attentions",
)


def install(model: torch.nn.Module, kernel: str, *, asked: bool = False) -> None:
    """Replace norms (kernel "triton" only) and the loss path of a built model, before or after PEFT; twice is once.

    `asked`: kernel=triton was asked for, so a model whose norms are not known here is refused; else it keeps them.
    The last one's kernel holds. Raises UserError where norms are more, fewer or others than expected, for a head that
    is no plain matrix in memory, and where a hook, an own forward or virtual tokens would not be heeded.
    """
    if kernel not in ("triton", "torch"):
        raise UserError(f"kernel={kernel!r} cannot be installed; use triton or torch, as choose_kernel() says")
    base = base_of(model)
    refuse_what_the_loss_would_not_heed(model, base)
    if kernel == "torch":
        for norm in base.modules():
            if isinstance(norm, TritonNorm):
                norm.__class__ = type(norm).__bases__[1]  # the stock class
    if kernel == "triton":
        name = type(base).__name__
        classes = next((classes for kind, classes in NORMS.items() if isinstance(base, kind)), None)
        if asked and not classes:
            raise UserError(f"kernel=triton knows the norms of Llama and Mistral, not those of {name}; use kernel=auto")
        told = f"{install_norms(base, *classes)} norms and the loss" if classes else f"the loss; {name} keeps its norms"
        runtime.say(f"  Triton's kernels compute {told}")
    install_loss(base, kernel)


def refuse_what_the_loss_would_not_heed(model: torch.nn.Module, base: torch.nn.Module) -> None:
    head_weight(base)
    name, head = type(base).__name__, base.get_output_embeddings()
    if head._forward_hooks or head._forward_pre_hooks:
        raise UserError(f"a hook on the output head of {name} would never run: the loss reads the head's matrix alone")
    own = vars(base).get("forward")
    where = getattr(own, "__globals__", {}).get("__name__", type(own).__name__)  # __module__ may be the wrapped one's
    if own and "swapped" not in vars(base) and not where.startswith("trl."):  # TRL's loss is ours to replace
        raise UserError(f"this {name} has a forward of its own ({where}), which the loss would pass over")
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise UserError("virtual tokens (PEFT's prompt learning) are not supported with targets; use LoRA")


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
    """After this, model(input_ids=…, position_ids=…, targets=…) returns `loss`: the sum of -log p over targets.

    targets int64 [B, T]: what each position has to predict (labels shifted left), -100 where nothing. token_weights
    fp32 [B, T]: what each target's -log p is multiplied by. num_items, more than 0: what the sum is divided by; on a
    CPU that spares the pass over the head's gradient which a later division would take. With per_token=True, `loss` is
    fp32 [B, T], 0 where ignored, without gradients. Without targets the forward is the class's own, so generation is
    unchanged. A PEFT or DDP wrapper around the model passes the arguments through.
    """
    own_forward = type(base).forward

    @functools.wraps(own_forward)  # generate() checks its arguments against this signature
    def forward(
        self,
        *args,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: Tensor | float | None = None,
        per_token: bool = False,
        **kwargs,
    ):
        if targets is None:
            return own_forward(self, *args, **kwargs)
        refuse_arguments(targets, *args, **kwargs)
        given = (decode(self, **kwargs), head_weight(self), targets.flatten())
        if per_token:
            return CausalLMOutput(loss=-linear_log_probs(*given, kernel=kernel).view_as(targets))
        weights = None if token_weights is None else token_weights.flatten()
        how = dict(reduction="sum", token_weights=weights, num_items=num_items, kernel=kernel)
        return CausalLMOutput(loss=linear_cross_entropy(*given, **how))

    base.forward = types.MethodType(forward, base)
    base.swapped = Swapped()


class Swapped:
    """On every swapped model. Pickle would look `forward` up by name and find the class's own, which drops targets."""

    def __deepcopy__(self, memo) -> "Swapped":
        return self

    def __reduce__(self):
        raise UserError("a model with our loss cannot be pickled; use save_pretrained(), load it and install() again")


def refuse_arguments(targets: Tensor, *args, **given) -> None:
    """With targets there are no logits, caches or tuples. PEFT passes None for what was not asked, Trainers False."""
    if args:
        raise UserError("with targets= every argument is a keyword; use model(input_ids=…, position_ids=…, targets=…)")
    values = {name: given.get(name) for name in NOT_WITH_TARGETS}
    wanted = [name for name, value in values.items() if torch.is_tensor(value) or value not in (None, False, 0)]
    wanted += ["return_dict=False"] if given.get("return_dict") is False else []
    if wanted:
        raise UserError(f"{', '.join(wanted)} cannot be had together with targets, which give the loss alone")
    ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
    expected = embedded.shape[:2] if ids is None else ids.shape
    if targets.shape != expected:
        raise UserError(
            f"targets {list(targets.shape)} do not fit the input's {list(expected)} (rows, tokens); virtual tokens "
            "(PEFT's prompt learning) are not supported"
        )


def head_weight(base: torch.nn.Module) -> Tensor:
    """The output head's matrix, PEFT's trained copy of it where there is one."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(getattr(head, "weight", None), Tensor) or getattr(head, "bias", None) is not None:
        raise UserError(f"{type(base).__name__} has no plain linear output head; its loss cannot be computed here")
    if hasattr(head, "base_layer"):
        raise UserError("an adapter on the output head would not be trained: the loss reads the head's own matrix")
    if head.weight.is_meta:
        raise UserError("the output head's matrix is not in memory (offloaded, or never loaded); keep it on the device")
    return head.weight


def decode(base, *, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **given) -> Tensor:
    """The decoder's last hidden states [B * T, H], made without a cache."""
    if base.config._attn_implementation.startswith("flash") and position_ids is not None and attention_mask is None:
        # Flash attention tells packed conversations apart in a batch of one row only: lay the rows end to end. Each
        # begins at position 0, so they stay apart as the conversations in them do.
        position_ids = position_ids.reshape(1, -1)
        input_ids = None if input_ids is None else input_ids.reshape(1, -1)
        inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[None]
    given |= dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
    given = {k: v for k, v in given.items() if v is not None} | {"use_cache": False, "return_dict": True}
    return base.base_model(inputs_embeds=inputs_embeds, **given).last_hidden_state.flatten(0, 1)


def targets_of(labels: Tensor) -> Tensor:
    """What position t predicts: the label at t + 1; the last position of a row predicts nothing. int64 [B, T]."""
    return shifted(labels, IGNORE)


def shifted(of_labels: Tensor, last: float) -> Tensor:
    """What belongs to the label at t + 1 stands at t, where that label is the target; [B, T]."""
    moved = torch.full_like(of_labels, last)
    moved[:, :-1] = of_labels[:, 1:]
    return moved
