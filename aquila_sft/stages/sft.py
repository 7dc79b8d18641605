"""recipe=sft and recipe=sft_lora: a base model and conversations in, a model that answers out.

inputs -> run directory -> tokenizer -> packed rows -> label audit -> model (+ adapter) -> training -> evaluation
-> final/
"""

import contextlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aquila_sft import cache, checkpoint, hub, narration, prerequisites, run_dir, runtime
from aquila_sft.card import model_card
from aquila_sft.config.model import Attention, Precision
from aquila_sft.config.runs import SftRun
from aquila_sft.data import sft_set, text_share
from aquila_sft.data.ledger import NothingLeft
from aquila_sft.data.rows import PackedRows
from aquila_sft.data.shards import Prepared
from aquila_sft.errors import Stopped, UserError
from aquila_sft.inputs import Inputs, find_inputs, load_tokenizer

if TYPE_CHECKING:
    from aquila_sft.device import Choices


def run(cfg: SftRun, compose_run: Callable[[list[str]], object]) -> None:
    has_data = cfg.data.files is not None or cfg.data.bundled is not None
    local = has_data and not (cfg.model.path and hub.needs_hub(cfg.model.path))
    runtime.settle(offline=local)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(runtime.StopSignal())
        with runtime.main_process_first() as main:
            narration.opening(cfg)
            prerequisites.fill(cfg, compose_run)
            inputs = find_inputs(cfg)
            text = text_share.prepared_of(cfg)
            runtime.set_threads(runtime.world_size())
            from aquila_sft import device

            choices = device.choose(cfg.train, cfg.kernel)
            if main:
                contents = inputs.contents() | benchmarks(cfg) | ({"data.text.shards": text.sha256} if text else {})
                identity = run_dir.identity_of(cfg, **contents) | {
                    "kernel": choices.kernel,
                    "train.precision": choices.precision.value,
                    "train.attention": choices.attention,
                }
                out = stack.enter_context(run_dir.opened(cfg, identity))
            else:
                out = run_dir.RunDir(Path(cfg.output_dir))
            if out.is_finished() and out.final_is_whole():
                return closing(cfg, out, "is finished and of the same configuration: reused, nothing done")
            stack.enter_context(out.recorded(cfg))
            if main:
                checkpoint.clear_leftovers(out.checkpoints)
            newest = checkpoint.newest(out.checkpoints)
            tokenizer = load_tokenizer(cfg, inputs, out)
            if text:
                text_share.same_ids(text, tokenizer)
            if main:
                ledger = prepare_rows(cfg, inputs, out, tokenizer, contents["data"], stack)
                audit_labels(cfg, inputs, out, tokenizer, ledger)
        for line in choices.reasons:
            runtime.say(f"  {line}")
        train(cfg, inputs, text, out, choices, tokenizer, newest, stop)
        closing(cfg, out, "done")


def benchmarks(cfg: SftRun) -> dict[str, str]:
    """Those that are looked for, by their contents."""
    if not cfg.data.decontaminate:
        return {}
    return {"data.decontaminate": sft_set.benchmarks_sha256(cfg.data.decontaminate)}


def prepare_rows(
    cfg: SftRun, inputs: Inputs, out: run_dir.RunDir, tokenizer, data_sha256: str, stack: contextlib.ExitStack
) -> dict:
    """Packed rows in the cache, where they stay until `stack` ends, and ledger.json; by the main process, for all.

    Returns the ledger.
    """
    from aquila_sft.data.chat_encoder import Encoder
    from aquila_sft.tokenizer import tokenizer_sha256

    policy = sft_set.policy_of(cfg)
    key = {
        "data": data_sha256,
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": checkpoint.digest(tokenizer.chat_template),
        "system": cfg.tokenizer.system,
    }
    whole_key = sft_set.key_of(key, policy)
    folder = cache.folder_of(cfg, whole_key)
    encode = Encoder(tokenizer, cfg.tokenizer.system, sft_set.aside_of(folder) / "encoder.json")
    about = {
        "files": [{"file": str(f), "bytes": f.stat().st_size} for f in inputs.data],
        "origin": inputs.origin,
        "prepared": str(folder.absolute()),
    }
    try:
        ledger, was_there = cache.prepared(
            folder,
            whole_key,
            stack,
            make=lambda: sft_set.prepare(inputs.data, folder, encode, policy, key, cfg.data),
        )
    except NothingLeft as error:
        run_dir.write_json(out.path / "ledger.json", about | error.ledger)
        raise
    run_dir.write_json(out.path / "ledger.json", about | ledger)
    rows = ledger["rows"]["train"]
    told = f"  {ledger['read']:,} records read: {ledger['kept']:,} to train on, {ledger['held_back']:,} held back"
    if ledger["left_out"] or ledger["shortened"]:
        told += f", {ledger['left_out']:,} left out, {ledger['shortened']:,} shortened (ledger.json says why)"
    filled = f"{rows['filled']:.1%} full" if cfg.data.packing else "a conversation each"
    runtime.say(f"{told}; {rows['rows']:,} rows, {filled}")
    runtime.say(f"  prepared rows {'reused' if was_there else 'made'}: {folder}")
    return about | ledger


def audit_labels(cfg: SftRun, inputs: Inputs, out: run_dir.RunDir, tokenizer, ledger: dict) -> None:
    """Raises UserError when the model would be trained on something else than the answers of these conversations."""
    from aquila_sft.audit import report

    about = report.Audited(cfg, tokenizer, inputs.base, inputs.data, Path(ledger["prepared"]), ledger)
    report.stop(report.audit(about, say=lambda name, text: runtime.say(f"  {name:<14}{text}")))


def train(
    cfg: SftRun,
    inputs: Inputs,
    text: Prepared | None,
    out: run_dir.RunDir,
    choices: "Choices",
    tokenizer,
    newest: Path | None,
    stop: runtime.StopSignal,
) -> None:
    import torch
    import transformers

    from aquila_sft import chat_template, device, evaluate, settle
    from aquila_sft.log import MetricsFile
    from aquila_sft.plan import Plan
    from aquila_sft.schedule import remarks
    from aquila_sft.trainer import GUARD, SftTrainer

    transformers.utils.logging.disable_progress_bar()  # one bar, ours
    transformers.utils.logging.set_verbosity_error()  # model.load says what does not fit, in one line
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's, not ours to mend

    def autocast():
        return torch.autocast(choices.device, torch.bfloat16, enabled=choices.precision is Precision.bf16)

    net, parameters, trainable = make_model(cfg, inputs, choices, tokenizer)
    prepared = Path(run_dir.read_json(out.path / "ledger.json")["prepared"])
    rows = text_share.MixedRows(PackedRows(prepared / "train"), cfg, text)
    if text:
        runtime.say(f"  {text_share.told(rows.order, rows.text_rows, len(rows.conversations))}")
    held_back = {p.name: PackedRows(p) for p in sorted((prepared / "held-back").glob("*"))}
    plan = Plan(cfg.train, len(rows), choices.device, is_smoke=cfg.debug == "smoke")
    for line in remarks(cfg.schedule, plan.steps):
        runtime.say(f"  {line}")
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
    if newest:
        trainer.guard.restore(run_dir.read_json(newest / GUARD))
    asked = cfg.train.attention is not Attention.auto
    attention = settle.settle(net, choices.device, autocast(), asked=asked)
    if runtime.is_main():
        out.begin()
    stop.finish_step = True
    with trainer.saver:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        trainer.saver.finish()
    if trainer.state.global_step < plan.steps:
        raise Stopped(
            f"{stop.name} at step {trainer.state.global_step} of {plan.steps}; a checkpoint is in "
            f"{out.checkpoints}, the same command goes on from it"
        )
    if held_back:
        trainer.evaluate()

    seconds, logged = metrics.seconds(), metrics.read()
    net = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # no autocast in the merge gate
    if text and runtime.is_main():
        ledger = run_dir.read_json(out.path / "ledger.json")
        trainer.narrator.count_to(plan.steps)
        of_text = {"shards": str(text.folder), "shards_sha256": text.sha256, "rows": dict(trainer.narrator.text_rows)}
        run_dir.write_json(out.path / "ledger.json", ledger | {"text": of_text})
    with checkpoint.room(out.path):
        gate = save_final(cfg, out, net, tokenizer) if runtime.is_main() else {}
    if runtime.is_main():
        figures = evaluate.of_run(logged)
        if inputs.questions:
            graded = take_test(cfg, inputs, out)
            figures |= graded["tuned"]
            figures["before"] |= graded.get("base", {})
        tokens = trainer.narrator.count_to(plan.steps)
        out.write_summary(
            cfg,
            "done",
            steps=plan.steps,
            tokens=tokens,
            seconds=round(seconds, 1),
            tokens_per_s=round(tokens / seconds, 1),
            peak_memory_bytes=device.peak_memory_bytes(),
            parameters=parameters,
            trained_parameters=trainable,
            **figures,
            **gate,
            device=choices.device,
            kernel=choices.kernel,
            precision=choices.precision.value,
            attention=attention,
            origin=inputs.origin,
        )


def make_model(cfg: SftRun, inputs: Inputs, choices: "Choices", tokenizer) -> tuple:
    """(model, its parameters, how many of model and adapter are trained); with LoRA the model wears its adapter."""
    import torch

    from aquila_sft import lora, swap
    from aquila_sft import model as models

    torch.manual_seed(cfg.seed)  # rows that the embedding grows by are drawn, and not in a checkpoint of an adapter
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


def save_final(cfg: SftRun, out: run_dir.RunDir, net, tokenizer) -> dict:
    """final/, whole or absent; with LoRA the adapter first, then the merged model that passed the gate."""
    from aquila_sft import lora
    from aquila_sft import model as models

    gate = {}
    if cfg.lora:
        aside = out.path / ".writing-adapter"
        shutil.rmtree(aside, ignore_errors=True)
        net.save_pretrained(aside, save_embedding_layers=False)
        shutil.rmtree(out.path / "adapter", ignore_errors=True)
        checkpoint.commit(aside, out.path / "adapter", recipe=cfg.recipe)
        net, difference = lora.merge(net, tokenizer, cfg.lora, cfg.tokenizer.system)
        gate = {"merge_difference": difference}
        runtime.say(
            f"merge gate: logits of merged and unmerged model differ by {difference:.1e} of the largest at most "
            f"(allowed: {cfg.lora.merge_tolerance:.1e})"
        )
    aside = out.path / ".writing-final"
    shutil.rmtree(aside, ignore_errors=True)
    models.save(net, tokenizer, aside)
    ledger = run_dir.read_json(out.path / "ledger.json")
    trained_on = f"{ledger['kept']:,} conversations" + (" and text" if "text" in ledger else "")
    card = model_card(cfg, ledger["by_language"], trained_on)
    (aside / "README.md").write_text(card, encoding="utf-8")
    checkpoint.commit(aside, out.final, recipe=cfg.recipe)
    return gate


def take_test(cfg: SftRun, inputs: Inputs, out: run_dir.RunDir) -> dict[str, dict]:
    """The world's questions, asked of the base and of the model that was saved; figures of each, answers in a file."""
    from aquila_sft import device, quiz
    from aquila_sft import model as models
    from aquila_sft.tokenizer import load_tokenizer

    questions = quiz.read_questions(inputs.questions)
    replies = {}
    tokenizer = load_tokenizer(out.final)
    for name, folder in (("base", inputs.base), ("tuned", out.final)):
        if folder:
            net = models.load(folder).to(device.of_this_machine())
            models.fit_to_tokenizer(net, tokenizer)
            replies[name] = quiz.ask(net, tokenizer, questions, cfg.tokenizer.system)
    quiz.write(out.path / quiz.FILE, questions, replies)
    return {name: quiz.figures(questions, of_model) for name, of_model in replies.items()}


def closing(cfg: SftRun, out: run_dir.RunDir, state: str) -> None:
    """The last lines: where the model is, how good, and what to type next."""
    if not runtime.is_main():
        return
    summary = out.summary()
    lines = []
    if "accuracy" in summary:
        from aquila_sft import quiz

        lines += [
            "",
            "the same questions before and after instruction tuning:",
            *quiz.examples(out.path / quiz.FILE, 4),
        ]
        lines += ["", *quiz.table(summary), f"  (all answers: {out.path / quiz.FILE})", ""]
    elif summary.get("bits_per_byte"):
        lines.append(f"bits per byte of held-back answers: {narration.before_and_after(summary)}")
    lines.append(f"{out.final} {state}")
    what_next = {"talk to it": f"python train.py recipe=chat model.path={out.final}"}
    if cfg.data.bundled:
        what_next["the real thing (README, From mini to 135m)"] = (
            f"accelerate launch train.py recipe={cfg.recipe} scale=135m"
        )
    narration.closing(cfg, *lines, what_next=what_next)
