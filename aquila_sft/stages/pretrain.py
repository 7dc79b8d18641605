"""recipe=pretrain and recipe=anneal: shards in, a base model out, with intermediate checkpoints.

shards -> run directory -> mixture -> model (fresh, or a checkpoint) -> training -> bits per byte -> final/
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aquila_sft import checkpoint, hub, narration, prerequisites, run_dir, runtime
from aquila_sft.card import model_card
from aquila_sft.config.data import DamagedBlocks
from aquila_sft.config.model import Attention, KernelChoice, Precision
from aquila_sft.config.runs import PretrainRun
from aquila_sft.data.shards import Part, Prepared
from aquila_sft.errors import UserError
from aquila_sft.inputs import BASE_FILES, same_vocabulary

if TYPE_CHECKING:
    from aquila_sft.device import Choices
    from aquila_sft.pretrain import Trainer


def run(cfg: PretrainRun, compose_run: Callable[[list[str]], object]) -> None:
    runtime.settle(offline=not (cfg.model.path and hub.needs_hub(cfg.model.path)))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(runtime.StopSignal())
        with runtime.main_process_first() as main:
            narration.opening(cfg)
            prerequisites.fill(cfg, compose_run)
            prepared = Prepared(Path(cfg.data.shards))
            base = (
                None
                if cfg.model.path == "random"
                else hub.model_folder(cfg.model.path, cfg.model.revision, cfg.model.subfolder)
            )
            runtime.set_threads(runtime.world_size())
            from aquila_sft import device

            choices = device.choose(cfg.train, cfg.kernel)
            if main:
                identity = run_dir.identity_of(
                    cfg,
                    data=prepared.sha256,
                    base=run_dir.folder_sha256(base, *BASE_FILES, "optimizer.pt") if base else "random",
                ) | {
                    "kernel": choices.kernel,
                    "train.precision": choices.precision.value,
                    "train.attention": choices.attention,
                    "train.compile": is_compiled(cfg, choices),
                }
                out = stack.enter_context(run_dir.opened(cfg, identity))
            else:
                out = run_dir.RunDir(Path(cfg.output_dir))
            if out.is_finished() and out.final_is_whole() and not has_lost_its_end(out):
                return closing(cfg, out, "is finished and of the same configuration: reused, nothing done")
            stack.enter_context(out.recorded(cfg))
            if main:
                out.checkpoints.mkdir(exist_ok=True)
                checkpoint.clear_leftovers(out.checkpoints)
            newest = checkpoint.newest(out.checkpoints)
        for line in choices.reasons:
            runtime.say(f"  {line}")
        train(cfg, prepared, base, out, choices, newest, stop)
        closing(cfg, out, "done")


def has_lost_its_end(out: run_dir.RunDir) -> bool:
    """The last checkpoint is damaged. It is made again: an anneal from an older one would begin before the end."""
    checkpoint.newest(out.checkpoints)  # moves damaged ones aside
    last = checkpoint.folder(out.checkpoints, out.summary()["steps"])
    return checkpoint.moved_aside(last).exists() and not last.exists()


def train(
    cfg: PretrainRun,
    prepared: Prepared,
    base: Path | None,
    out: run_dir.RunDir,
    choices: "Choices",
    newest: Path | None,
    stop: runtime.StopSignal,
) -> None:
    import torch
    import transformers

    from aquila_sft import device, evaluate, pretrain, settle, swap
    from aquila_sft.data.loader import Loader
    from aquila_sft.data.text_rows import TextRows
    from aquila_sft.log import MetricsFile
    from aquila_sft.schedule import remarks
    from aquila_sft.tokenizer import load_tokenizer

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    def autocast():
        return torch.autocast(choices.device, torch.bfloat16, enabled=choices.precision is Precision.bf16)

    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    net = make_model(cfg, newest or base, out, choices, tokenizer)
    loader = Loader.of_run(cfg, prepared, device=choices.device, pad_id=tokenizer.pad_token_id)
    plan, order = loader.plan, loader.order
    runtime.say(f"  mixture: {order} (shares of rows)")
    leave_out = cfg.data.damaged_blocks is DamagedBlocks.leave_out
    held_back = {
        name: TextRows(part, cfg.train.max_length, leave_out_damaged=leave_out)
        for name, part in prepared.held_back.items()
        if name in order.parts and cfg.data.eval_bytes
    }
    unseen = {prepared.parts[name].language for name in order.parts} - {
        prepared.held_back[name].language for name in held_back
    }
    if held_back and unseen:
        runtime.say(f"  nothing is held back of {', '.join(sorted(unseen))}: not evaluated")
    for line in remarks(cfg.schedule, plan.steps):
        runtime.say(f"  {line}")
    done_steps = checkpoint.step_of(newest) if newest else 0
    runtime.say(
        f"  {plan.steps:,} steps of {plan.rows_per_step} rows x {cfg.train.max_length} tokens; {plan}"
        + (f"; going on from step {done_steps}" if newest else "")
    )
    eval_rows = sum(evaluate.rows_evaluated(rows, cfg.data.eval_bytes) for rows in held_back.values())
    eval_steps, told = evaluate.in_the_loop(cfg.train, eval_rows * cfg.train.max_length, plan.steps)
    runtime.say(f"  {told}")
    # what was evaluated after the last step stands before its checkpoint, and stays
    metrics = MetricsFile(out.path / "metrics.jsonl", from_step=done_steps if newest else -1, last_step=plan.steps + 1)

    def evaluation(net: torch.nn.Module) -> dict:
        figures = evaluate.text(
            net,
            held_back,
            max_bytes=cfg.data.eval_bytes,
            rows_at_once=plan.micro_rows,
            pad_id=tokenizer.pad_token_id,
            marks=(tokenizer.bos_token_id, tokenizer.eos_token_id),
            autocast=autocast,
        )
        return with_languages(figures, prepared.held_back)

    with pretrain.accelerate_forgets():
        swap.install(net, choices.kernel, asked=cfg.kernel is KernelChoice.triton)
        trainer = pretrain.Trainer(
            cfg,
            model=net,
            tokenizer=tokenizer,
            loader=loader,
            choices=choices,
            folder=out.path,
            metrics=metrics,
            stop=stop,
            evaluation=evaluation,
            eval_steps=eval_steps,
        )
        asked = cfg.train.attention is not Attention.auto
        attention = settle.settle(net, trainer.accelerator.device, autocast(), asked=asked)
        if is_compiled(cfg, choices):
            settle.compile_layers(net, (plan.micro_rows, cfg.train.max_length), trainer.accelerator.device, autocast())
        if newest:
            trainer.restore(newest)
        elif base:
            has_moments = trainer.load_optimizer(base)
            runtime.say(f"  optimizer: {'the moments of ' + str(base) if has_moments else 'begins anew'}")
        if runtime.is_main():
            out.begin()
        with trainer.saver:
            logged = trainer.run(done_steps)
    if runtime.is_main():
        ledger = write_ledger(cfg, prepared, trainer, out)
        with checkpoint.room(out.path):
            save_final(cfg, out, net, tokenizer, ledger["parts"])
        seconds, tokens = trainer.metrics.seconds(), plan.steps * cfg.train.tokens_per_step
        out.write_summary(
            cfg,
            "done",
            steps=plan.steps,
            tokens=tokens,
            seconds=round(seconds, 1),
            tokens_per_s=round(tokens / seconds, 1),
            peak_memory_bytes=device.peak_memory_bytes(),
            parameters=sum(p.numel() for p in net.parameters()),
            **evaluate.of_run(logged),
            **{key: ledger[key] for key in ("verdict", "hash", "updates_left_out")},
            data_wait_share=mean_wait(logged),
            device=choices.device,
            kernel=choices.kernel,
            precision=choices.precision.value,
            attention=attention,
        )


def write_ledger(cfg: PretrainRun, prepared: Prepared, trainer: "Trainer", out: run_dir.RunDir) -> dict:
    """ledger.json: what the run was trained on, compared with its order and its shards, read again."""
    from aquila_sft import proof

    loader, counted = trainer.loader, trainer.consumed
    checkpoints = proof.ledgers(trainer.metrics.read(), loader.order.parts, loader.plan.steps, counted)
    verdict = proof.check(loader, checkpoints, max_rows=proof.ROWS_AT_THE_END)
    runtime.say(f"  ledger: {verdict}")
    epochs = counted.rows / loader.order.rows
    ledger = {
        "verdict": verdict,
        "hash": counted.hash,
        "shards": cfg.data.shards,
        "shards_sha256": prepared.sha256,
        "places_left_out": loader.skipped,
        "damaged": {
            name: {"rows": rows, "tokens": rows * cfg.train.max_length}
            for name, rows in zip(loader.order.parts, counted.damaged.tolist(), strict=True)
            if rows
        },
        "updates_left_out": int(trainer.guard.skipped),
        "parts": {
            name: {
                "source": prepared.parts[name].source,
                "language": prepared.parts[name].language,
                "rows": int(counted.rows[i]),
                "tokens": int(counted.rows[i]) * cfg.train.max_length,
                "targets": int(counted.targets[i]),
                "epochs": round(float(epochs[i]), 3),
            }
            for i, name in enumerate(loader.order.parts)
        },
    }
    run_dir.write_json(out.path / "ledger.json", ledger)
    return ledger


def mean_wait(logged: list[dict]) -> float | None:
    """Share of the training time that passed waiting for data."""
    shares = [m["data_wait_share"] for m in logged if "data_wait_share" in m]
    del shares[:1]  # nothing was read ahead
    return round(sum(shares) / len(shares), 6) if shares else None


def is_compiled(cfg: PretrainRun, choices: "Choices") -> bool:
    """Whether layers go through torch.compile; auto: on a GPU (what that gains was not measured), not on a CPU."""
    return choices.device == "cuda" if cfg.train.compile == "auto" else cfg.train.compile


def make_model(cfg: PretrainRun, start: Path | None, out: run_dir.RunDir, choices: "Choices", tokenizer):
    """Fresh weights, or those of a checkpoint whose vocabulary is the shards'."""
    from aquila_sft import model as models
    from aquila_sft.tokenizer import load_tokenizer

    if start is None:
        net = models.build(cfg.model, tokenizer, attention=choices.attention, seed=cfg.seed)
    else:
        own = load_tokenizer(start, converted_to=out.path / "tokenizer")
        same_vocabulary(cfg, own, tokenizer, start)
        net = models.load(start, attention=choices.attention)
        models.fit_to_tokenizer(net, tokenizer)
    limit = net.config.max_position_embeddings
    if cfg.train.max_length > limit:
        raise UserError(f"train.max_length={cfg.train.max_length} is more than the {limit} positions of the model")
    if cfg.train.activation_checkpointing:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = sum(p.numel() for p in net.parameters())
    runtime.say(f"  {type(net).__name__}, {parameters:,} parameters; base: {cfg.model.path}")
    return net


def with_languages(by_part: dict[str, dict], held_back: dict[str, Part]) -> dict[str, dict]:
    """Figures by part, and by language: means over its parts, weighted by the bytes of text that were evaluated."""
    by_language: dict[str, dict] = {}
    for language in sorted({held_back[name].language for name in by_part}):
        figures = [figures for name, figures in by_part.items() if held_back[name].language == language]
        total = sum(f["text_bytes"] for f in figures)
        by_language[language] = {
            key: sum(f[key] * f["text_bytes"] for f in figures) / total for key in ("loss", "bits_per_byte")
        }
    return by_part | by_language


def save_final(cfg: PretrainRun, out: run_dir.RunDir, net, tokenizer, trained_on: dict) -> None:
    """final/, whole or absent."""
    from aquila_sft import model as models

    aside = out.path / ".writing-final"
    shutil.rmtree(aside, ignore_errors=True)
    models.save(net, tokenizer, aside)
    languages = {part["language"] for part in trained_on.values()}
    tokens = sum(part["tokens"] for part in trained_on.values())
    card = model_card(cfg, languages, f"{tokens:,} tokens ({', '.join(trained_on)})")
    (aside / "README.md").write_text(card, encoding="utf-8")
    checkpoint.commit(aside, out.final, recipe=cfg.recipe)


def closing(cfg: PretrainRun, out: run_dir.RunDir, state: str) -> None:
    """The last lines: where the model is, how good, and what to type next."""
    if not runtime.is_main():
        return
    following = "anneal" if cfg.recipe == "pretrain" else "sft"
    base = checkpoint.newest(out.checkpoints) if following == "anneal" else out.final
    told = narration.before_and_after(out.summary())
    narration.closing(
        cfg,
        f"bits per byte of held-back text: {told or 'not measured, prepare held nothing back'}",
        f"{out.final} {state}",
        what_next={
            "go on from it": f"accelerate launch train.py recipe={following} scale={cfg.scale} model.path={base}"
        },
    )
