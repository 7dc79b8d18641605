"""The typed door: composed YAML goes in, one dataclass per stage comes out, or one line that says what is wrong.

Below this door there is no DictConfig. Every field has its value in recipes/*.yaml; a field has a default here only
where `null` is a meaningful choice. `load()` checks names and types, each `check()` what no type can say.
"""

import dataclasses
import difflib
import enum
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from aquila_sft.errors import UserError


class Precision(enum.StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Attention(enum.StrEnum):
    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


class KernelChoice(enum.StrEnum):
    auto = "auto"
    triton = "triton"
    torch = "torch"


class ScheduleKind(enum.StrEnum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Architecture(enum.StrEnum):
    mistral = "mistral"
    llama = "llama"


@dataclass(kw_only=True)
class Model:
    """Where the weights come from (`path`), and the architecture that `path=random` builds."""

    path: str | None = None  # folder, Hub id or `random`
    revision: str | None = None  # Hub only: a commit
    architecture: Architecture = MISSING
    vocab_size: int | None = None  # null: as many as the tokenizer has
    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING
    intermediate_size: int = MISSING
    max_position_embeddings: int = MISSING
    sliding_window: int | None = None  # mistral only
    rope_theta: float = MISSING
    rms_norm_eps: float = MISSING
    initializer_range: float = MISSING
    tie_word_embeddings: bool = MISSING

    def check(self) -> None:
        at_least(
            "model",
            self,
            1,
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; rotary embeddings need an even one")


@dataclass(kw_only=True)
class Tokenizer:
    path: str | None = None  # folder; null: the model's own
    ranks: str | None = None  # tiktoken rank file of the published vocabulary, to be converted
    system: str | None = None  # the system line a conversation gets that has none; null: no line
    add_chat_tokens: bool = MISSING  # add <|im_start|>, <|im_end|> to a vocabulary that lacks them

    def check(self) -> None:
        if self.path and self.ranks:
            raise UserError(f"tokenizer.path={self.path} and tokenizer.ranks={self.ranks} are both set; keep one")


@dataclass(kw_only=True)
class SftData:
    files: Any = None  # local file, list or glob; null: the manifest
    manifest: str | None = None  # data/manifests/<name>.yaml: a pinned Hub data set
    subset: str | None = None  # of the manifest
    holdout_fraction: float = MISSING  # conversations held back for evaluation, by hash of their content
    holdout_max: int = MISSING  # at most, per language
    pack_window: int = MISSING  # conversations packed together; larger fills better, mixes less

    def check(self) -> None:
        if self.files is not None:
            files = [self.files] if isinstance(self.files, str) else self.files
            if not isinstance(files, list) or not files or not all(isinstance(f, str) and f for f in files):
                raise UserError(
                    f"data.files={self.files!r} is not a file, a glob or a list of them; "
                    "write data.files=chat.jsonl or data.files=[a.jsonl,b.parquet]"
                )
            self.files = files
        within("data", self, 0.0, 0.5, "holdout_fraction")
        at_least("data", self, 0, "holdout_max")
        at_least("data", self, 1, "pack_window")


@dataclass(kw_only=True)
class Optim:
    lr: float = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING

    def check(self) -> None:
        within("optim", self, 0.0, 10.0, "lr")
        at_least("optim", self, 0, "eps", "weight_decay", "max_grad_norm")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optim.betas={self.betas} must be two numbers in [0, 1), as in [0.9,0.95]")


@dataclass(kw_only=True)
class Schedule:
    kind: ScheduleKind = MISSING
    warmup_steps: float = MISSING  # steps, or a fraction of all of them when below 1
    min_lr_ratio: float = MISSING  # the rate at the end, as a fraction of optim.lr

    def check(self) -> None:
        at_least("schedule", self, 0, "warmup_steps")
        within("schedule", self, 0.0, 1.0, "min_lr_ratio")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise UserError(f"schedule.warmup_steps={self.warmup_steps} is neither whole steps nor a fraction below 1")


@dataclass(kw_only=True)
class Train:
    """How long, in what portions. Exactly one of max_steps, total_tokens, num_epochs decides the length."""

    max_steps: int | None = None
    total_tokens: int | None = None
    num_epochs: float | None = None
    tokens_per_step: int = MISSING  # over all processes and micro-batches; a multiple of max_length
    max_length: int = MISSING  # tokens in a row
    micro_batch_rows: int | None = None  # rows in one forward pass of one process; null: from the device
    precision: Precision = MISSING
    attention: Attention = MISSING
    activation_checkpointing: bool = MISSING
    logging_steps: int = MISSING
    save_steps: int = MISSING
    eval_steps: int | None = None  # null: only before the first and after the last step
    keep_checkpoints: int = MISSING

    def check(self) -> None:
        lengths = {n: getattr(self, n) for n in ("max_steps", "total_tokens", "num_epochs")}
        given = {n: v for n, v in lengths.items() if v is not None}
        if len(given) != 1:
            shown = ", ".join(f"train.{n}={v}" for n, v in given.items()) or "none of them"
            raise UserError(
                f"exactly one of train.max_steps, train.total_tokens, train.num_epochs decides how long "
                f"to train; set: {shown}; put the others to null"
            )
        for name, value in given.items():
            if value <= 0:
                raise UserError(f"train.{name}={value} must be more than 0")
        at_least("train", self, 1, "tokens_per_step", "max_length", "logging_steps", "save_steps", "keep_checkpoints")
        at_least("train", self, 1, *[n for n in ("micro_batch_rows", "eval_steps") if getattr(self, n) is not None])
        if self.tokens_per_step % self.max_length:
            below = self.tokens_per_step // self.max_length * self.max_length
            raise UserError(
                f"train.tokens_per_step={self.tokens_per_step} is not a multiple of "
                f"train.max_length={self.max_length}; use "
                + (f"{below} or " if below else "")
                + f"{below + self.max_length}"
            )


@dataclass(kw_only=True)
class Lora:
    r: int = MISSING
    alpha: float = MISSING
    dropout: float = MISSING
    targets: Any = MISSING  # `all-linear` or a list of module names
    use_dora: bool = MISSING
    use_rslora: bool = MISSING
    merge_tolerance: float = MISSING  # largest |merged - unmerged| logit, relative to the largest |logit|

    def check(self) -> None:
        at_least("lora", self, 1, "r")
        within("lora", self, 0.0, 0.99, "dropout")
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise UserError(f"lora.targets={self.targets!r} must be all-linear or a list such as [q_proj,v_proj]")
        self.targets = targets


@dataclass(kw_only=True)
class Generate:
    max_new_tokens: int = MISSING
    temperature: float = MISSING  # 0: greedy
    top_p: float = MISSING
    repetition_penalty: float = MISSING

    def check(self) -> None:
        at_least("generate", self, 1, "max_new_tokens")
        at_least("generate", self, 0, "temperature")
        within("generate", self, 0.0, 1.0, "top_p")
        if self.repetition_penalty <= 0:
            raise UserError(f"generate.repetition_penalty={self.repetition_penalty} must be more than 0; 1 is off")


@dataclass(kw_only=True)
class Run:
    """What every run has."""

    stage: str = MISSING
    recipe: str = MISSING
    scale: str = MISSING
    scale_is_explicit: bool = MISSING  # set by train.py: `scale=` stood on the command line
    demo: bool = MISSING
    seed: int = MISSING
    run_name: str = MISSING
    output_dir: str = MISSING
    overwrite: bool = MISSING
    kernel: KernelChoice = MISSING
    debug: str | None = None

    def check(self) -> None:
        if not re.fullmatch(r"[\w.+=-]+", self.run_name) or self.run_name in (".", ".."):
            raise UserError(f"run_name={self.run_name!r} must be one folder name of letters, digits, _ . + = -")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is outside 0 … {2**32 - 1}")
        if self.kernel is KernelChoice.triton:
            raise UserError(
                "kernel=triton: this version has no Triton kernel for the loss yet; use kernel=auto or torch"
            )


@dataclass(kw_only=True)
class TokenizerRun(Run):
    tokenizer: Tokenizer = MISSING

    def check(self) -> None:
        super().check()
        if not self.tokenizer.ranks:
            raise UserError(
                "tokenizer.ranks is not set: recipe=tokenizer converts a published tiktoken vocabulary; "
                "add tokenizer=aquila tokenizer.ranks=<qwen.tiktoken>"
            )


@dataclass(kw_only=True)
class SftRun(Run):
    model: Model = MISSING
    tokenizer: Tokenizer = MISSING
    data: SftData = MISSING
    optim: Optim = MISSING
    schedule: Schedule = MISSING
    train: Train = MISSING
    lora: Lora | None = None
    report_to: list[str] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        if self.scale == "mini" and not self.scale_is_explicit:
            given = f"model.path={self.model.path}" if self.model.path else None
            given = given or (f"data.files={','.join(self.data.files)}" if self.data.files else None)
            if given:
                raise UserError(
                    f"{given} with no scale= on the command line: scale=mini is the default and meant for "
                    "small trials; add scale=135m for the real settings, or scale=mini if that is meant"
                )
        if self.model.path == "random" and self.train.max_length > self.model.max_position_embeddings:
            raise UserError(
                f"train.max_length={self.train.max_length} is more than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )


@dataclass(kw_only=True)
class ChatRun(Run):
    model: Model = MISSING
    generate: Generate = MISSING
    system: str | None = None  # null: the model's own system line
    prompt: str | None = None  # answer this and leave
    prompts: str | None = None  # answer a file: one prompt a line, or jsonl with `prompt` or `messages`

    def check(self) -> None:
        super().check()
        if self.prompt is not None and self.prompts is not None:
            raise UserError("prompt= and prompts= are both set; keep one")


SCHEMAS = {"tokenizer": TokenizerRun, "sft": SftRun, "chat": ChatRun}


def load(cfg: DictConfig) -> Run:
    """The composed configuration as a checked dataclass. Raises UserError, one line."""
    schema = SCHEMAS[cfg.stage]
    try:
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    except OmegaConfBaseException as error:
        raise UserError(explain(error, schema, cfg)) from None
    for value in [getattr(run, f.name) for f in dataclasses.fields(run)]:
        if hasattr(value, "check"):
            value.check()
    run.check()
    return run


def explain(error: OmegaConfBaseException, schema: type, cfg: DictConfig) -> str:
    """One line for an OmegaConf error: the key, its value, what is valid."""
    key = error.full_key or str(error.key)
    if isinstance(error, ConfigKeyError):
        return f"{key} is not a setting of stage {cfg.stage}{nearest(key, setting_names(schema))}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; add {key}=<value>"
    what = error.msg.splitlines()[0] if error.msg else str(error)
    if isinstance(error, ValidationError):
        found = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", what)
        if found:
            return f"{key}={found[1]} is not one of {found[2]}"
        found = re.search(r"Value '(.*)' of type '.*' could not be converted to (\w+)", what)
        if found:
            wanted = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
            return f"{key}={found[1]} is not {wanted.get(found[2], found[2])}"
        if "ListConfig" in what:
            return f"{key}={OmegaConf.select(cfg, key)} is not a list; write {key}=[…,…]"
        if "None" in what:
            return f"{key} cannot be null"
    return f"{key}: {what}"


def setting_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of every field of a dataclass, nested ones included."""
    names = []
    for f in dataclasses.fields(schema):
        names.append(prefix + f.name)
        inner = next((t for t in (f.type, *getattr(f.type, "__args__", ())) if dataclasses.is_dataclass(t)), None)
        if inner:
            names += setting_names(inner, f"{prefix}{f.name}.")
    return names


def nearest(name: str, choices: list[str]) -> str:
    """'; did you mean x?' for the closest of `choices`, or '' when none is close."""
    last = {c.rsplit(".", 1)[-1]: c for c in choices}  # `lr=1e-4` means `optim.lr`
    found = [last[name]] if name in last else difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if not found:
        found = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.75)]
    return f"; did you mean {found[0]}?" if found else ""


def at_least(group: str, values: object, low: float, *names: str) -> None:
    for name in names:
        if getattr(values, name) < low:
            raise UserError(f"{group}.{name}={getattr(values, name)} must be at least {low}")


def within(group: str, values: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(values, name) <= high:
            raise UserError(f"{group}.{name}={getattr(values, name)} is outside {low} … {high}")
