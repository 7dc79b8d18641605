"""What a run is told: one dataclass a stage, made of groups; each `check()` says what no type can say.

Every field has its value in recipes/*.yaml; a field has a default here only where `null` is a meaningful choice.
door.py makes these from YAML; below it there is no DictConfig.
"""

import enum
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

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


class DamagedBlocks(enum.StrEnum):
    stop = "stop"
    leave_out = "leave_out"


class Fault(enum.StrEnum):
    """What is done with a conversation that has a certain fault."""

    keep = "keep"
    mend = "mend"
    leave_out = "leave_out"


class Detector(enum.StrEnum):
    script = "script"
    library = "library"


class Executor(enum.StrEnum):
    processes = "processes"
    datatrove = "datatrove"
    slurm = "slurm"


class ScheduleKind(enum.StrEnum):
    cosine = "cosine"
    linear = "linear"
    one_minus_sqrt = "one_minus_sqrt"
    constant = "constant"
    wsd = "wsd"


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
class TextData:
    """Documents: text to learn a vocabulary from, or to be made into shards."""

    files: Any = None  # file, glob or list of them; {name: files, …} for several sources; null: what is bundled
    bundled: str | None = None  # `world`
    text_column: str = MISSING  # the field of a record that holds its text

    def check(self) -> None:
        if self.files is not None:
            named = self.files if self.files and isinstance(self.files, dict) else {"text": self.files}
            for name in named:
                check_source(str(name))
            self.files = {str(name): file_list(files) for name, files in named.items()}
        check_bundled(self.bundled)


@dataclass(kw_only=True)
class PrepareData(TextData):
    """Without files, corpora of the Hub: as many files of each as its share of what is downloaded allows."""

    corpora: dict[str, float] | None = None  # data/manifests/<name>.yaml -> weight among those of its language
    languages: dict[str, float] | None = None  # language -> weight, of the bytes that are downloaded
    download_gb: float | None = None  # of all corpora together, as they are on the Hub; null: all of them

    def check(self) -> None:
        super().check()
        for key in ("corpora", "languages"):
            for name, weight in (getattr(self, key) or {}).items():
                if not 0 <= weight < float("inf"):
                    raise UserError(f"data.{key}.{name}={weight} must be 0 or more")
        if self.download_gb is not None and self.download_gb <= 0:
            raise UserError(f"data.download_gb={self.download_gb} must be more than 0")


@dataclass(kw_only=True)
class Mixture:
    """Which shards are trained on, in what proportion of tokens. Weights need not add up to one."""

    shards: str | None = None  # folder made by recipe=prepare; null: this scale's own
    languages: dict[str, float] | None = None  # weight of each language; null: in proportion to their tokens
    sources: dict[str, float] | None = None  # weight of each source within a language; null: in proportion
    block_rows: int = MISSING  # rows after which the mixture is exact again
    max_epochs: float = MISSING  # a source repeated more often stops the run before it begins
    damaged_blocks: DamagedBlocks = MISSING  # of a shard: stop, or leave out the rows that touch them
    eval_bytes: int = MISSING  # held-back text that is evaluated, at most, for each source and language

    def check(self) -> None:
        for key, weights in (("languages", self.languages), ("sources", self.sources)):
            for name, weight in (weights or {}).items():
                if not 0 <= weight < float("inf"):
                    raise UserError(f"data.{key}.{name}={weight} must be 0 or more")
            if weights is not None and not sum(weights.values()) > 0:
                raise UserError(f"data.{key}={weights}: at least one weight must be more than 0")
        at_least("data", self, 1, "block_rows")
        at_least("data", self, 0, "eval_bytes")
        if self.max_epochs <= 0:
            raise UserError(f"data.max_epochs={self.max_epochs} must be more than 0")


@dataclass(kw_only=True)
class SlurmJobs:
    """What a cluster gives one task of an executor=slurm."""

    partition: str = MISSING
    time: str = MISSING  # as Slurm writes it: 12:00:00
    cpus_per_task: int = MISSING
    mem_per_cpu_gb: int = MISSING
    at_once: int | None = None  # tasks of a step that run at the same time; null: as many as Slurm lets
    setup: str | None = None  # a shell line before each task, as in `source .venv/bin/activate`
    sbatch: dict[str, str] = field(default_factory=dict)  # further options, {account: mine, qos: normal}


@dataclass(kw_only=True)
class Workers:
    """Who prepares text, and how much of it at a time."""

    slice_mb: float = MISSING  # of input: what one process works on at a time, and loses when it is killed
    workers: int | None = None  # processes; null: one for each core
    executor: Executor = MISSING
    tasks: int | None = None  # datatrove, slurm: of each step; null: as many as there are workers
    slurm: SlurmJobs | None = None

    def check_workers(self, group: str) -> None:
        at_least(group, self, 0.001, "slice_mb")
        at_least(group, self, 1, *[n for n in ("workers", "tasks") if getattr(self, n) is not None])
        if self.executor is Executor.slurm and (self.slurm is None or self.tasks is None):
            raise UserError(
                f"{group}.executor=slurm needs {group}.tasks= and {group}.slurm={{partition: …, time: …, "
                "cpus_per_task: …, mem_per_cpu_gb: …}; recipes/cluster/prepare_slurm.sh is an example"
            )


@dataclass(kw_only=True)
class ConversationPolicy:
    """What is done with a conversation that has a fault: keep it as it is, mend it, or leave it out."""

    system_tags: Fault = MISSING  # an instruction at the beginning that is tagged as an answer; mend: the system line
    tools: Fault = MISSING  # turns of tools; mend: calls become answers, results questions, definitions the system line
    last_turn: Fault = MISSING  # a question at the end that nobody answers; mend: cut it
    control_characters: Fault = MISSING  # mend: take them out, plain line ends; U+FFFD is nothing to mend
    html: Fault = MISSING  # entities and tags where nobody speaks of markup; mend: unescape, take out
    markers: Fault = MISSING  # <noinput> and the like; mend: take the line out of a question
    placeholders: Fault = MISSING  # {{name}} that nobody filled in
    identity: Fault = MISSING  # an answer says to be another's model; mend: put in the names below
    identity_name: str | None = None
    identity_maker: str | None = None
    disclaimers: Fault = MISSING  # "As an AI language model, …" in an answer
    too_long: Fault = MISSING  # more than a row; mend: without the oldest exchanges, as many as it takes
    detector: Detector = MISSING  # of the language: its script, or where that is Latin a library, too
    languages: list[str] | None = None  # of zh, en, other, those that stay; null: all
    duplicates: Fault = MISSING  # of an earlier conversation, word by word
    near_duplicates: float | None = None  # questions and answers this alike (5-grams) are copies; null: only equal ones

    def check(self) -> None:
        wrong = {"tools": "keep", "last_turn": "keep", "too_long": "keep"} | dict.fromkeys(
            ("placeholders", "disclaimers", "duplicates"), "mend"
        )
        for name, value in wrong.items():
            if getattr(self, name).value == value:
                ways = ", ".join(fault.value for fault in Fault if fault.value != value)
                raise UserError(f"data.clean.{name}={value} cannot be done; use one of {ways}")
        if self.identity is Fault.mend and not (self.identity_name and self.identity_maker):
            raise UserError(
                "data.clean.identity=mend needs the names to put in: data.clean.identity_name= and "
                "data.clean.identity_maker="
            )
        if self.languages is not None and not set(self.languages) <= {"zh", "en", "other"}:
            raise UserError(f"data.clean.languages={self.languages}: known are zh, en and other, as in [zh,en]")
        if self.near_duplicates is not None:
            within("data.clean", self, 0.6, 1.0, "near_duplicates")
            if self.duplicates is Fault.keep:
                raise UserError("data.clean.duplicates=keep: with near_duplicates set, equal ones are left out, too")


@dataclass(kw_only=True)
class SftData(Workers):
    files: Any = None  # local file, list or glob; null: the manifest, or what is bundled
    manifest: str | None = None  # data/manifests/<name>.yaml: a pinned Hub data set
    subset: str | None = None  # of the manifest
    bundled: str | None = None  # `world`
    holdout_fraction: float = MISSING  # conversations held back for evaluation, by hash of their content
    holdout_max: int = MISSING  # at most, per language
    pack_window: int = MISSING  # conversations packed together; larger fills better, mixes less
    clean: ConversationPolicy = MISSING
    unreadable: DamagedBlocks = MISSING  # a file that is not what its name says: stop, or leave out what cannot be read
    decontaminate: str | None = None  # folder of benchmark items; null: nothing is checked
    ngram_words: int = MISSING  # that a conversation shares with an item of a benchmark
    ngram_characters: int = MISSING  # the same for Chinese items
    cache: str | None = None  # folder of prepared sets, shared by runs; null: cache/ beside the run's directory

    def check(self) -> None:
        if self.files is not None:
            self.files = file_list(self.files)
        check_bundled(self.bundled)
        self.clean.check()
        self.check_workers("data")
        at_least("data", self, 5, "ngram_words", "ngram_characters")
        within("data", self, 0.0, 0.5, "holdout_fraction")
        at_least("data", self, 0, "holdout_max")
        at_least("data", self, 1, "pack_window")


@dataclass(kw_only=True)
class Bpe:
    """How a byte-level BPE is trained."""

    vocab_size: int = MISSING  # all entries, the special ones included
    max_token_bytes: int = MISSING  # no longer entry is learnt; a Chinese character has three bytes
    # characters: longer runs of Han are cut for training, or each would be a word of its own
    max_han_run: int = MISSING
    min_frequency: int = MISSING  # a pair seen less often is not merged
    max_bytes: int | None = None  # text used, languages balanced; null: all of it
    memory_gb: float | None = None  # stop when more would be needed; null: what this machine has free

    def check(self) -> None:
        at_least("bpe", self, 1, "max_han_run", "min_frequency")
        at_least("bpe", self, 4, "max_token_bytes")
        for name in ("max_bytes", "memory_gb"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"bpe.{name}={getattr(self, name)} must be more than 0")


@dataclass(kw_only=True)
class CleanPolicy:
    """What is no text to train on."""

    min_bytes: int = MISSING  # shorter documents are left out
    min_letters: float = MISSING  # share of letters and digits among what is not blank, at least
    max_repeated: float = MISSING  # share of characters in long lines that stood before in the document, at most

    def check(self) -> None:
        at_least("prepare.clean", self, 0, "min_bytes")
        within("prepare.clean", self, 0.0, 1.0, "min_letters")
        within("prepare.clean", self, 0.0, 1.0, "max_repeated")


@dataclass(kw_only=True)
class PreparePolicy(Workers):
    """How documents become shards."""

    clean: CleanPolicy = MISSING
    near_duplicates: float | None = None  # documents this alike (Jaccard, 5-grams) are copies; null: equal ones alone
    decontaminate: str | None = None  # folder of benchmark items; null: nothing is checked
    ngram_words: int = MISSING  # that a document shares with an item of a benchmark
    ngram_characters: int = MISSING  # the same for Chinese items
    shard_tokens: int = MISSING  # a shard is closed at the first document end after so many
    holdout_fraction: float = MISSING  # documents held back for evaluation, by hash of their content
    holdout_max_bytes: int = MISSING  # of text, at most, for each source and language

    def check(self) -> None:
        self.clean.check()
        at_least("prepare", self, 1, "shard_tokens")
        at_least("prepare", self, 0, "holdout_max_bytes")
        within("prepare", self, 0.0, 0.5, "holdout_fraction")
        if self.near_duplicates is not None:
            within("prepare", self, 0.6, 1.0, "near_duplicates")
        at_least("prepare", self, 5, "ngram_words", "ngram_characters")
        self.check_workers("prepare")


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
    *("template-of-base", "template-served", "untrained-ids", "answers-lost"),
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


TRAINING = ("pretrain", "anneal", "sft", "sft_lora")


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
    evaluate: dict[str, Any] | None = None  # at the end of training, recipe=eval on final/: {tasks: […], data: …}

    def check(self) -> None:
        if not re.fullmatch(r"[\w.+=-]+", self.run_name) or self.run_name in (".", ".."):
            raise UserError(f"run_name={self.run_name!r} must be one folder name of letters, digits, _ . + = -")
        if self.evaluate is not None and self.recipe not in TRAINING:
            raise UserError(f"evaluate= is for {', '.join(TRAINING)}; recipe={self.recipe} trains no model")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is outside 0 … {2**32 - 1}")
        out = Path(self.output_dir).absolute()
        if not (file := next(path for path in (out, *out.parents) if path.exists())).is_dir():
            raise UserError(f"output_dir={self.output_dir}: {file} is a file; choose another")

    def check_scale(self, *given: Any) -> None:
        """scale=mini, the default, is for the bundled world: input of one's own needs a scale that was asked for."""
        if self.scale == "mini" and not self.scale_is_explicit and (first := next(filter(None, given), None)):
            raise UserError(
                f"{first} with no scale= on the command line: scale=mini is the default and meant for small "
                "trials; add scale=135m for the real settings, or scale=mini if that is meant"
            )


@dataclass(kw_only=True)
class TokenizerRun(Run):
    """Without tokenizer.ranks a vocabulary is trained, with them the published one is converted."""

    tokenizer: Tokenizer = MISSING
    data: TextData = MISSING
    bpe: Bpe = MISSING

    def check(self) -> None:
        super().check()
        self.check_scale(self.data.files and f"data.files={shown(self.data.files)}")
        if self.tokenizer.path:
            raise UserError(f"tokenizer.path={self.tokenizer.path} is a tokenizer already; recipe=tokenizer makes one")


@dataclass(kw_only=True)
class PrepareRun(Run):
    tokenizer: Tokenizer = MISSING
    data: PrepareData = MISSING
    prepare: PreparePolicy = MISSING

    def check(self) -> None:
        super().check()
        self.check_scale(self.data.files and f"data.files={shown(self.data.files)}")


@dataclass(kw_only=True)
class PretrainRun(Run):
    """recipe=pretrain and recipe=anneal: shards in, a base model out."""

    model: Model = MISSING
    tokenizer: Tokenizer = MISSING  # for the recipes before this one; shards bring the vocabulary they were made with
    data: Mixture = MISSING
    optim: Optim = MISSING
    schedule: Schedule = MISSING
    train: PretrainTrain = MISSING

    def check(self) -> None:
        super().check()
        base = self.model.path not in (None, "random")
        self.check_scale(
            base and f"model.path={self.model.path}", self.data.shards and f"data.shards={self.data.shards}"
        )
        if self.recipe == "pretrain" and base:
            raise UserError(
                f"model.path={self.model.path}: recipe=pretrain starts from random weights; recipe=anneal goes on "
                "from a checkpoint"
            )
        if self.recipe == "anneal" and self.model.path == "random":
            raise UserError("model.path=random: recipe=anneal goes on from a checkpoint; recipe=pretrain begins")


@dataclass(kw_only=True)
class SftRun(Run):
    model: Model = MISSING
    tokenizer: Tokenizer = MISSING
    data: SftData = MISSING
    optim: Optim = MISSING
    schedule: Schedule = MISSING
    train: Train = MISSING
    audit: Audit = MISSING
    lora: Lora | None = None
    report_to: list[str] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        self.check_scale(
            self.model.path and f"model.path={self.model.path}",
            self.data.files and f"data.files={','.join(self.data.files)}",
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


CHECKED = ("tokenizer", "prepare", "pretrain", "anneal", "sft", "sft_lora")  # what recipe=check looks at


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
        for name in ("memory_gb", "disk_gb", "processes", "tokens_per_s"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"machine.{name}={getattr(self, name)} must be more than 0")
        if self.tokens_per_s and self.measured_by:
            raise UserError("machine.tokens_per_s= and machine.measured_by= are both set; keep one")


@dataclass(kw_only=True)
class CheckRun(Run):
    """recipe=check: another recipe, looked at and not run."""

    of: str = MISSING
    words: list[str] = MISSING  # that recipe's command line; set by cli.py
    sample: int = MISSING  # documents or conversations that are read at most
    machine: Machine = MISSING

    def check(self) -> None:
        super().check()
        if self.sample < 1:
            raise UserError(f"sample={self.sample} must be at least 1")


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

    def check(self) -> None:
        self.tasks = [self.tasks] if isinstance(self.tasks, str) else self.tasks
        if not isinstance(self.tasks, list) or not self.tasks or not all(isinstance(t, str) for t in self.tasks):
            raise UserError(f"eval.tasks={self.tasks!r} is not a name or a list of them, as in eval.tasks=[arc,piqa]")
        if self.references is not None:
            self.references = file_list(self.references)
        at_least("eval", self, 1, *[n for n in ("limit", "batch_tokens") if getattr(self, n) is not None])
        at_least("eval", self, 1, "max_new_tokens")


@dataclass(kw_only=True)
class EvalRun(Run):
    """data: the text whose bits per byte are measured, for eval.tasks=text."""

    model: Model = MISSING
    data: TextData = MISSING
    eval: Eval = MISSING

    def check(self) -> None:
        super().check()
        if self.model.path == "random":
            raise UserError("model.path=random: recipe=eval measures a model that exists; give its folder or Hub id")


SCHEMAS = {
    "check": CheckRun,
    "tokenizer": TokenizerRun,
    "prepare": PrepareRun,
    "pretrain": PretrainRun,
    "sft": SftRun,
    "eval": EvalRun,
    "chat": ChatRun,
}


def check_source(name: str) -> None:
    """Folders are called by it, and Hydra's grammar has to read it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"data.files: the source name {name!r} must be Latin letters, digits, _ and -")


def file_list(files: Any) -> list[str]:
    """A path, a glob or a list of them as a list."""
    listed = [files] if isinstance(files, str) else files
    if not isinstance(listed, list) or not listed or not all(isinstance(f, str) and f for f in listed):
        raise UserError(
            f"data.files={files!r} is not a file, a glob or a list of them; "
            "write data.files=a.jsonl or data.files=[a.jsonl,b.parquet]"
        )
    return listed


def shown(files: dict[str, list[str]]) -> str:
    return ",".join(f for listed in files.values() for f in listed)


def check_bundled(name: str | None) -> None:
    if name not in (None, "world"):
        raise UserError(f"data.bundled={name} is not one of world")


def at_least(group: str, values: object, low: float, *names: str) -> None:
    for name in names:
        if getattr(values, name) < low:
            raise UserError(f"{group}.{name}={getattr(values, name)} must be at least {low}")


def within(group: str, values: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(values, name) <= high:
            raise UserError(f"{group}.{name}={getattr(values, name)} is outside {low} … {high}")
