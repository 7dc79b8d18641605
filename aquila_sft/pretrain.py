"""The training loop of a base model, over Accelerate: small enough to read in one sitting.

    step -> Loader -> sum of losses / targets of the whole step -> gradients -> Guard -> AdamW

Everything that a step does is a function of (seed, step) and the weights: batch, learning rate and mixture keep no
state, so a checkpoint is weights, optimizer moments and a few hundred bytes (state.json), and going on is exact. No
step waits for the device: the host looks at figures where it logs and saves.
"""

import contextlib
import dataclasses
import json
import math
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs

from aquila_sft import checkpoint, heap, intermediate, runtime, schedule
from aquila_sft import model as models
from aquila_sft.config.model import Optim, Precision
from aquila_sft.config.runs import PretrainRun
from aquila_sft.data.consumed import Consumed
from aquila_sft.data.loader import Loaded, Loader
from aquila_sft.device import Choices, peak_memory_bytes
from aquila_sft.errors import Stopped, UserError
from aquila_sft.guard import Guard
from aquila_sft.log import Bar, MetricsFile
from aquila_sft.saving import Saver

OPTIMIZER = "optimizer.pt"  # tensors and numbers only: read with weights_only=True
STATE = "state.json"
# what torch.load and a look into what it loaded raise for a file of something else
NOT_MOMENTS = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    struct.error,
    UnpicklingError,
)


class Update(NamedTuple):
    """Figures of one step, summed over all processes, on the device; nats and targets are 0 if it was left out."""

    nats: torch.Tensor
    targets: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    asked_to_stop: torch.Tensor  # by how many processes


@dataclasses.dataclass
class Window:
    """What happened since the host last looked; sums over the updates that were made, on the device."""

    step: int
    nats: torch.Tensor
    targets: torch.Tensor
    waited: float = 0.0  # seconds without data
    began: float = dataclasses.field(default_factory=time.perf_counter)


class Trainer:
    """One run of the loop. `evaluation(model) -> {name: figures}` is called before, after and every `eval_steps`."""

    def __init__(
        self,
        cfg: PretrainRun,
        *,
        model: torch.nn.Module,
        tokenizer: object,
        loader: Loader,
        choices: Choices,
        folder: Path,
        metrics: MetricsFile,
        stop: runtime.StopSignal,
        evaluation: Callable[[torch.nn.Module], dict],
        eval_steps: int | None,
    ) -> None:
        self.cfg, self.tokenizer, self.loader, self.plan = cfg, tokenizer, loader, loader.plan
        self.checkpoints, self.intermediate = folder / "checkpoints", folder / "intermediate"
        self.saver = Saver(self.checkpoints, cfg.train.keep_checkpoints)
        self.metrics, self.stop, self.evaluation, self.eval_steps = metrics, stop, evaluation, eval_steps
        self.accelerator = Accelerator(
            cpu=choices.device == "cpu",
            mixed_precision="bf16" if choices.precision is Precision.bf16 else "no",
            # A forward reads each weight once: bf16 copies, kept to its end, would be as much as half of the weights.
            kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        )
        if self.accelerator.num_processes != runtime.world_size():
            raise UserError(
                f"{runtime.world_size()} processes were launched, but this one trains in a world of "
                f"{self.accelerator.num_processes}: they would train apart (README, 'Launching')"
            )
        self.device = self.accelerator.device
        self.model = model  # the plain one: evaluated, saved
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model.to(self.device), cfg.optim),
            lr=cfg.optim.lr,
            betas=tuple(cfg.optim.betas),
            eps=cfg.optim.eps,
            fused=True,  # also what can leave an update out without asking the host
        )
        if choices.device == "cpu" and cfg.train.activation_checkpointing:
            heap.install(model)
        self.wrapped = self.accelerator.prepare(model)
        self.guard = Guard(spike_sigma=cfg.train.spike_sigma, max_skipped=cfg.train.max_skipped, device=self.device)
        self.consumed = Consumed.nothing(len(loader.parts))  # by all processes, as of the last exchange
        self.own = Consumed.nothing(len(loader.parts))  # by this one, since
        self.rollbacks = 0
        self.asked = torch.zeros(())
        self.bits_per_byte: dict[int, dict] = {}  # step -> of the latest evaluation

    # ---- the loop ----

    def run(self, first_step: int) -> list[dict]:
        """Train from `first_step` to the plan's end; returns what was logged."""
        if runtime.is_main():
            intermediate.begin(self.intermediate, first_step)
        if first_step == 0:
            self.evaluate(0)
        self.stop.finish_step = True
        step = first_step
        while step < self.plan.steps:
            step = self.train(step)
        self.saver.finish()
        self.stop.finish_step = False
        return self.metrics.read()

    def train(self, first_step: int) -> int:
        """Steps from `first_step` on; returns the plan's end, or an earlier step that a roll-back led to."""
        train, last_step = self.cfg.train, self.plan.steps
        self.wrapped.train()
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(contextlib.closing(Bar(last_step, first_step)))
            steps = stack.enter_context(contextlib.closing(self.loader.ahead(first_step, last_step)))
            window = self.window(first_step)
            for loaded in steps:
                done = loaded.step + 1
                update = self.step(loaded)
                window.nats, window.targets = window.nats + update.nats, window.targets + update.targets
                window.waited += loaded.waited
                self.own.add(loaded.entry)
                bar.step(1)

                stopped = self.is_asked_to_stop(update)
                evaluates = done == last_step or bool(self.eval_steps) and done % self.eval_steps == 0
                keeps = intermediate.is_due(done, train.intermediate_steps, last_step)
                saves = done % train.save_steps == 0 or done == last_step or stopped
                logs = done % train.logging_steps == 0 or done in (1, last_step) or stopped
                if not (evaluates or keeps or saves or logs):
                    continue
                if (crossed := int(self.guard.crossed)) >= 0 or (saves or keeps) and not self.is_finite():
                    return self.roll_back(done, crossed)
                if logs:
                    self.log(done, window, update, bar)
                    window = self.window(done)
                paused = time.perf_counter()
                # A kill between these takes the run back to before all of them: what came first is made again.
                if evaluates:
                    self.evaluate(done)
                if keeps:
                    self.keep(done, update.lr)
                if saves:
                    self.save(done, last=done == last_step or stopped)
                window.began += time.perf_counter() - paused
                if stopped:
                    self.saver.finish()
                    bar.close()
                    why = self.stop.name or "a signal to another process"
                    raise Stopped(f"{why}; step {done} of {last_step} is saved, the same command goes on")
        return last_step

    def step(self, loaded: Loaded) -> Update:
        """One update of the weights, unless the guard leaves it out."""
        lr = self.cfg.optim.lr * schedule.multiplier(loaded.step, self.cfg.schedule, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        world = runtime.world_size()
        counted = self.summed(torch.full((), float(loaded.targets), device=self.device))
        # DDP averages over processes, hence the quotient: the sum over the step / its targets everywhere
        items = counted.clamp(min=1) / world
        lost = torch.zeros((), device=self.device)
        for number, batch in enumerate(loaded.batches, 1):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            with self.gradients_stay(number < len(loaded.batches)):
                loss = self.wrapped(**batch, num_items=items).loss
                self.accelerator.backward(loss)
            lost += loss.detach()
        limit = self.cfg.optim.max_grad_norm or math.inf  # 0: no clipping, the norm is logged all the same
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        # Every process holds the same norm; reduced with the loss, all of them judge the very same figures.
        asked = torch.full_like(lost, self.stop.name is not None)
        lost, grad_norm, asked = self.summed(torch.stack([lost / world, grad_norm / world, asked])).unbind()
        bad = self.guard.judge(lost, grad_norm, loaded.step)
        self.optimizer.found_inf = bad  # the fused kernel's own way to leave an update out, as GradScaler uses it
        self.optimizer.step()
        self.optimizer.zero_grad()
        made = bad == 0
        return Update(torch.where(made, lost * counted, 0.0), torch.where(made, counted, 0.0), grad_norm, lr, asked)

    def gradients_stay(self, is_so: bool) -> contextlib.AbstractContextManager:
        """Between micro-batches processes do not exchange gradients."""
        return self.accelerator.no_sync(self.wrapped) if is_so else contextlib.nullcontext()

    @staticmethod
    def summed(tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes."""
        if runtime.world_size() > 1:
            dist.all_reduce(tensor)
        return tensor

    def is_asked_to_stop(self, update: Update) -> bool:
        """The same answer in every process. Several hear of it a step late: this step's figure would be waited for."""
        before, self.asked = self.asked, update.asked_to_stop
        return self.stop.name is not None if runtime.world_size() == 1 else bool(before)

    # ---- what the host looks at ----

    def window(self, step: int) -> Window:
        return Window(step, *torch.zeros(2, device=self.device).unbind())

    def log(self, step: int, window: Window, update: Update, bar: Bar) -> None:
        figures = [window.nats, window.targets, update.grad_norm, self.guard.skipped]
        nats, targets, norm, skipped = torch.stack(figures).tolist()
        seconds = time.perf_counter() - window.began
        loss = nats / targets if targets else None  # no update was made
        tokens_per_s = (step - window.step) * self.cfg.train.tokens_per_step / seconds
        self.write(
            step,
            loss=loss,
            lr=update.lr,
            grad_norm=norm,
            skipped_updates=int(skipped),
            tokens_per_s=round(tokens_per_s, 1),
            data_wait_share=round(window.waited / seconds, 6),
            peak_memory_bytes=peak_memory_bytes(),
        )
        bar.show(math.nan if loss is None else loss, tokens_per_s)

    def write(self, step: int, **figures: float | int | dict | str | None) -> None:
        tokens, seconds = step * self.cfg.train.tokens_per_step, round(self.metrics.seconds(), 2)
        self.metrics.write(step=step, tokens=tokens, **figures, seconds=seconds)

    def evaluate(self, step: int) -> None:
        found = self.evaluation(self.model)
        bits = {part: figures["bits_per_byte"] for part, figures in found.items()}
        self.bits_per_byte = {step: {part: round(value, 4) for part, value in bits.items() if math.isfinite(value)}}
        figures = {
            f"eval_{name}_{part}": value
            for part, of_part in found.items()
            for name, value in of_part.items()
            if name != "text_bytes"
        }
        self.write(step, **figures)

    def exchange(self) -> Consumed:
        """The ledger of all processes."""
        vector = torch.from_numpy(self.own.vector()).to(self.device)
        self.consumed.add(Consumed.of_vector(self.summed(vector).cpu().numpy()))
        self.own = Consumed.nothing(len(self.loader.parts))
        return self.consumed

    # ---- what is kept ----

    def keep(self, step: int, lr: float) -> None:
        """A model for good."""
        ledger = self.exchange()
        if runtime.is_main():
            intermediate.keep(
                self.intermediate,
                self.model,
                self.tokenizer,
                stage=self.cfg.recipe,
                step=step,
                tokens=step * self.cfg.train.tokens_per_step,
                lr=lr,
                mixture=self.loader.order.shares(),
                ledger=ledger.hash,
                bits_per_byte=self.bits_per_byte.get(step),
            )

    def save(self, step: int, *, last: bool) -> None:
        """A checkpoint: a model folder that transformers loads, the optimizer's moments, and where the run is."""
        ledger = self.exchange()
        self.write(step, ledger=ledger.hash, rows=ledger.rows_of(self.loader.order.parts))
        target = checkpoint.folder(self.checkpoints, step)
        if runtime.is_main() and not target.exists():
            state = self.state(step)

            def fill(folder: Path, copy: dict) -> None:
                models.save(self.model, self.tokenizer, folder, copy["model"])
                torch.save(copy["optimizer"], folder / OPTIMIZER)
                (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
                checkpoint.sync(self.metrics.path)

            taken = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.saver.save(step, taken, fill, last=last, **{k: v for k, v in state.items() if k != "step"})

    def state(self, step: int) -> dict:
        """All that going on needs beside weights and moments; under 1 KiB, whatever the run has read."""
        return {
            "step": step,
            "tokens": step * self.cfg.train.tokens_per_step,
            "recipe": self.cfg.recipe,
            "loader": self.loader.state(step),
            "ledger": self.consumed.state(),
            "guard": self.guard.state(),
            "rollbacks": self.rollbacks,
        }

    def load_optimizer(self, folder: Path) -> bool:
        """The moments of a checkpoint; False when it has none (a published model, a final/)."""
        if not (folder / OPTIMIZER).is_file():
            return False
        ours = [[parameter.shape for parameter in group["params"]] for group in self.optimizer.param_groups]
        try:
            # to the CPU first: "cpu:0", as Accelerate names it among several processes, is nothing torch.load knows
            state = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
            theirs = [[state["state"][i]["exp_avg"].shape for i in group["params"]] for group in state["param_groups"]]
        except NOT_MOMENTS:
            theirs = None
        if theirs != ours:  # another trainer's, or another model's
            raise UserError(
                f"{folder / OPTIMIZER} does not hold AdamW's moments of this model as a run here leaves them; remove "
                "it, and the optimizer begins anew"
            )
        # the moments alone: rate, betas and decay are this run's, an anneal's may differ from its trunk's
        own = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        for theirs, ours in zip(state["param_groups"], own, strict=True):
            theirs |= ours
        self.optimizer.load_state_dict(state)
        return True

    def restore(self, folder: Path) -> int:
        """Everything but the weights as a checkpoint of this run has it; its step."""
        state = json.loads((folder / STATE).read_text("utf-8"))
        self.load_optimizer(folder)
        self.guard.restore(state["guard"])
        self.consumed = Consumed.of_state(state["ledger"])
        self.own = Consumed.nothing(len(self.loader.parts))
        self.loader.skipped = [tuple(window) for window in state["loader"]["skipped"]]
        self.rollbacks = state["rollbacks"]
        return state["step"]

    # ---- when it goes wrong ----

    def is_finite(self) -> bool:
        """Whether weights and moments are numbers, all of them. One look at the device."""
        moments = [t for of_one in self.optimizer.state.values() for t in of_one.values() if torch.is_tensor(t)]
        return bool(torch.nn.utils.get_total_norm([*self.model.parameters(), *moments], math.inf).isfinite())

    def roll_back(self, step: int, crossed: int) -> int:
        """Weights, moments and ledger of the newest checkpoint, without the data of the updates that went wrong.

        Too many updates were skipped (`crossed` was one too many), or weights or moments are no numbers any more.
        Returns the step to go on from. Raises UserError past train.max_rollbacks, and where nothing was saved.
        """
        if crossed >= 0:
            first, end = int(self.guard.since), crossed + 1
            what = (
                f"more than {self.cfg.train.max_skipped} updates skipped from step {first + 1} on, whose loss or "
                "gradients are no numbers, or spikes"
            )
        else:
            first, end, what = 0, step, f"weights or moments that are no numbers after step {step}"
        rollbacks, skipped = self.rollbacks + 1, self.loader.skipped
        good = self.newest_checkpoint()
        if good is None or rollbacks > self.cfg.train.max_rollbacks:
            raise UserError(
                f"{what}, after {self.rollbacks} roll-backs; look at the data, raise train.max_rollbacks, or begin "
                f"anew with a lower optim.lr={self.cfg.optim.lr}; last good checkpoint: {good.name if good else 'none'}"
            )
        self.model.load_state_dict(models.load(good).state_dict())
        begin = self.restore(good)
        self.loader.skipped, self.rollbacks = skipped, rollbacks
        self.loader.skip(first := max(first, begin), end)
        self.loader.check_epochs(self.cfg.data.max_epochs)
        self.metrics = self.metrics.again_from(begin)
        left_out = sum(end - first for first, end in self.loader.skipped)
        self.write(begin, rolled_back_from=step, rows_left_out=left_out)
        if runtime.is_main():
            intermediate.begin(self.intermediate, begin)
        runtime.say(
            f"\n  {what}: back to step {begin}, and the data of steps {first + 1} to {end} are left out "
            f"(roll-back {rollbacks} of at most {self.cfg.train.max_rollbacks})"
        )
        return begin

    def newest_checkpoint(self) -> Path | None:
        """The same answer in every process; the main one looks, and moves damaged ones aside."""
        self.saver.wait()
        found = [checkpoint.newest(self.checkpoints) if runtime.is_main() else None]
        if runtime.world_size() > 1:
            dist.broadcast_object_list(found)
        return found[0]


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
