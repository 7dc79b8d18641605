"""Settings of a model and of what is done to it: architecture, optimizer, schedule, training, audit, answers."""

import enum
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from aquila_sft.config.bounds import at_least, more_than_0, within
from aquila_sft.config.data import file_list
from aquila_sft.errors import UserError


class Precision(enum.StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Attention(enum.StrEnum):
    auto = "auto"
    sdpa = "sdpa"
    sdpa_by_document = "sdpa_by_document"
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
    one_minus_sqrt = "one_minus_sqrt"
    constant = "constant"
    wsd = "wsd"


class LossPer(enum.StrEnum):
    """What weighs alike in the loss of a step."""

    token = "token"
    answer_root = "answer_root"  # between the two: an answer weighs the root of its length
    answer = "answer"
    conversation = "conversation"


class Architecture(enum.StrEnum):
    mistral = "mistral"
    llama = "llama"


@dataclass(kw_only=True)
class Model:
    """Where the weights come from (`path`), and the architecture that `path=random` builds."""

    path: str | None = None  # folder, Hub id or `random`
    revision: str | None = None  # Hub only: a commit
    subfolder: str | None = None  # of `path`, where the model lies
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
        at_least("model", self, 1, *[n for n in ("vocab_size", "sliding_window") if getattr(self, n) is not None])
        at_least("model", self, 0, "rms_norm_eps", "initializer_range")
        at_least("model", self, 1, "rope_theta")
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
    decay_steps: float | None = None  # wsd: the last steps, or a fraction of all of them when below 1
    decay_kind: ScheduleKind | None = None  # wsd: linear, one_minus_sqrt or cosine

    def check(self) -> None:
        is_wsd = self.kind is ScheduleKind.wsd
        falling = (ScheduleKind.linear, ScheduleKind.one_minus_sqrt, ScheduleKind.cosine)
        if is_wsd and (self.decay_steps is None or self.decay_kind not in falling):
            raise UserError(
                "schedule.kind=wsd needs schedule.decay_steps= (0: none, an anneal decays later) and "
                "schedule.decay_kind=linear, one_minus_sqrt or cosine"
            )
        if is_wsd and (self.decay_steps < 0 or self.decay_steps >= 1 and self.decay_steps != int(self.decay_steps)):
            raise UserError(f"schedule.decay_steps={self.decay_steps} is neither whole steps nor a fraction below 1")
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
    eval_steps: int | None = None  # null: before the first and after the last step; pretraining: see eval_share
    keep_checkpoints: int | None = MISSING  # the newest so many; null: all of them

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
        at_least("train", self, 1, "tokens_per_step", "max_length", "logging_steps", "save_steps")
        nullable = ("micro_batch_rows", "eval_steps", "keep_checkpoints")
        at_least("train", self, 1, *[n for n in nullable if getattr(self, n) is not None])
        if self.tokens_per_step % self.max_length:
            below = self.tokens_per_step // self.max_length * self.max_length
            raise UserError(
                f"train.tokens_per_step={self.tokens_per_step} is not a multiple of "
                f"train.max_length={self.max_length}; use "
                + (f"{below} or " if below else "")
                + f"{below + self.max_length}"
            )


@dataclass(kw_only=True)
class SftTrain(Train):
    loss_per: LossPer = MISSING  # what weighs alike: every supervised token, every answer, every conversation


@dataclass(kw_only=True)
class PretrainTrain(Train):
    """What the loop of pretraining knows besides."""

    compile: Any = MISSING  # layers through torch.compile: auto (on a GPU), true, false
    intermediate_steps: int | None = MISSING  # a model is kept for good every so many steps; null: none
    eval_share: float = MISSING  # evaluations in the loop cost at most this share of the compute
    spike_sigma: float = MISSING  # an update so many standard deviations off is skipped; 0: only what is no number
    max_skipped: int = MISSING  # updates skipped, each forgiven after ten good ones; one more, and the run goes back
    max_rollbacks: int = MISSING  # one more, and it stops

    def check(self) -> None:
        super().check()
        if self.compile not in ("auto", True, False):
            raise UserError(f"train.compile={self.compile} is not one of auto, true, false")
        if self.intermediate_steps is not None:
            at_least("train", self, 1, "intermediate_steps")
        within("train", self, 0.0, 1.0, "eval_share")
        at_least("train", self, 0, "spike_sigma", "max_skipped", "max_rollbacks")


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


# What the audit of labels can find (aquila_sft/audit/).


AUDIT_CODES = (
    *("no-target", "all-target", "turn-end", "answer-not-supervised", "not-the-answer", "doubled-begin", "special-ids"),
    *("special-text", "broken-turns", "unknown-ids", "packing", "batch", "not-in-rows", "not-of-files", "pad-is-end"),
    *("template-of-base", "template-served", "untrained-ids", "broken-embedding", "answers-lost"),
)


@dataclass(kw_only=True)
class Audit:
    """The audit of labels before the first step."""

    lost_share: float = MISSING  # of all answer tokens, cut or left out because of the length of a row: more stops
    allow: list[str] = field(default_factory=list)  # findings that are told and do not stop, by their code

    def check(self) -> None:
        within("audit", self, 0.0, 1.0, "lost_share")
        for code in self.allow:
            if code not in AUDIT_CODES:
                raise UserError(f"audit.allow: {code} is not one of {', '.join(AUDIT_CODES)}")


def check_choosing(group: str, values: object) -> None:
    at_least(group, values, 0, "temperature")
    within(group, values, 0.0, 1.0, "top_p")
    more_than_0(group, values, "repetition_penalty")


@dataclass(kw_only=True)
class Generate:
    max_new_tokens: int = MISSING
    temperature: float = MISSING  # 0: greedy
    top_p: float = MISSING
    repetition_penalty: float = MISSING

    def check(self) -> None:
        at_least("generate", self, 1, "max_new_tokens")
        check_choosing("generate", self)


@dataclass(kw_only=True)
class Machine:
    """What a run is imagined on; null: this machine."""

    device: str | None = None  # cpu, cuda
    memory_gb: float | None = None  # of the device
    disk_gb: float | None = None  # free where the run would be written
    processes: int | None = None  # that train together
    tokens_per_s: float | None = None  # of all processes; null: as a run measured it, else not known
    measured_by: str | None = None  # the folder of that run; null: the run directory of the recipe that is checked

    def check(self) -> None:
        if self.device not in (None, "cpu", "cuda"):
            raise UserError(f"machine.device={self.device} is not one of cpu, cuda")
        more_than_0("machine", self, "memory_gb", "disk_gb", "processes", "tokens_per_s")
        if self.tokens_per_s and self.measured_by:
            raise UserError("machine.tokens_per_s= and machine.measured_by= are both set; keep one")


@dataclass(kw_only=True)
class Eval:
    """What is measured, on what data, and how much of it."""

    tasks: Any = MISSING  # names or groups: card, english, chinese, instruct, text, all, hellaswag, …
    data: str | None = None  # benchmarks: `hub`, or a folder with their original files
    limit: int | None = None  # items of a row at most, shared by its parts; null: all
    before: str | None = None  # a model for comparison on plain text: what tuning forgot
    references: Any = None  # conversations whose answers are scored: file, list or glob
    batch_tokens: int | None = None  # in one forward pass of one process; null: from the device
    share_prefixes: bool = MISSING  # the choices of a question in one row, behind the question once
    precision: Precision = MISSING
    max_new_tokens: int = MISSING  # of an answer in a chat
    temperature: float = MISSING  # in it, as in recipe=chat; 0: greedy
    top_p: float = MISSING
    repetition_penalty: float = MISSING

    def check(self) -> None:
        self.tasks = [self.tasks] if isinstance(self.tasks, str) else self.tasks
        if not isinstance(self.tasks, list) or not self.tasks or not all(isinstance(t, str) for t in self.tasks):
            raise UserError(f"eval.tasks={self.tasks!r} is not a name or a list of them, as in eval.tasks=[arc,piqa]")
        if self.references is not None:
            self.references = file_list(self.references, "eval.references")
        at_least("eval", self, 1, *[n for n in ("limit", "batch_tokens") if getattr(self, n) is not None])
        at_least("eval", self, 1, "max_new_tokens")
        check_choosing("eval", self)
