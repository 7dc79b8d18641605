"""What all training has, on paper: steps, learning rate, memory, disk and time."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from aquila_sft import bpe, runtime, schedule
from aquila_sft.config.model import Machine, Precision
from aquila_sft.config.runs import PretrainRun, SftRun
from aquila_sft.data.mixture import MixtureOrder
from aquila_sft.doctor import curve, estimate, examine, findings
from aquila_sft.doctor.curve import Curve, Phase
from aquila_sft.doctor.estimate import Portion, Shape
from aquila_sft.doctor.view import View
from aquila_sft.errors import UserError

if TYPE_CHECKING:
    from aquila_sft.plan import Plan

NOMINAL_STEPS = 1000  # of a run whose rows are not counted: a schedule in fractions looks the same at any length


def shape_of(view: View, base: Path | None, entries: int | None) -> Shape:
    """The architecture: the base's own, or that of the settings."""
    run: PretrainRun | SftRun = view.run
    if base:
        return Shape.of_config(examine.config_of(base))
    if entries is None and run.model.vocab_size is None:
        entries = view.compose_run(["recipe=tokenizer", f"scale={run.scale}"]).bpe.vocab_size
    return Shape.of_settings(run.model, entries)


def look_at_training(view: View, shape: Shape, num_rows: int | None, data: str) -> "Plan | None":
    """Steps, learning rate, memory, disk and time; the plan, where its length is known."""
    from aquila_sft.plan import Plan

    run: PretrainRun | SftRun = view.run
    machine = view.cfg.machine
    is_fresh = run.model.path == "random"
    view.add(findings.of_model(run.model, shape, run.train.max_length, is_fresh=is_fresh))
    device, is_bf16, available = view.attempt(device_of, run, machine) or (None, None, None)
    if device is None:
        return None
    is_known = num_rows is not None or run.train.num_epochs is None
    train = run.train if is_known else dataclasses.replace(run.train, num_epochs=None, max_steps=NOMINAL_STEPS)
    try:
        plan = Plan(
            train,
            num_rows or 1,
            device,
            is_smoke=False,
            processes=machine.processes,
            memory_bytes=available,
        )
    except UserError as wrong:
        view.error("portions", str(wrong))
        return None
    tokens = plan.steps * run.train.tokens_per_step
    if is_known:
        view.say("steps", f"{plan.steps:,} of {run.train.tokens_per_step:,} tokens = {tokens:,} tokens; {plan}")
    else:
        view.say("steps", f"not known before the rows are counted; {plan}")
    if run.debug:
        view.say("debug", f"debug={run.debug}: two steps of it would run")
    look_at_rates(view, plan.steps, data, is_fresh=is_fresh, is_known=is_known)
    if is_known:
        view.add(findings.of_length(run.train, plan.steps, demo=run.demo))
    look_at_memory(view, shape, plan, device, is_bf16, available)
    look_at_disk(view, shape, plan if is_known else None)
    look_at_time(view, tokens if is_known else None)
    return plan if is_known else None


def device_of(run: PretrainRun | SftRun, machine: Machine) -> tuple[str, bool, int | None]:
    """Device, whether products are in bf16, and the memory there is."""
    from aquila_sft import device

    name = machine.device or device.of_this_machine()
    if name == device.of_this_machine():
        choices = device.choose(run.train, run.kernel)
        is_bf16 = choices.precision is Precision.bf16
    else:
        is_bf16 = run.train.precision is not Precision.fp32 if name == "cuda" else run.train.precision is Precision.bf16
    if machine.memory_gb:
        return name, is_bf16, int(machine.memory_gb * 1e9)
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("machine.device=cuda: this machine has none, so say how large it is: machine.memory_gb=80")
        return name, is_bf16, torch.cuda.get_device_properties(0).total_memory
    free = bpe.free_bytes()
    return name, is_bf16, None if free is None else free + bpe.resident_bytes()


def look_at_rates(view: View, steps: int, data: str, *, is_fresh: bool, is_known: bool) -> None:
    run: PretrainRun | SftRun = view.run
    in_steps = run.schedule.warmup_steps >= 1 or (run.schedule.decay_steps or 0) >= 1
    if not is_known and in_steps:
        view.say("learning rate", "not known before the steps are")
        return
    phase = phase_of(run, steps, data)
    rates = phase.curve
    phases = [*before_anneal(view, rates), phase]
    for line in curve.plot(phases):
        runtime.say(f"    {line}")
    view.say(
        "learning rate", f"{rates.rates[0]:.3g} -> {max(rates.rates):.3g} -> {rates.rates[-1]:.3g} in the last step"
    )
    for other in phases:
        length = f"{other.curve.total:,}" if is_known or other is not phase else "unknown"
        view.say("phase", f"{other.name}: {length} steps on {other.data}")
    view.add(findings.of_curve(rates, run.optim.lr, falls=findings.falls(run.schedule)))
    view.add(findings.of_schedule(run.schedule, steps, is_anneal=run.recipe == "anneal", is_fresh=is_fresh))
    full = isinstance(run, PretrainRun) or run.lora is None
    view.add(findings.of_optimizer(run.optim, rates, run.model.initializer_range if full else None))


def phase_of(run: PretrainRun | SftRun, steps: int, data: str) -> Phase:
    return Phase(
        run.recipe, Curve.of(lambda step: run.optim.lr * schedule.multiplier(step, run.schedule, steps), steps), data
    )


def data_of(run: PretrainRun, order: MixtureOrder | None) -> str:
    if order:
        return ", ".join(order.parts)
    weights = run.data.languages or run.data.sources
    return ":".join(f"{name} {weight:g}" for name, weight in weights.items()) if weights else "all shards"


def before_anneal(view: View, rates: Curve) -> list[Phase]:
    """The pretraining that an anneal goes on from, where it is known; its last rate should be the anneal's first."""
    run = view.run
    if run.recipe != "anneal":
        return []
    phases = []
    if pretrain := view.before.get("pretrain"):
        steps = pretrain.train.max_steps or math.ceil(
            (pretrain.train.total_tokens or 0) / pretrain.train.tokens_per_step
        )
        if steps:
            phases = [phase_of(pretrain, steps, data_of(pretrain, None))]
    last = None
    if run.model.path and Path(run.model.path).is_dir():
        last = examine.rate_at(Path(run.model.path))
    if last is None and phases:
        last = phases[0].curve.rates[-1]
    if last is not None:
        where = f"model.path={run.model.path}:" if run.model.path else "at the end of recipe=pretrain"
        view.add(findings.of_edge(last, max(rates.rates), where))
    return phases


def look_at_memory(view: View, shape: Shape, plan: "Plan", device: str, is_bf16: bool, available: int | None) -> None:
    from aquila_sft.device import bf16_instructions

    run: PretrainRun | SftRun = view.run
    lora = run.lora if isinstance(run, SftRun) else None
    portion = Portion(
        plan.micro_rows,
        run.train.max_length,
        plan.accumulation,
        plan.processes,
        device,
        is_bf16,
        run.train.activation_checkpointing,
        products_in_bf16=device != "cpu" or bool(bf16_instructions()),
        trains_on_after_saving=run.train.save_steps < plan.steps,
    )
    need = estimate.memory(shape, portion, lora, program_bytes(run) if device == "cpu" else 0)
    trained = f", {shape.adapter_parameters(lora):,} of the adapter" if lora else ""
    view.say("model", f"{shape.parameters:,} parameters{trained}")
    limit = f" of {available / 1e9:.1f}" if available else ""
    view.say("memory", f"peak {need.peak / 1e9:.2f}{limit} GB on one {device}; at most, and not all at once:")
    told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in need.parts.items() if size)
    view.say("", told + ("" if device == "cpu" else " (not compared with a measurement)"))
    view.add(findings.of_memory(need.peak, available))


def program_bytes(run: PretrainRun | SftRun) -> int:
    """What a process of this run holds before it has a model: measured here, after importing what it imports."""
    from aquila_sft import evaluate, lora, pretrain, swap, tokenizer  # noqa: F401

    if isinstance(run, SftRun):
        from aquila_sft import trainer  # noqa: F401
    return bpe.resident_bytes()


def look_at_disk(view: View, shape: Shape, plan: "Plan | None") -> None:
    run: PretrainRun | SftRun = view.run
    kept = run.train.keep_checkpoints
    if plan:
        written = math.ceil(plan.steps / run.train.save_steps)
        kept = written if kept is None else min(kept, written)
    models = 0
    if isinstance(run, PretrainRun) and plan:
        from aquila_sft import intermediate

        models = intermediate.count(run.train.intermediate_steps, plan.steps)
    one, whole = estimate.disk(shape, run.lora if isinstance(run, SftRun) else None, kept or 1, models)
    free = view.free_disk
    count = f"{kept:,} checkpoint(s)" if kept else "all checkpoints"
    count += f" of {one / 1e9:.2f} GB" + (f", {models:,} models" if models else "")
    view.say("disk", f"{count} and final/: {whole / 1e9:,.2f} GB; {free / 1e9:,.1f} GB are free")
    view.add(findings.of_disk(one, whole, free))


def look_at_time(view: View, tokens: int | None) -> None:
    machine = view.cfg.machine
    rate, source = machine.tokens_per_s, "as stated"
    if rate is None:
        folder = Path(machine.measured_by or view.run.output_dir)
        rate, source = examine.tokens_per_s(folder), f"as measured by {folder}"
        if rate is None and machine.measured_by:
            view.error("input", f"machine.measured_by={folder}: no tokens_per_s in its metrics.jsonl")
    if rate is None or tokens is None:
        view.say("time", "not known; give machine.tokens_per_s=, or machine.measured_by=<the folder of a run>")
        return
    seconds = tokens / rate
    unit, size = next(
        (u, s) for u, s in (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1)) if seconds >= s or s == 1
    )
    view.say("time", f"{seconds / size:,.1f} {unit} at {rate:,.0f} tokens/s, {source}")
