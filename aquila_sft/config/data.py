"""Settings of what is read and how it is prepared: documents, conversations, mixtures, vocabularies to be learnt."""

import enum
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from aquila_sft.config.bounds import at_least, more_than_0, within
from aquila_sft.errors import UserError


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
        more_than_0("data", self, "download_gb")


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
        check_weights("data", self)
        at_least("data", self, 1, "block_rows")
        at_least("data", self, 0, "eval_bytes")
        more_than_0("data", self, "max_epochs")


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
class TextShare:
    """Text of pretraining among the rows of conversations, so that a model keeps what it learnt from it."""

    share: float = MISSING  # of all rows; 0: none
    shards: str | None = None  # folder made by recipe=prepare; null: this scale's own
    languages: dict[str, float] | None = None  # weight of each language; null: in proportion to their tokens
    sources: dict[str, float] | None = None  # weight of each source within a language; null: in proportion

    def check(self) -> None:
        if not 0 <= self.share < 1:
            raise UserError(f"data.text.share={self.share} must be at least 0 and less than 1")
        check_weights("data.text", self)


@dataclass(kw_only=True)
class SftData(Workers):
    files: Any = None  # local file, list or glob; null: the manifest, or what is bundled
    manifest: str | None = None  # data/manifests/<name>.yaml: a pinned Hub data set
    subset: str | None = None  # of the manifest
    bundled: str | None = None  # `world`
    holdout_fraction: float = MISSING  # conversations held back for evaluation, by hash of their content
    holdout_max: int = MISSING  # at most, per language
    packing: bool = MISSING  # several conversations to a row; false: one, padded to the longest of a micro-batch
    pack_window: int = MISSING  # conversations packed together; larger fills better, mixes less
    text: TextShare = MISSING
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
        self.text.check()
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
        more_than_0("bpe", self, "max_bytes", "memory_gb")


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


def check_weights(group: str, of: Mixture | TextShare) -> None:
    for key, weights in (("languages", of.languages), ("sources", of.sources)):
        for name, weight in (weights or {}).items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"{group}.{key}.{name}={weight} must be 0 or more")
        if weights is not None and not sum(weights.values()) > 0:
            raise UserError(f"{group}.{key}={weights}: at least one weight must be more than 0")


def check_source(name: str) -> None:
    """Folders are called by it, and Hydra's grammar has to read it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"data.files: the source name {name!r} must be Latin letters, digits, _ and -")


def file_list(files: Any, setting: str = "data.files") -> list[str]:
    """A path, a glob or a list of them as a list."""
    listed = [files] if isinstance(files, str) else files
    if not isinstance(listed, list) or not listed or not all(isinstance(f, str) and f for f in listed):
        raise UserError(
            f"{setting}={files!r} is not a file, a glob or a list of them; "
            f"write {setting}=a.jsonl or {setting}=[a.jsonl,b.parquet]"
        )
    return listed


def check_bundled(name: str | None) -> None:
    if name not in (None, "world"):
        raise UserError(f"data.bundled={name} is not one of world")
