"""The training loop of a base model, over Accelerate: small enough to read in one sitting.

    step -> places -> MixtureOrder -> (part, row) -> batches -> sum of losses / targets of the whole step -> AdamW

Everything that a step does is a function of (seed, step) and the weights: batch, learning rate and mixture keep no
state, so a checkpoint is weights, optimizer moments and a step number, and going on is exact.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from aquila_sft import checkpoint, runtime, schedule
from aquila_sft import model as models
from aquila_sft.config import Optim, Precision, PretrainRun
from aquila_sft.data import text_rows
from aquila_sft.data.mixture import MixtureOrder
from aquila_sft.data.rows import IGNORE
from aquila_sft.data.text_rows import TextRows
from aquila_sft.device import Choices, peak_memory_bytes
from aquila_sft.errors import Stopped, UserError
from aquila_sft.log import Bar, MetricsFile
from aquila_sft.plan import Plan

OPTIMIZER = "optimizer.pt"  # tensors and numbers only: read with weights_only=True
STATE = "state.json"


@dataclasses.dataclass
class Batches:
    """What a step is trained on, for this process."""

    plan: Plan
    order: MixtureOrder
    parts: list[TextRows]  # as order.parts
    length: int
    pad_id: int

    def step(self, step: int) -> list[dict]:
        """The micro-batches of a step: input_ids, position_ids, targets, int64 [micro_rows, length] each."""
        share = self.plan.rows_per_step // runtime.world_size()
        first = step * self.plan.rows_per_step + runtime.rank() * share
        places = np.arange(first, first + share)
        chosen = [
            (self.parts[part], row) if place < self.plan.end else None
            for place, part, row in zip(places.tolist(), *(a.tolist() for a in self.order(places)), strict=True)
        ]
        at_once = self.plan.micro_rows
        return [text_rows.batch(chosen[i : i + at_once], self.length, self.pad_id) for i in range(0, share, at_once)]


class Trainer:
    """One run of the loop. `evaluation(model) -> {name: figures}` is called before, after and every eval_steps."""

    def __init__(
        self,
        cfg: PretrainRun,
        *,
        model: torch.nn.Module,
        tokenizer: object,
        batches: Batches,
        choices: Choices,
        checkpoints: Path,
        metrics: MetricsFile,
        stop: runtime.StopSignal,
        evaluation: Callable[[torch.nn.Module], dict],
    ) -> None:
        self.cfg, self.tokenizer, self.batches, self.plan = cfg, tokenizer, batches, batches.plan
        self.checkpoints, self.metrics, self.stop, self.evaluation = checkpoints, metrics, stop, evaluation
        self.accelerator = Accelerator(
            cpu=choices.device == "cpu", mixed_precision="bf16" if choices.precision is Precision.bf16 else "no"
        )
        if self.accelerator.num_processes != runtime.world_size():
            raise UserError(
                f"{runtime.world_size()} processes were launched, but this one trains in a world of "
                f"{self.accelerator.num_processes}: they would train apart (README, 'Launching')"
            )
        self.model = model  # the plain one: evaluated, saved
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model.to(self.accelerator.device), cfg.optim),
            lr=cfg.optim.lr,
            betas=tuple(cfg.optim.betas),
            eps=cfg.optim.eps,
            fused=True,
        )
        self.wrapped, self.prepared_optimizer = self.accelerator.prepare(model, self.optimizer)

    def load_optimizer(self, folder: Path) -> bool:
        """The moments of a checkpoint; False when it has none (a published model, a final/)."""
        if not (folder / OPTIMIZER).is_file():
            return False
        # to the CPU first: "cpu:0", as Accelerate names it among several processes, is nothing torch.load knows
        state = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(state)
        return True

    def run(self, first_step: int) -> list[dict]:
        """Train from `first_step` to the plan's end; returns what was logged."""
        cfg, plan = self.cfg, self.plan
        if first_step == 0:
            self.evaluate(0)
        bar = Bar(plan.steps, first_step)
        last_time, last_step = time.monotonic(), first_step
        self.stop.finish_step = True
        self.wrapped.train()
        nats = targets = torch.zeros((), device=self.accelerator.device)
        for step in range(first_step, plan.steps):
            lost, counted, grad_norm, lr = self.step(step)
            nats, targets, done = nats + lost, targets + counted, step + 1
            bar.step(1)
            stopped = self.asked_to_stop(done)
            if done % cfg.train.logging_steps == 0 or done in (1, plan.steps) or stopped:
                loss = (nats / targets.clamp(min=1)).item()
                now = time.monotonic()
                tokens_per_s = (done - last_step) * cfg.train.tokens_per_step / (now - last_time)
                self.check_finite(loss, done)
                self.metrics.write(
                    step=done,
                    tokens=done * cfg.train.tokens_per_step,
                    loss=loss,
                    lr=lr,
                    grad_norm=grad_norm.item(),
                    tokens_per_s=round(tokens_per_s, 1),
                    peak_memory_bytes=peak_memory_bytes(),
                    seconds=round(self.metrics.seconds(), 2),
                )
                bar.show(loss, tokens_per_s)
                nats = targets = torch.zeros((), device=self.accelerator.device)
                last_time, last_step = now, done
            if done % cfg.train.save_steps == 0 or done == plan.steps or stopped:
                self.save(done)
            if cfg.train.eval_steps and done % cfg.train.eval_steps == 0 and done < plan.steps:
                self.evaluate(done)
            if stopped:
                bar.close()
                raise Stopped(f"{self.stop.name}; step {done} of {plan.steps} is saved, the same command goes on")
        bar.close()
        self.stop.finish_step = False
        self.evaluate(plan.steps)
        return self.metrics.read()

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """One update; (nats, targets, gradient norm) as tensors on the device, and the learning rate."""
        lr = self.cfg.optim.lr * schedule.multiplier(step, self.cfg.schedule, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches = [{k: v.to(self.accelerator.device) for k, v in b.items()} for b in self.batches.step(step)]
        counted = sum((b["targets"] != IGNORE).sum() for b in batches).float()
        if runtime.world_size() > 1:
            dist.all_reduce(counted)
        lost = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, 1):
            with self.gradients_stay(number < len(batches)):
                nats = self.wrapped(**batch).loss
                # DDP averages over processes, hence the factor: the sum over the step / its targets everywhere
                self.accelerator.backward(nats / counted.clamp(min=1) * runtime.world_size())
            lost += nats.detach()
        limit = self.cfg.optim.max_grad_norm or float("inf")  # 0: no clipping, the norm is logged all the same
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        if runtime.world_size() > 1:
            dist.all_reduce(lost)
        return lost, counted, grad_norm, lr

    def gradients_stay(self, is_so: bool) -> contextlib.AbstractContextManager:
        """Between micro-batches processes do not exchange gradients."""
        return self.accelerator.no_sync(self.wrapped) if is_so else contextlib.nullcontext()

    def evaluate(self, step: int) -> None:
        figures = {
            f"eval_{name}_{part}": value
            for part, of_part in self.evaluation(self.model).items()
            for name, value in of_part.items()
            if name != "text_bytes"
        }
        seconds = round(self.metrics.seconds(), 2)
        self.metrics.write(step=step, tokens=step * self.cfg.train.tokens_per_step, seconds=seconds, **figures)

    def asked_to_stop(self, step: int) -> bool:
        """The same answer in every process: asked together, at logging steps only, because asking synchronises."""
        if runtime.world_size() == 1:
            return self.stop.name is not None
        if step % self.cfg.train.logging_steps:
            return False
        asked = torch.tensor(float(self.stop.name is not None), device=self.accelerator.device)
        dist.all_reduce(asked)
        return bool(asked)

    def check_finite(self, loss: float, step: int) -> None:
        if not np.isfinite(loss):
            good = checkpoint.newest(self.checkpoints)
            raise UserError(
                f"the loss is {loss} at step {step}; lower optim.lr={self.cfg.optim.lr} or look at the data; "
                f"last good checkpoint: {good.name if good else 'none'}"
            )

    def save(self, step: int) -> None:
        """A checkpoint: a model folder that transformers loads, the optimizer's moments, and where the run is."""
        target = checkpoint.folder(self.checkpoints, step)
        if runtime.is_main() and not target.exists():
            aside = self.checkpoints / f".writing-{step:06d}"
            with checkpoint.room(self.checkpoints.parent):
                models.save(self.model, self.tokenizer, aside)
                torch.save(self.optimizer.state_dict(), aside / OPTIMIZER)
                state = {"step": step, "tokens": step * self.cfg.train.tokens_per_step, "recipe": self.cfg.recipe}
                (aside / STATE).write_text(json.dumps(state), encoding="utf-8")
                checkpoint.commit(aside, target, **state)
            if self.cfg.train.keep_checkpoints is not None:
                checkpoint.keep_newest(self.checkpoints, self.cfg.train.keep_checkpoints)
        if runtime.world_size() > 1:
            dist.barrier()


@contextlib.contextmanager
def accelerate_forgets() -> Iterator[None]:
    """Accelerate keeps its state in the process; another run in this process (the next recipe) begins anew."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def parameter_groups(model: torch.nn.Module, optim: Optim) -> list[dict]:
    """Matrices decay; gains and the embedding, whose rows are rare, do not (OLMo 2, arXiv 2501.00656, section 3.3)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim <= 1 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
