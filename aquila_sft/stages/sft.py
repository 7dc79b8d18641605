"""recipe=sft and recipe=sft_lora: a base model and conversations in, a model that answers out.

inputs -> run directory -> tokenizer -> packed rows -> model (+ adapter) -> training -> evaluation -> final/
"""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from aquila_sft import checkpoint, hub, run_dir, runtime
from aquila_sft.card import model_card
from aquila_sft.config import SftRun
from aquila_sft.data import sft_set
from aquila_sft.data.ledger import NothingLeft
from aquila_sft.data.rows import PackedRows
from aquila_sft.errors import Stopped, UserError
from aquila_sft.inputs import Inputs, find_inputs, load_tokenizer

if TYPE_CHECKING:
    from aquila_sft.device import Choices


def run(cfg: SftRun, compose_run: Callable[[list[str]], object]) -> None:
    local = cfg.data.files is not None and not hub.needs_hub(cfg.model.path)
    runtime.settle(offline=local)
    runtime.say(f"recipe={cfg.recipe} scale={cfg.scale}{' (demo)' if cfg.demo else ''}: {cfg.output_dir}")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(runtime.StopSignal())
        with runtime.main_process_first() as main:
            inputs = find_inputs(cfg)
            runtime.set_threads(runtime.world_size())
            from aquila_sft import device

            choices = device.choose(cfg.train)
            if main:
                contents = inputs.contents()
                identity = run_dir.identity_of(cfg, **contents) | {
                    "train.precision": choices.precision.value,
                    "train.attention": choices.attention,
                }
                out = stack.enter_context(run_dir.opened(cfg, identity))
            else:
                out = run_dir.RunDir(Path(cfg.output_dir))
            if out.is_finished() and is_whole(out.final):
                return closing(cfg, out, "is finished and of the same configuration: reused, nothing done")
            stack.enter_context(recorded(cfg, out))
            if main:
                checkpoint.clear_leftovers(out.checkpoints)
            newest = checkpoint.newest(out.checkpoints)
            tokenizer = load_tokenizer(cfg, inputs, out)
            if main:
                prepare_rows(cfg, inputs, out, tokenizer, contents["data"])
        for line in choices.reasons:
            runtime.say(f"  {line}")
        train(cfg, inputs, out, choices, tokenizer, newest, stop)
        closing(cfg, out, "done")


def prepare_rows(cfg: SftRun, inputs: Inputs, out: run_dir.RunDir, tokenizer, data_sha256: str) -> None:
    """Packed rows under data/ and ledger.json, by the main process, for all."""
    from functools import partial

    from tqdm import tqdm

    from aquila_sft.chat_template import encode_batch
    from aquila_sft.tokenizer import tokenizer_sha256

    policy = sft_set.RowPolicy(
        cfg.train.max_length, cfg.data.holdout_fraction, cfg.data.holdout_max, cfg.data.pack_window, cfg.seed
    )
    key = {
        "data": data_sha256,
        "tokenizer": tokenizer_sha256(tokenizer),
        "system": cfg.tokenizer.system,
    }
    encode = partial(encode_batch, tokenizer, default_system=cfg.tokenizer.system)
    progress = partial(tqdm, unit=" conversations", desc="preparing", mininterval=1.0, leave=False)
    about = {
        "files": [{"file": str(f), "bytes": f.stat().st_size} for f in inputs.data],
        "origin": inputs.origin,
    }
    try:
        ledger = sft_set.prepare(inputs.data, out.path / "data", encode, policy, key, progress)
    except NothingLeft as error:
        run_dir.write_json(out.path / "ledger.json", about | error.ledger)
        raise
    run_dir.write_json(out.path / "ledger.json", about | ledger)
    rows = ledger["rows"]["train"]
    told = f"  {ledger['read']:,} records read: {ledger['kept']:,} to train on, {ledger['held_back']:,} held back"
    if ledger["left_out"] or ledger["shortened"]:
        told += f", {ledger['left_out']:,} left out, {ledger['shortened']:,} shortened (ledger.json says why)"
    runtime.say(f"{told}; {rows['rows']:,} rows, {rows['filled']:.1%} full")


def is_whole(final: Path) -> bool:
    """False, after moving it aside, for a finished model whose files are not as they were written."""
    wrong = checkpoint.problem(final)
    if wrong and runtime.is_main():
        aside = final.with_name("damaged-final")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        runtime.say(f"{final} is damaged ({wrong}): moved to {aside}, made again from the last checkpoint")
    return wrong is None


def train(
    cfg: SftRun,
    inputs: Inputs,
    out: run_dir.RunDir,
    choices: "Choices",
    tokenizer,
    newest: Path | None,
    stop: runtime.StopSignal,
) -> None:
    import torch
    import transformers

    from aquila_sft import chat_template, device, evaluate, swap
    from aquila_sft.config import Precision
    from aquila_sft.log import MetricsFile
    from aquila_sft.trainer import Plan, SftTrainer

    transformers.utils.logging.disable_progress_bar()  # one bar, ours
    transformers.utils.logging.set_verbosity_error()  # model.load says what does not fit, in one line
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's, not ours to mend

    def autocast():
        return torch.autocast(choices.device, torch.bfloat16, enabled=choices.precision is Precision.bf16)

    net, parameters, trainable = make_model(cfg, inputs, choices, tokenizer)
    rows = PackedRows(out.path / "data" / "train")
    held_back = {p.name: PackedRows(p) for p in sorted((out.path / "data" / "held-back").glob("*"))}
    plan = Plan(cfg, len(rows), choices.device)
    done_steps = checkpoint.step_of(newest) if newest else 0
    runtime.say(
        f"  {plan.steps:,} steps of {plan.rows_per_step} rows x {cfg.train.max_length} tokens = {plan.epochs:.2f} "
        f"epochs; {runtime.world_size()} process(es) x {plan.accumulation} x {plan.micro_rows} rows"
        + (f"; going on from step {done_steps}" if newest else "")
    )
    metrics = MetricsFile(out.path / "metrics.jsonl", from_step=done_steps if newest else -1, last_step=plan.steps)

    def evaluation(net: torch.nn.Module) -> dict:
        return evaluate.answers(
            net,
            held_back,
            length=cfg.train.max_length,
            rows_at_once=plan.micro_rows,
            pad_id=tokenizer.pad_token_id,
            turn_end_id=chat_template.turn_end_id(tokenizer),
            autocast=autocast,
        )

    trainer = SftTrainer(
        cfg,
        model=net,
        tokenizer=tokenizer,
        rows=rows,
        plan=plan,
        choices=choices,
        folder=out.path,
        metrics=metrics,
        stop=stop,
        evaluation=evaluation,
    )
    swap.check_loss(net, choices.device, autocast())
    swap.check_isolation(net, choices.device, autocast())
    if runtime.is_main():
        out.begin()
    stop.finish_step = True
    if newest is None and held_back:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if trainer.state.global_step < plan.steps:
        raise Stopped(
            f"{stop.name} at step {trainer.state.global_step} of {plan.steps}; a checkpoint is in "
            f"{out.checkpoints}, the same command goes on from it"
        )
    if held_back:
        trainer.evaluate()

    seconds, logged = metrics.seconds(), metrics.read()
    net = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # no autocast in the merge gate
    with checkpoint.room(out.path):
        gate = save_final(cfg, out, net, tokenizer) if runtime.is_main() else {}
    if runtime.is_main():
        tokens = trainer.narrator.count_to(plan.steps)
        losses = [m["loss"] for m in logged if "loss" in m]
        evaluations = [m for m in logged if any(k.startswith("eval_") for k in m)]
        out.write_summary(
            status="done",
            stage=cfg.stage,
            recipe=cfg.recipe,
            scale=cfg.scale,
            demo=cfg.demo,
            steps=plan.steps,
            tokens=tokens,
            seconds=round(seconds, 1),
            tokens_per_s=round(tokens / seconds, 1),
            peak_memory_bytes=device.peak_memory_bytes(),
            parameters=parameters,
            trained_parameters=trainable,
            loss=losses[-1] if losses else None,
            first_loss=losses[0] if losses else None,
            **by_language(evaluations[-1] if evaluations else {}),
            before=by_language(evaluations[0] if evaluations else {}),
            **gate,
            device=choices.device,
            precision=choices.precision.value,
            attention=choices.attention,
            origin=inputs.origin,
        )


def make_model(cfg: SftRun, inputs: Inputs, choices: "Choices", tokenizer) -> tuple:
    """(model, its parameters, how many of model and adapter are trained); with LoRA the model wears its adapter."""
    from aquila_sft import lora, swap
    from aquila_sft import model as models

    net = (
        models.load(inputs.base, attention=choices.attention)
        if inputs.base
        else models.build(cfg.model, tokenizer, attention=choices.attention, seed=cfg.seed)
    )
    limit = getattr(net.config, "max_position_embeddings", cfg.train.max_length)
    if cfg.train.max_length > limit:
        raise UserError(f"train.max_length={cfg.train.max_length} is more than the {limit} positions of the model")
    models.fit_to_tokenizer(net, tokenizer)
    parameters = sum(p.numel() for p in net.parameters())
    if cfg.lora:
        net = lora.attach(net, cfg.lora, seed=cfg.seed)
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    runtime.say(
        f"  {type(swap.base_of(net)).__name__}, {parameters:,} parameters, {trainable:,} trained; "
        f"base: {cfg.model.path}"
    )
    return net, parameters, trainable


def by_language(metrics: dict) -> dict[str, dict[str, float]]:
    """{"eval_loss_en": 1, "eval_bits_per_byte_en": 2} -> {"eval_loss": {"en": 1}, "bits_per_byte": {"en": 2}}"""
    table: dict[str, dict[str, float]] = {"bits_per_byte": {}, "eval_loss": {}}
    for key, value in metrics.items():
        for prefix, name in (("eval_bits_per_byte_", "bits_per_byte"), ("eval_loss_", "eval_loss")):
            if key.startswith(prefix):
                table[name][key.removeprefix(prefix)] = round(value, 4)
    return table


def save_final(cfg: SftRun, out: run_dir.RunDir, net, tokenizer) -> dict:
    """final/, whole or absent; with LoRA the adapter first, then the merged model that passed the gate."""
    from aquila_sft import lora
    from aquila_sft import model as models

    gate = {}
    if cfg.lora:
        net.save_pretrained(out.path / "adapter", save_embedding_layers=False)
        net, difference = lora.merge(net, tokenizer, cfg.lora, cfg.tokenizer.system)
        gate = {"merge_difference": difference}
        runtime.say(
            f"merge gate: logits of merged and unmerged model differ by {difference:.1e} of the largest at most "
            f"(allowed: {cfg.lora.merge_tolerance:.1e})"
        )
    aside = out.path / ".writing-final"
    shutil.rmtree(aside, ignore_errors=True)
    models.save(net, tokenizer, aside)
    (aside / "README.md").write_text(model_card(cfg, run_dir.read_json(out.path / "ledger.json")), encoding="utf-8")
    checkpoint.commit(aside, out.final, recipe=cfg.recipe)
    return gate


@contextlib.contextmanager
def recorded(cfg: SftRun, out: run_dir.RunDir) -> Iterator[None]:
    """summary.json tells how the run stands, whatever ends it: running, done, stopped or failed."""
    about = {"stage": cfg.stage, "recipe": cfg.recipe, "scale": cfg.scale, "demo": cfg.demo}
    if runtime.is_main():
        out.write_summary(status="running", **about)
    try:
        yield
    except BaseException as error:
        if runtime.is_main():
            out.write_summary(
                status="stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed",
                **about,
                reason=str(error) or type(error).__name__,
            )
        raise


def closing(cfg: SftRun, out: run_dir.RunDir, state: str) -> None:
    """The last lines: where the model is, how good, and what to type next."""
    summary = out.summary()
    if figures := summary.get("bits_per_byte"):
        before = summary["before"]["bits_per_byte"]
        runtime.say(
            "bits per byte of held-back answers: "
            + ", ".join(
                f"{lang} {before.get(lang, float('nan')):.3f} -> {value:.3f}" for lang, value in figures.items()
            )
        )
    runtime.say(f"{out.final} {state}\n  talk to it: python train.py recipe=chat model.path={out.final}")
    if cfg.demo:
        runtime.say("  this was scale=mini; scale=135m is Aquila-135M on Infinity-Instruct")
