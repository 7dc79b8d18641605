"""Models in and out: build an architecture from numbers, load a folder strictly, save one that loads anywhere.

transformers' own classes throughout. Published Aquila checkpoints are MistralForCausalLM with a sliding window that
never bites, SmolLM2 is LlamaForCausalLM; any causal model whose loss is `lm_head(decoder(ids))` works (settle.py).
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aquila_sft import runtime
from aquila_sft.chat_template import stop_ids
from aquila_sft.config.model import Architecture, Model
from aquila_sft.errors import UserError
from aquila_sft.tokenizer import save_tokenizer


def build(cfg: Model, tokenizer: PreTrainedTokenizerBase, *, attention: str, seed: int) -> PreTrainedModel:
    """Fresh fp32 weights of the architecture in `cfg`, reproducible from `seed`. UserError on a vocabulary clash."""
    vocab_size = cfg.vocab_size or len(tokenizer)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is less than the tokenizer's {len(tokenizer)} entries; "
            "use that tokenizer's own size or model.vocab_size=null"
        )
    shape = {
        name: getattr(cfg, name)
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "initializer_range",
            "tie_word_embeddings",
        )
    }
    shape |= {
        "vocab_size": vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": attention,
    }
    torch.manual_seed(seed)
    if cfg.architecture is Architecture.mistral:
        return MistralForCausalLM(MistralConfig(sliding_window=cfg.sliding_window, **shape))
    return LlamaForCausalLM(LlamaConfig(**shape))


def load(folder: Path, *, attention: str = "sdpa") -> PreTrainedModel:
    """The causal language model of a local folder, in fp32, every weight accounted for.

    Raises UserError with counts when weights are missing, left over or of another shape. A redundant output head of a
    tied model, as BAAI's exporter writes it, is checked to be the embedding and dropped.
    """
    if not (folder / "config.json").is_file():
        kind = "a LoRA adapter; point at its merged model" if (folder / "adapter_config.json").is_file() else "no model"
        raise UserError(f"model.path={folder} holds {kind}: config.json is missing")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model.path={folder} has no *.safetensors; pickled weights are not read, convert them first")
    try:
        config = AutoConfig.from_pretrained(folder)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (ValueError, OSError, RuntimeError, AssertionError, KeyError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path={folder} cannot be loaded: {first}") from None
    faults = {
        kind: sorted(str(k[0] if isinstance(k, tuple) else k) for k in info[f"{kind}_keys"])
        for kind in ("missing", "unexpected", "mismatched")
    }
    if any(faults.values()):
        told = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in faults.items()
            if names
        )
        raise UserError(
            f"model.path={folder}: the weights do not fit {config.architectures or config.model_type}: {told}"
        )
    if config.tie_word_embeddings:
        check_tied(model, folder)
    return model


def check_tied(model: PreTrainedModel, folder: Path) -> None:
    """Input and output embedding are one tensor, and a stored head, if any, says the same."""
    stored = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            stored |= {
                name: weights.get_tensor(name)
                for name in weights.keys()
                if name in ("lm_head.weight", "model.embed_tokens.weight")
            }
    if len(stored) == 2 and not torch.equal(*stored.values()):
        raise UserError(
            f"model.path={folder}: config.json ties the output head to the embedding, but the stored "
            "lm_head.weight is another matrix; set tie_word_embeddings to false there, or remove the head"
        )
    model.tie_weights()
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise UserError(f"model.path={folder}: its output head could not be tied to its embedding")


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Grow the embedding for tokens that were added; begin, end and padding ids follow the tokenizer. Rows added."""
    rows = model.get_input_embeddings().num_embeddings
    added = max(0, len(tokenizer) - rows)
    if added:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    correct_marks(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = stop_ids(tokenizer)
    return added


def correct_marks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin and end of a text as the tokenizer has them, with a line where the model's configuration had others.

    Published pretraining checkpoints of Aquila-135M have 1 and 2 there, their class's defaults, which its vocabulary
    spells " and #: a text would end at its first #.
    """
    for name, mark in (("bos_token_id", "begin"), ("eos_token_id", "end")):
        stated, right = getattr(model.config, name), getattr(tokenizer, name)
        if stated is not None and stated != right:
            of_right = "none" if right is None else f"{right} ({tokenizer.convert_ids_to_tokens(right)})"
            runtime.say(
                f"  the model's configuration has {stated} as the token that a text {mark}s with, its vocabulary "
                f"{of_right}: corrected"
            )
        setattr(model.config, name, right)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict | None = None) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, without remote code or pickle.

    `weights`: a copy of model.state_dict() to write instead of the model's own.
    """
    model.config.use_cache = True  # training turned it off; generation wants it
    model.generation_config.eos_token_id = stop_ids(tokenizer)
    model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(tokenizer, folder)
    state_rope_theta(folder)


def state_rope_theta(folder: Path) -> None:
    """transformers 5 writes rope_theta inside rope_parameters only; 4.57 does not look there and takes 10000."""
    path = folder / "config.json"
    if path.is_file():
        config = json.loads(path.read_text("utf-8"))
        theta = (config.get("rope_parameters") or {}).get("rope_theta")
        if theta is not None:
            path.write_text(json.dumps(config | {"rope_theta": theta}, indent=2, sort_keys=True) + "\n", "utf-8")
