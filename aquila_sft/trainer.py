"""TRL's SFTTrainer with our rows, our loss, our checkpoints, our log; everything we hand it is in `arguments`.

What is overridden, and why:
    compute_loss      one loss definition: weighted sum over supervised tokens / their weights, both of the whole step
    _get_num_items_in_batch   counts those weights
    create_scheduler  schedule.py: a first step that moves, a last one that is not wasted
    evaluate          by language (evaluate.py)
    _get_grad_norm    kept for the guard, which leaves out an update that is no number (guard.py)
    _save_checkpoint  complete or absent (checkpoint.py), written while training goes on (saving.py)
    log               metrics.jsonl

The data set that the Trainer sees is the list of places of the run, 0, 1, 2, …; the collator turns places into packed
rows (RowOrder, PackedRows). So the order is a pure function of the seed, going on is exact, and costs nothing. The
same holds for chance (dropout): its generator is seeded anew for every step, so there is no state of it to restore.
"""

import copy
import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from aquila_sft import checkpoint, heap, runtime, schedule, swap
from aquila_sft import model as models
from aquila_sft.config.model import KernelChoice, Precision
from aquila_sft.config.runs import SftRun
from aquila_sft.data.rows import RowOrder
from aquila_sft.data.text_share import MixedRows
from aquila_sft.device import Choices, peak_memory_bytes
from aquila_sft.errors import UserError
from aquila_sft.guard import Guard
from aquila_sft.log import Bar, MetricsFile
from aquila_sft.plan import Plan
from aquila_sft.saving import Saver
from aquila_sft.tokenizer import save_tokenizer

MAX_SKIPPED = 3  # updates left out, each forgiven after ten good ones; one more, and the run stops
GUARD = "guard.json"


def arguments(cfg: SftRun, plan: Plan, choices: Choices, folder: Path) -> SFTConfig:
    """Every setting that TRL and transformers get. What is not named here keeps its default on purpose."""
    return SFTConfig(
        output_dir=str(folder),
        seed=cfg.seed,
        report_to=trackers(cfg.report_to, folder.parent) or "none",
        per_device_train_batch_size=plan.micro_rows,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        optim="adamw_torch_fused",
        learning_rate=cfg.optim.lr,
        adam_beta1=cfg.optim.betas[0],
        adam_beta2=cfg.optim.betas[1],
        adam_epsilon=cfg.optim.eps,
        weight_decay=cfg.optim.weight_decay,
        max_grad_norm=cfg.optim.max_grad_norm,
        use_cpu=choices.device == "cpu",
        bf16=choices.precision is Precision.bf16,
        activation_checkpointing=cfg.train.activation_checkpointing,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        logging_strategy="steps",
        logging_first_step=True,
        logging_steps=cfg.train.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=cfg.train.save_steps,
        eval_strategy="no",
        disable_tqdm=True,
    )


def trackers(names: list[str], folder: Path) -> list[str]:
    """The trackers asked for; raises UserError for one that is unknown or not installed."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise UserError(
                f"report_to: {name} is not installed or not known to transformers; "
                f"installed: {', '.join(installed) or 'none'} (metrics.jsonl is always written)"
            )
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    return names


class SftTrainer(SFTTrainer):
    loss_is_scaled_for_ga = True  # compute_loss divides by the global count; nothing is left to divide

    def __init__(
        self,
        cfg: SftRun,
        *,
        model: torch.nn.Module,
        tokenizer: object,
        rows: MixedRows,
        plan: Plan,
        choices: Choices,
        folder: Path,
        metrics: MetricsFile,
        stop: runtime.StopSignal,
        evaluation: Callable[[torch.nn.Module], dict],
    ) -> None:
        self.cfg, self.plan, self.metrics, self.evaluation = cfg, plan, metrics, evaluation
        self.checkpoints = folder / "checkpoints"
        self.saver = Saver(self.checkpoints, cfg.train.keep_checkpoints)
        order = RowOrder(len(rows.conversations), cfg.seed, plan.end, rows.text_rows)
        super().__init__(
            model=model,
            args=arguments(cfg, plan, choices, self.checkpoints),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"place": np.arange(plan.places)}),
            data_collator=partial(collate, rows=rows, order=order, pad_id=tokenizer.pad_token_id),
        )
        if self.args.world_size != runtime.world_size():
            raise UserError(
                f"{runtime.world_size()} processes were launched, but this one trains in a world of "
                f"{self.args.world_size}: they would train apart (README, 'Launching')"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("FSDP and DeepSpeed are not supported here: each process holds the whole model (DDP)")
        self.guard = Guard(spike_sigma=0, max_skipped=MAX_SKIPPED, device=self.args.device)
        # A forward reads each weight once: its bf16 copies, kept to the end, would be as much as half of the weights.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        # after TRL installed its own fused head
        swap.install(self.model, choices.kernel, asked=cfg.kernel is KernelChoice.triton)
        if choices.device == "cpu" and cfg.train.activation_checkpointing:
            heap.install(self.model)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.narrator = Narrator(self, order, rows, stop)
        self.add_callback(self.narrator)

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device):
        """Targets of the whole step, all processes and micro-batches; with train.loss_per their weights."""
        if not batch_samples or "weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = torch.stack([batch["weights"][:, 1:].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(total)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of -log p over this micro-batch's targets / targets of the whole step, all processes and micro-batches.

        A mean of means would weigh tokens in emptier rows more. DDP averages gradients over processes, hence their
        number.
        """
        if num_items_in_batch is None or return_outputs:
            raise RuntimeError("the Trainer did not count this step's supervised tokens; its interface has changed")
        weights = inputs.get("weights")
        items = torch.as_tensor(num_items_in_batch)
        return model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            targets=swap.targets_of(inputs["labels"]),
            token_weights=None if weights is None else swap.shifted(weights, 0.0),
            num_items=torch.where(items > 0, items, 1) / self.accelerator.num_processes,
        ).loss

    def _get_grad_norm(self, model, grad_norm=None):
        self.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.grad_norm

    def leave_out(self, step: int, loss_before: torch.Tensor) -> None:
        """Weights, moments and the summed loss stay as they were when this step's gradients are no numbers.

        Gradients are reduced before, so all processes find the same; nobody waits for the device.
        """
        norm = torch.as_tensor(self.grad_norm, device=self.args.device)
        bad = self.guard.judge(norm, norm, step)
        self.optimizer.optimizer.found_inf = bad  # the fused kernel's own way, as GradScaler uses it
        self._tr_loss.copy_(torch.where(bad > 0, loss_before, self._tr_loss))

    def check_guard(self) -> None:
        if (crossed := int(self.guard.crossed)) >= 0:
            good = checkpoint.newest(self.checkpoints) if runtime.is_main() else None
            raise UserError(
                f"more than {MAX_SKIPPED} updates were left out by step {crossed + 1}: their gradients are no numbers; "
                f"lower optim.lr={self.cfg.optim.lr} or look at the data; last good checkpoint: "
                f"{good.name if good else 'none'}"
            )

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                partial(schedule.multiplier, schedule=self.cfg.schedule, total_steps=num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        results = self.evaluation(self.model)
        flat = {
            f"{metric_key_prefix}_{name}_{language}": value
            for language, figures in results.items()
            for name, value in figures.items()
            if name != "answer_bytes"
        }
        self.log(flat)
        return flat

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        Trainer.log(self, logs, start_time)  # TRL's adds entropy and accuracy, which cost logits

    def _save_checkpoint(self, model, trial):
        """Instead of the Trainer's: the same files, which its own code loads again, from a copy of the state."""
        self.check_guard()
        if not runtime.is_main():
            return
        step, guard = self.state.global_step, self.guard.state()
        of_model, state = self.model.state_dict(), copy.deepcopy(self.state)
        if self.cfg.lora:
            trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            of_model = {name: tensor for name, tensor in of_model.items() if name in trained}

        def fill(folder: Path, taken: dict) -> None:
            if self.cfg.lora:
                self.model.save_pretrained(folder, state_dict=taken["model"], save_embedding_layers=False)
                save_tokenizer(self.processing_class, folder)
            else:
                models.save(self.model, self.processing_class, folder, taken["model"])
            torch.save(taken["optimizer"], folder / OPTIMIZER_NAME)
            torch.save(taken["scheduler"], folder / SCHEDULER_NAME)
            state.save_to_json(folder / TRAINER_STATE_NAME)
            (folder / GUARD).write_text(json.dumps(guard), encoding="utf-8")
            checkpoint.sync(self.metrics.path)

        taken = {
            "model": of_model,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
        }
        ends = self.control.should_training_stop
        self.saver.save(step, taken, fill, last=ends, places=step * self.plan.rows_per_step)


def seed_of(*numbers: int) -> int:
    """One seed from several, without the patterns that sums of them would have."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def collate(places: list[dict], *, rows: MixedRows, order: RowOrder, pad_id: int) -> dict:
    return rows.batch([order(p["place"]) for p in places], pad_id)


class Narrator(TrainerCallback):
    """Counts tokens on the host, keeps the bar and metrics.jsonl, asks for evaluations, and hears the stop signal."""

    def __init__(self, trainer: SftTrainer, order: RowOrder, rows: MixedRows, stop: runtime.StopSignal) -> None:
        self.trainer, self.rows, self.stop = trainer, rows, stop
        self.order = copy.copy(order)  # its own: the loader's runs ahead
        self.tokens = self.counted_steps = 0
        self.text_rows: Counter = Counter()  # by part, with data.text
        self.bar: Bar | None = None

    def count_to(self, step: int) -> int:
        """Tokens trained on in the first `step` steps, padding not counted."""
        per_step = self.trainer.plan.rows_per_step
        for place in range(self.counted_steps * per_step, step * per_step):
            row = self.order(place)
            self.tokens += self.rows.tokens(row)
            if row >= self.order.num_rows:
                self.text_rows[self.rows.text_place(row)[0].part.name] += 1
        self.counted_steps = step
        return self.tokens

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        self.logged_step, self.skipped = state.global_step, int(self.trainer.guard.skipped)
        self.last_time, self.last_tokens = time.monotonic(), self.count_to(state.global_step)
        if self.evaluates(state.global_step) or state.global_step == 0:
            logged = self.trainer.metrics.read()
            if not any(m["step"] == state.global_step and "loss" not in m for m in logged):
                self.trainer.evaluate()  # the first one, or one that a signal left for later
        self.bar = Bar(state.max_steps, state.global_step)

    def evaluates(self, step: int) -> bool:
        """In the middle of a run; before and after it there is always an evaluation."""
        every = self.trainer.cfg.train.eval_steps
        return bool(every) and step % every == 0 and step < self.trainer.plan.steps

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        torch.manual_seed(seed_of(args.seed, state.global_step, runtime.rank()))
        self.loss_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args, state: TrainerState, control: TrainerControl, **_) -> None:
        self.trainer.leave_out(state.global_step, self.loss_before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        self.bar.step(1)
        control.should_evaluate = self.evaluates(state.global_step)
        control.should_log |= state.global_step == state.max_steps
        if self.stop.agreed():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_) -> None:
        metrics = self.trainer.metrics
        if "loss" in logs:
            self.trainer.check_guard()
            skipped, steps = int(self.trainer.guard.skipped), state.global_step - self.logged_step
            made = steps - (skipped - self.skipped)  # updates; the Trainer divided by steps
            loss = None if not made else logs["loss"] if made == steps else logs["loss"] * steps / made
            norm = logs.get("grad_norm")
            tokens, now = self.count_to(state.global_step), time.monotonic()
            tokens_per_s = (tokens - self.last_tokens) / (now - self.last_time)
            metrics.write(
                step=state.global_step,
                tokens=tokens,
                loss=loss,
                lr=logs["learning_rate"],
                grad_norm=norm,
                skipped_updates=skipped,
                tokens_per_s=round(tokens_per_s, 1),
                peak_memory_bytes=peak_memory_bytes(),
                seconds=round(metrics.seconds(), 2),
            )
            self.last_time, self.last_tokens = now, tokens
            self.logged_step, self.skipped = state.global_step, skipped
            self.bar.show(math.nan if loss is None else loss, tokens_per_s)
        elif evaluated := {k: v for k, v in logs.items() if k.startswith("eval_")}:
            metrics.write(
                step=state.global_step,
                tokens=self.count_to(state.global_step),
                seconds=round(metrics.seconds(), 2),
                **evaluated,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        self.bar.close()
