"""What a run is told, one dataclass a stage, made of groups; door.py makes them from YAML."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from aquila_sft.config.data import Bpe, Mixture, PrepareData, PreparePolicy, SftData, TextData
from aquila_sft.config.model import (
    Audit,
    Eval,
    Generate,
    KernelChoice,
    Lora,
    Machine,
    Model,
    Optim,
    PretrainTrain,
    Schedule,
    SftTrain,
    Tokenizer,
)
from aquila_sft.errors import UserError

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
    train: SftTrain = MISSING
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


def shown(files: dict[str, list[str]]) -> str:
    return ",".join(f for listed in files.values() for f in listed)
