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
from aquila_sft.config import Attention, KernelChoice, Precision, PretrainRun
from aquila_sft.data import mixture
from aquila_sft.data.shards import Part, Prepared
from aquila_sft.errors import UserError
from aquila_sft.inputs import BASE_FILES

if TYPE_CHECKING:
    from aquila_sft.device import Choices
    from aquila_sft.plan import Plan


def run(cfg: PretrainRun, compose_run: Callable[[list[str]], object]) -> None:
    runtime.settle(offline=not (cfg.model.path and hub.needs_hub(cfg.model.path)))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(runtime.StopSignal())
        with runtime.main_process_first() as main:
            narration.opening(cfg)
            prerequisites.fill(cfg, compose_run)
            prepared = Prepared(Path(cfg.data.shards))
            base = None if cfg.model.path == "random" else hub.model_folder(cfg.model.path, cfg.model.revision)
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

    from aquila_sft import device, evaluate, pretrain, swap
    from aquila_sft.data.text_rows import TextRows
    from aquila_sft.log import MetricsFile
    from aquila_sft.plan import Plan
    from aquila_sft.schedule import remarks
    from aquila_sft.tokenizer import load_tokenizer

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    def autocast():
        return torch.autocast(choices.device, torch.bfloat16, enabled=choices.precision is Precision.bf16)

    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    net = make_model(cfg, newest or base, out, choices, tokenizer)
    parts = {name: TextRows(part, cfg.train.max_length) for name, part in prepared.parts.items()}
    order = mixture_order(cfg, prepared, {name: len(rows) for name, rows in parts.items()})
    plan = Plan(cfg.train, int(order.rows.sum()), choices.device, is_smoke=cfg.debug == "smoke")
    check_epochs(cfg, order, plan)
    batches = pretrain.Batches(
        plan, order, [parts[name] for name in order.parts], cfg.train.max_length, tokenizer.pad_token_id
    )
    held_back = {
        name: TextRows(part, cfg.train.max_length) for name, part in prepared.held_back.items() if name in order.parts
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
    metrics = MetricsFile(out.path / "metrics.jsonl", from_step=done_steps if newest else -1, last_step=plan.steps)

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
            batches=batches,
            choices=choices,
            checkpoints=out.checkpoints,
            metrics=metrics,
            stop=stop,
            evaluation=evaluation,
        )
        asked = cfg.train.attention is not Attention.auto
        attention = swap.settle(net, trainer.accelerator.device, autocast(), asked=asked)
        if start := newest or base:
            has_moments = trainer.load_optimizer(start)
            if not newest:
                runtime.say(f"  optimizer: {'the moments of ' + str(start) if has_moments else 'begins anew'}")
        if runtime.is_main():
            out.begin()
        logged = trainer.run(done_steps)
    if runtime.is_main():
        trained_on = consumed(cfg, prepared, order, plan)
        run_dir.write_json(
            out.path / "ledger.json", {"shards": cfg.data.shards, "shards_sha256": prepared.sha256, "parts": trained_on}
        )
        with checkpoint.room(out.path):
            save_final(cfg, out, net, tokenizer, trained_on)
        seconds, tokens = metrics.seconds(), plan.steps * cfg.train.tokens_per_step
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
            device=choices.device,
            kernel=choices.kernel,
            precision=choices.precision.value,
            attention=attention,
        )


def mixture_order(cfg: PretrainRun, prepared: Prepared, num_rows: dict[str, int]) -> mixture.MixtureOrder:
    """The order of the run, over the parts that the mixture asks for."""
    shares = mixture.shares(
        {name: (p.source, p.language, p.tokens) for name, p in prepared.parts.items()},
        cfg.data.languages,
        cfg.data.sources,
    )
    told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    runtime.say(f"  mixture: {told} (shares of tokens)")
    return mixture.MixtureOrder(num_rows, shares, block_rows=cfg.data.block_rows, seed=cfg.seed, stage=cfg.recipe)


def consumed(cfg: PretrainRun, prepared: Prepared, order: mixture.MixtureOrder, plan: "Plan") -> dict[str, dict]:
    """What the whole run was trained on: part -> source, language, tokens, epochs."""
    epochs = order.epochs(plan.places)
    return {
        name: {
            "source": prepared.parts[name].source,
            "language": prepared.parts[name].language,
            "tokens": rows * cfg.train.max_length,
            "epochs": round(epochs[name], 3),
        }
        for name, rows in order.drawn(plan.places).items()
    }


def make_model(cfg: PretrainRun, start: Path | None, out: run_dir.RunDir, choices: "Choices", tokenizer):
    """Fresh weights, or those of a checkpoint whose vocabulary is the shards'."""
    from aquila_sft import model as models
    from aquila_sft.tokenizer import load_tokenizer, tokenizer_sha256

    if start is None:
        net = models.build(cfg.model, tokenizer, attention=choices.attention, seed=cfg.seed)
    else:
        own = load_tokenizer(start, converted_to=out.path / "tokenizer")
        if tokenizer_sha256(own, with_template=False) != tokenizer_sha256(tokenizer, with_template=False):
            raise UserError(
                f"model.path={cfg.model.path} has another vocabulary ({len(own):,} entries) than the shards "
                f"{cfg.data.shards} ({len(tokenizer):,}); prepare them with tokenizer.path={start}"
            )
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


def check_epochs(cfg: PretrainRun, order: mixture.MixtureOrder, plan: "Plan") -> None:
    """No source is repeated more often than data.max_epochs allows."""
    for name, epochs in order.epochs(plan.places).items():
        if epochs > cfg.data.max_epochs:
            raise UserError(
                f"{name} would be gone through {epochs:.1f} times and data.max_epochs={cfg.data.max_epochs:g}: "
                "train shorter, lower its weight, add text, or raise data.max_epochs"
            )


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
