"""What is wrong with a run that has not begun: findings, each with what, where, which value, and what to do.

    rates of all steps, settings, figures of the data -> checks -> [Finding, …]

Nothing here reads a file or knows a recipe by name; examine.py gathers what is looked at. A check knows no single
mistake: it states what holds of every sound run. The rates, for one, are looked at as a curve, wherever they come from.
"""

import dataclasses
import math
from collections.abc import Iterator

from aquila_sft.config.model import Lora, Model, Optim, Schedule, ScheduleKind, Train
from aquila_sft.data.mixture import repeated_too_often
from aquila_sft.doctor.curve import Curve
from aquila_sft.doctor.estimate import Shape

ERROR, WARNING = "error", "warning"


@dataclasses.dataclass(frozen=True)
class Finding:
    """error: the run will stop, or not do what it is for. warning: it will run, and may be meant."""

    level: str
    code: str  # a name of its own for each kind
    text: str  # one line: where and which value, what, what to do

    def __str__(self) -> str:
        return f"{self.level:<8} {self.text} [{self.code}]"


def error(code: str, text: str) -> Finding:
    return Finding(ERROR, code, text)


def warning(code: str, text: str) -> Finding:
    return Finding(WARNING, code, text)


# ---- the learning rate, as a curve ----


def of_curve(curve: Curve, peak: float, *, falls: bool) -> Iterator[Finding]:
    """A rate rises once, to `peak`, is never 0 or outside 0 … peak, and if it `falls`, does so to the last step."""
    rates, total = curve.rates, curve.total
    outside = [(s, r) for s, r in zip(curve.steps, rates, strict=True) if not 0 <= r <= peak * (1 + 1e-9)]
    if outside:
        step, rate = outside[0]
        yield error(
            "rate-outside",
            f"step {step + 1:,} of {total:,}: the learning rate is {rate:.3g}, outside 0 … optim.lr={peak:g}; "
            "the schedule and the run do not count the same steps",
        )
        return
    if dead := curve.longest(lambda rate: rate == 0):
        first, end = dead
        yield error(
            "rate-zero",
            f"steps {first + 1:,} to {end:,} of {total:,} ({(end - first) / total:.0%} of the run): the rate is 0, "
            "nothing is trained; let the decay end with the last step, and optim.lr be more than 0",
        )
        return
    top = max(range(len(rates)), key=lambda i: rates[i])
    if rates[top] < 0.999 * peak:
        yield error(
            "rate-below-peak",
            f"optim.lr={peak:g} is never reached, the rate is {rates[top]:.3g} at most: the warm-up is longer than the "
            f"{total:,} steps of the run; shorten schedule.warmup_steps or train longer",
        )
        return
    if curve.steps[top] > 0.3 * total:
        yield warning(
            "warmup-long",
            f"the learning rate rises for {curve.steps[top] / total:.0%} of the run; shorten schedule.warmup_steps",
        )
    rising = next((i for i in range(top + 1, len(rates)) if rates[i] > rates[i - 1] * (1 + 1e-9)), None)
    if rising is not None:
        yield error(
            "rate-rises-again",
            f"step {curve.steps[rising] + 1:,} of {total:,}: the learning rate rises again, from "
            f"{rates[rising - 1]:.3g} to {rates[rising]:.3g}; a run has one warm-up",
        )
    if not falls or total < 3:
        return
    if rates[-1] > 0.999 * peak:
        yield error(
            "rate-never-falls",
            f"the learning rate is {rates[-1]:.3g} at the end as at its peak, though the schedule is a falling one; "
            "use schedule.min_lr_ratio=0 or 0.1, or schedule.kind=constant if that is meant",
        )
        return
    if rates[-1] > 0.5 * peak:
        yield warning(
            "rate-hardly-falls",
            f"the learning rate ends at {rates[-1] / peak:.0%} of optim.lr; lower schedule.min_lr_ratio",
        )
    flat = next((i for i in range(len(rates) - 1, 0, -1) if rates[i] != rates[i - 1]), 0)
    if curve.steps[flat] < 0.98 * (total - 1):
        yield error(
            "decay-ends-early",
            f"the decay ends at step {curve.steps[flat] + 1:,} of {total:,} and the rate stays at {rates[-1]:.3g}; "
            "let it end with the last step",
        )


def falls(schedule: Schedule) -> bool:
    return schedule.kind is not ScheduleKind.constant and (schedule.kind is not ScheduleKind.wsd or has_decay(schedule))


def has_decay(schedule: Schedule) -> bool:
    return bool(schedule.decay_steps)


def of_schedule(schedule: Schedule, total: int, *, is_anneal: bool, is_fresh: bool) -> Iterator[Finding]:
    """is_anneal: the phase whose point is the decay. is_fresh: the weights are random."""

    def steps(value: float) -> float:
        return value * total if value < 1 else value

    if is_anneal and not falls(schedule):
        yield error(
            "anneal-without-decay",
            f"schedule.kind={schedule.kind.value}: the rate does not fall, and falling is what an anneal is for; use "
            "schedule=decay, or recipe=pretrain to go on at a constant rate",
        )
    if is_fresh and steps(schedule.warmup_steps) < 1:
        yield warning(
            "no-warmup",
            f"schedule.warmup_steps={schedule.warmup_steps:g}: random weights at the full rate from the first step, "
            "when AdamW has seen one gradient; give at least 1 % of the steps",
        )
    if schedule.kind is ScheduleKind.wsd and has_decay(schedule):
        decay, stable = steps(schedule.decay_steps), total - steps(schedule.warmup_steps)
        if decay > stable:
            yield error(
                "no-stable-phase",
                f"schedule.decay_steps={schedule.decay_steps:g} and schedule.warmup_steps={schedule.warmup_steps:g} "
                f"are more than the {total:,} steps of the run; shorten them, or use schedule=cosine",
            )
        elif decay < 0.02 * total:
            # MiniCPM (arXiv 2404.06395, section 4.3): 10 % of the steps suffice, 2.5 % fall short
            yield warning(
                "decay-short",
                f"schedule.decay_steps={schedule.decay_steps:g} is {decay / total:.1%} of the run; a tenth is usual, "
                "2.5 % falls short (MiniCPM)",
            )
        elif decay > 0.5 * total:
            yield warning(
                "decay-long",
                f"schedule.decay_steps={schedule.decay_steps:g} is {decay / total:.0%} of the run; 10 to 20 % is usual",
            )


def of_edge(before: float, first: float, where: str) -> Iterator[Finding]:
    """Where one phase takes over from another, the rate goes on where it was."""
    if first > 2 * before:
        yield error(
            "rate-jumps-up",
            f"{where} the learning rate had fallen to {before:.3g}, and this run begins at {first:.3g}: what the decay "
            "won is lost; start from a checkpoint of the stable phase (before the decay), or decay in one phase only",
        )
    elif first < before / 2:
        yield warning(
            "rate-jumps-down",
            f"{where} the learning rate was {before:.3g}, and this run begins at {first:.3g}; optim.lr={before:.3g} "
            "goes on smoothly",
        )


# ---- optimizer and sizes ----


def of_optimizer(optim: Optim, curve: Curve, weight_std: float | None) -> Iterator[Finding]:
    """weight_std: the standard deviation of the weights that are trained, where it is known."""
    slow, fast = optim.betas[1], optim.betas[0]
    if optim.eps == 0:
        yield error(
            "eps-zero",
            "optim.eps=0: AdamW divides 0 by 0 for every entry of the vocabulary that a step has not seen; use 1e-8",
        )
    elif optim.eps > 1e-5:
        yield warning(
            "eps-large",
            f"optim.eps={optim.eps:g} outweighs the gradients of a language model, AdamW becomes plain momentum; "
            "use 1e-8",
        )
    if slow < fast:
        yield warning("betas-swapped", f"optim.betas={optim.betas}: the second is the longer memory; are they swapped?")
    if 1 / (1 - slow) > curve.total >= 50:
        yield warning(
            "beta-long",
            f"optim.betas={optim.betas}: AdamW averages over {1 / (1 - slow):,.0f} steps, the run has {curve.total:,}; "
            "lower the second one",
        )
    if optim.lr * optim.weight_decay >= 0.1:
        yield error(
            "decay-eats-weights",
            f"optim.weight_decay={optim.weight_decay:g}x optim.lr={optim.lr:g} takes "
            f"{optim.lr * optim.weight_decay:.0%} of every matrix in each step; use 0.1 or less",
        )
    elif optim.weight_decay > 0.5:
        yield warning(
            "weight-decay-large",
            f"optim.weight_decay={optim.weight_decay:g}; language models are trained with 0.01 to 0.1",
        )
    if optim.max_grad_norm == 0:
        yield warning(
            "no-clipping",
            "optim.max_grad_norm=0: gradients are not clipped, one bad batch can end the run; 1.0 is usual",
        )
    if not weight_std or optim.lr == 0:
        return
    # An update of AdamW moves a weight by about the rate, so the rate is to be read against the weights' own size.
    if optim.lr > weight_std / 2:
        yield error(
            "rate-large",
            f"optim.lr={optim.lr:g}: each step would move the weights by {optim.lr / weight_std:.0%} of their size "
            f"(standard deviation {weight_std:.3g}); use a tenth of that or less",
        )
    travelled = curve.total * sum(curve.rates) / len(curve.rates)
    if travelled < 0.01 * weight_std:
        yield error(
            "rate-small",
            f"optim.lr={optim.lr:g}: over all {curve.total:,} steps no weight can move by more than "
            f"{travelled / weight_std:.2%} of the weights' size; raise it",
        )


def of_length(train: Train, total: int, *, demo: bool) -> Iterator[Finding]:
    if total < 2 and not demo:
        yield error(
            "one-step",
            f"the run is one step of train.tokens_per_step={train.tokens_per_step:,}; lower it, or train longer",
        )
    if total >= 500 and train.save_steps > total / 2:
        yield warning(
            "saved-rarely",
            f"train.save_steps={train.save_steps:,} of {total:,} steps: a crash loses up to "
            f"{min(1, train.save_steps / total):.0%} of the run; save at least ten times",
        )
    if train.keep_checkpoints == 1:
        yield warning(
            "one-checkpoint",
            "train.keep_checkpoints=1: the only one may be damaged; keep 2",
        )
    if train.logging_steps > total:
        yield warning("logged-never", f"train.logging_steps={train.logging_steps:,} of {total:,} steps: lower it")
    if train.eval_steps and train.eval_steps > total:
        yield warning(
            "evaluated-never",
            f"train.eval_steps={train.eval_steps:,} of {total:,} steps: evaluated before and after only; lower it",
        )


def of_model(model: Model, shape: Shape, max_length: int, *, is_fresh: bool) -> Iterator[Finding]:
    if max_length > shape.max_position_embeddings:
        yield error(
            "rows-too-long",
            f"train.max_length={max_length} is more than the {shape.max_position_embeddings} positions of the model",
        )
    if not is_fresh:
        return
    if model.sliding_window and model.sliding_window < max_length and model.architecture == "mistral":
        yield warning(
            "window-bites",
            f"model.sliding_window={model.sliding_window} is less than train.max_length={max_length}: tokens do not "
            "see the beginning of their row; raise it",
        )
    usual = 1 / math.sqrt(model.hidden_size)
    if not usual / 4 <= model.initializer_range <= usual * 4:
        yield Finding(
            ERROR if not 0 < model.initializer_range <= 1 else WARNING,
            "init-off",
            f"model.initializer_range={model.initializer_range:g}; 1/sqrt(hidden size) is {usual:.3g}",
        )
    # The slowest rotary pair turns once in 2 pi theta^((D-2)/D) tokens; positions further apart look alike.
    longest = 2 * math.pi * model.rope_theta ** ((model.head_dim - 2) / model.head_dim)
    if longest < max_length:
        yield warning(
            "theta-small",
            f"model.rope_theta={model.rope_theta:g}: the slowest rotary pair turns once in {longest:,.0f} tokens, less "
            f"than train.max_length={max_length}; raise it",
        )
    if not 0 < model.rms_norm_eps <= 1e-3:
        yield warning("norm-eps", f"model.rms_norm_eps={model.rms_norm_eps:g}; 1e-5 or 1e-6 is usual")


def of_adapter(lora: Lora, shape: Shape) -> Iterator[Finding]:
    whole = sum(n * m for n, m in shape.adapted(lora))
    if shape.adapter_parameters(lora) >= shape.num_hidden_layers * whole > 0:
        yield error(
            "rank-too-large",
            f"lora.r={lora.r}: the adapter has more parameters than the matrices it adapts; lower it, or recipe=sft",
        )
    scale = lora.alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    if lora.alpha == 0:
        yield error("adapter-off", "lora.alpha=0: the adapter is multiplied by 0; use lora.alpha=lora.r")
    elif not 0.1 <= scale <= 16:
        yield warning(
            "adapter-scale",
            f"lora.alpha={lora.alpha:g}, lora.r={lora.r}: its output is multiplied by {scale:g}",
        )


# ---- what it takes ----


def of_memory(peak: int, available: int | None) -> Iterator[Finding]:
    if available and peak > 0.9 * available:
        yield Finding(
            ERROR if peak > available else WARNING,
            "memory",
            f"{peak / 1e9:.1f} GB at the peak, the device has {available / 1e9:.1f}: lower train.micro_batch_rows, or "
            "train.activation_checkpointing=true (less memory, a third more time)",
        )


def of_disk(one: int, all_of_it: int, free: int | None) -> Iterator[Finding]:
    """The run needs room for two checkpoints to be safe, and for all of them to end."""
    if free is not None and all_of_it > free:
        yield Finding(
            ERROR if 2 * one > free else WARNING,
            "disk",
            f"checkpoints and final/ will take {all_of_it / 1e9:,.1f} GB, {free / 1e9:,.1f} are free: raise "
            "train.save_steps, set train.keep_checkpoints, or move them away as the run goes",
        )


def of_epochs(epochs: dict[str, float], limit: float) -> Iterator[Finding]:
    for line in repeated_too_often(epochs, limit):
        yield error("epochs", line)
