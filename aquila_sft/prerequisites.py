"""What a recipe needs and was not given: what the recipes before it make, made first where that can be done here.

    tokenizer -> prepare -> pretrain -> anneal -> sft, sft_lora -> eval, chat

`scale=mini` has its text and conversations with it, so all of it can be made; elsewhere what is missing is named. Only
scale, tokenizer, kernel and debug reach the recipes before: a trial with another learning rate keeps its base.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from aquila_sft import checkpoint, narration, run_dir, runtime
from aquila_sft.config.model import KernelChoice
from aquila_sft.config.runs import ChatRun, EvalRun, PrepareRun, PretrainRun, Run, SftRun
from aquila_sft.errors import UserError

NEEDS = {
    "prepare": ("tokenizer",),
    "pretrain": ("prepare",),
    "anneal": ("prepare", "pretrain"),
    "sft": ("anneal",),
    "sft_lora": ("anneal",),
    "eval": ("sft",),
    "chat": ("sft",),
}
ComposeRun = Callable[[list[str]], Run]


def fill(cfg: Run, compose_run: ComposeRun) -> None:
    """Set the paths that `cfg` leaves open. The main process makes what is missing; the others call this afterwards.

    Raises UserError when something is missing that cannot be made here, and, before anything is made, for a kernel
    that cannot run here.
    """
    if cfg.kernel is KernelChoice.triton and not isinstance(cfg, PrepareRun):  # which computes nothing with it
        from aquila_sft import device, swap

        swap.choose_kernel(cfg.kernel, device.of_this_machine())
    if not open_needs(cfg):
        return
    chain = [name for name in all_needs(cfg.recipe) if not is_given(name, cfg)]
    runs = {name: compose_run(words(name, cfg)) for name in chain}
    uses = isinstance(cfg, ChatRun | EvalRun) and is_finished(runs["sft"])  # whatever it was made with
    if cfg.demo and runtime.is_main() and not uses:
        with runtime.alone():
            make(cfg, runs, compose_run)
    set_paths(cfg, runs)


def make(cfg: Run, runs: dict[str, Run], compose_run: ComposeRun) -> None:
    """Run the recipes before this one, in order. One that is finished, from the same input, reuses what it made."""
    total = len(runs) + 1
    for number, (name, run) in enumerate(runs.items(), 1):
        with narration.stage(number, total, run):
            set_paths(run, runs)
            try:
                importlib.import_module(f"aquila_sft.stages.{run.stage}").run(run, compose_run)
            except UserError as error:
                raise UserError(
                    f"recipe={name}, needed by recipe={cfg.recipe}: {error}; or give {GIVEN_BY[name]}"
                ) from None
    runtime.say(f"\nstage {total} of {total}, {cfg.recipe} -> {cfg.output_dir}")


def is_given(recipe: str, cfg: Run) -> bool:
    """Whether `cfg` names itself what that recipe before it would make."""
    if recipe == "pretrain":
        return isinstance(cfg, PretrainRun) and cfg.model.path is not None
    return recipe == "tokenizer" and has_tokenizer(cfg)


def has_tokenizer(cfg: Run) -> bool:
    tokenizer = getattr(cfg, "tokenizer", None)
    return bool(tokenizer and (tokenizer.path or tokenizer.ranks))


def open_needs(cfg: Run) -> bool:
    """Whether a path is left open that a recipe before this one would set."""
    match cfg:
        case PrepareRun():
            return not has_tokenizer(cfg)
        case PretrainRun():
            return cfg.data.shards is None or cfg.recipe == "anneal" and cfg.model.path is None
        case SftRun() | ChatRun() | EvalRun():
            return cfg.model.path is None
    return False


def made(run: Run, needed_by: Run) -> str:
    """The folder that a finished recipe left: for an anneal the last checkpoint, with its moments, else final/."""
    if not is_finished(run):
        raise UserError(
            f"recipe={needed_by.recipe} scale={needed_by.scale} needs what recipe={run.recipe} makes, and "
            f"{run.output_dir}/final is not there: first run `python train.py recipe={run.recipe} "
            f"scale={run.scale} …`, or give {GIVEN_BY[run.recipe]}, or try it all with scale=mini"
        )
    out = run_dir.RunDir(Path(run.output_dir))
    if needed_by.recipe == "anneal" and run.recipe == "pretrain":
        newest, last = checkpoint.newest(out.checkpoints), out.summary().get("steps")
        if newest and checkpoint.step_of(newest) == last:  # else final/, whose weights are those of the last step
            return str(newest)
    return str(out.final)


def set_paths(cfg: Run, runs: dict[str, Run], output: Callable[[Run, Run], str | None] = made) -> None:
    """The outputs of the recipes before, where `cfg` names none of its own; output(run, cfg): what a run left."""
    match cfg:
        case PrepareRun() if not has_tokenizer(cfg):
            cfg.tokenizer.path = output(runs["tokenizer"], cfg)
        case PretrainRun():
            cfg.data.shards = cfg.data.shards or output(runs["prepare"], cfg)
            if cfg.recipe == "anneal" and cfg.model.path is None:
                cfg.model.path = output(runs["pretrain"], cfg)
        case SftRun() if cfg.model.path is None:
            cfg.model.path = output(runs["anneal"], cfg)
        case ChatRun() | EvalRun() if cfg.model.path is None:
            cfg.model.path = output(runs["sft"], cfg)


GIVEN_BY = {
    "tokenizer": "tokenizer.path=<folder>, or tokenizer=aquila tokenizer.ranks=<qwen.tiktoken>",
    "prepare": "data.shards=<folder>",
    "pretrain": "model.path=<checkpoint>",
    "anneal": "model.path=<folder or Hub id>",
    "sft": "model.path=<folder or Hub id>",
}


def words(recipe: str, cfg: Run) -> list[str]:
    """The command line of a recipe before `cfg`'s: scale, tokenizer, kernel and debug pass, and name the run."""
    computes = recipe not in ("tokenizer", "prepare")
    passed = [f"kernel={cfg.kernel.value}"] if computes and cfg.kernel.value != "auto" else []
    if tokenizer := getattr(cfg, "tokenizer", None):
        passed += [
            f"tokenizer.{name}={value}" for name in ("path", "ranks") if (value := getattr(tokenizer, name)) is not None
        ]
    name = [f"run_name={recipe}-{run_dir.digest(dict(enumerate(passed)))[:8]}"] if passed else []
    return [
        f"recipe={recipe}",
        f"scale={cfg.scale}",
        *passed,
        *([f"debug={cfg.debug}"] if cfg.debug else []),
        *name,
    ]


def all_needs(recipe: str) -> tuple[str, ...]:
    """The recipes before this one, in the order in which they run."""
    before = [name for need in NEEDS.get(recipe, ()) for name in (*all_needs(need), need)]
    return tuple(dict.fromkeys(before))


def is_finished(run: Run) -> bool:
    return run_dir.RunDir(Path(run.output_dir)).is_finished()
