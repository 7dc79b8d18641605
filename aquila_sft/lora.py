"""LoRA: an adapter on a model, and its way back into the weights through a gate.

The gate: logits of the model with its adapter and of the merged model, on fixed prompts in both languages, in fp32.
What does not agree is not saved as a model.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aquila_sft.chat_template import encode_messages
from aquila_sft.config.model import Lora
from aquila_sft.door import nearest
from aquila_sft.errors import UserError

PROMPTS = (
    "What is the capital of China?",
    "法国的首都是哪里？",
    "3 + 4 = ?",
    "请用一句话介绍你自己。",
    "Write a haiku about the sea.",
    "def add(a, b):\n    return",
)


def attach(model: PreTrainedModel, cfg: Lora, *, seed: int) -> PeftModel:
    """The model with a fresh adapter, fp32, reproducible from `seed`. Raises UserError for targets that cannot be."""
    targets = checked_targets(model, cfg.targets)
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=cfg.r,
            lora_alpha=cfg.alpha,
            lora_dropout=cfg.dropout,
            target_modules=targets,
            use_dora=cfg.use_dora,
            use_rslora=cfg.use_rslora,
        ),
    )


def checked_targets(model: PreTrainedModel, targets: list[str]) -> str | list[str]:
    if targets == ["all-linear"]:
        return "all-linear"
    head = model.get_output_embeddings()
    outer = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if module is head or module is model.get_input_embeddings()
    }
    inner = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    for target in targets:
        last = target.rsplit(".", 1)[-1]
        if last in outer:
            why = "the loss reads the head's own matrix, an adapter on it would never be trained"
            if model.config.tie_word_embeddings:
                why = (
                    "embedding and output head are one matrix here, and merging an adapter on one of them changes "
                    "both, so the merged model would not be the trained one"
                )
            choices = f"choose among {', '.join(sorted(inner))} or all-linear"
            raise UserError(f"lora.targets: {target} is refused: {why}; {choices}")
        if last not in inner:
            raise UserError(
                f"lora.targets: the model has no linear layer {target}; it has {', '.join(sorted(inner))}"
                f"{nearest(last, sorted(inner))}"
            )
    return targets


def merge(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, cfg: Lora, system: str | None
) -> tuple[PreTrainedModel, float]:
    """The merged model, and the largest logit difference relative to the largest logit. The PEFT model is used up.

    Raises UserError above cfg.merge_tolerance; the adapter, saved before, is not lost.
    """
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError("merging wants fp32 weights: the sum would be rounded otherwise")
    model.eval()
    model.get_base_model().set_attn_implementation("sdpa")  # flash attention has no fp32
    before = prompt_logits(model, tokenizer, system)
    merged = model.merge_and_unload(safe_merge=True)
    after = prompt_logits(merged, tokenizer, system)
    scale = max(b.abs().max().item() for b in before)
    difference = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True)) / scale
    if not difference <= cfg.merge_tolerance:
        raise UserError(
            f"merge gate: merged and unmerged logits differ by {difference:.1e} of the largest, more than "
            f"lora.merge_tolerance={cfg.merge_tolerance:.1e}; the merged model was not saved, the adapter was"
        )
    return merged, difference


@torch.no_grad()
def prompt_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, system: str | None) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        logits = []
        for prompt in PROMPTS:
            ids, _ = encode_messages(
                tokenizer, [{"role": "user", "content": prompt}], default_system=system, add_generation_prompt=True
            )
            logits.append(model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu())
    return logits
