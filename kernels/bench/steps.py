"""The training steps of one side of a comparison, in a process of its own: its figures are the last line, as JSON.

    job -> settings, data, the side's own trainer -> steps -> Clock, Counts -> record

    sft        ours: recipe=sft's SftTrainer and the loop that it inherits
    trl        TRL's SFTTrainer: its packing (bfd, which is padding-free), its fused head; attention and micro-batch as
               the job says, activation checkpointing off, loaders of its own beside it, nothing logged or saved
    pretrain   ours: recipe=pretrain's Trainer.step and Loader, layers compiled on a GPU
    plain      what one would write without us: transformers' model and F.cross_entropy of its logits, each layer and
               the loss through torch.compile (or all as one graph: "compile": "whole"), fused AdamW. Documents of a
               row see each other: that lets sdpa use its causal kernel, which we ask for, since transformers builds a
               mask while torch (below 2.14) compiles

Both of a pair begin at the same weights, with the same data (step_data.py), settings, rows a step and bf16 autocast
over fp32 weights. A job is a JSON object; `settings` are train.py's, `extra` is for SFTConfig (trl) or says how to
compile (plain):

    python kernels/bench/steps.py '{"side": "sft", "settings": {}, "attention": null, "micro_rows": null, "extra": {},
                                    "is_compiled": true, "warm_ups": 3, "steps": 10}'

A step lasts from the end of the one before to its own end, by CUDA events, which nobody waits for: what the GPU
waits for data and Python counts. Peak memory is the allocator's over the timed steps; on a CPU, the process's.
"""

import contextlib
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import flops
import step_data
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, TrainerCallback

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from aquila_sft import device, pretrain, runtime, schedule, settle, swap  # noqa: E402
from aquila_sft import model as models  # noqa: E402
from aquila_sft.config.model import Precision  # noqa: E402
from aquila_sft.data.loader import Loader  # noqa: E402
from aquila_sft.data.mixture import MixtureOrder  # noqa: E402
from aquila_sft.data.text_rows import TextRows  # noqa: E402
from aquila_sft.data.text_share import MixedRows  # noqa: E402
from aquila_sft.log import MetricsFile  # noqa: E402
from aquila_sft.plan import Plan  # noqa: E402
from train import compose_run  # noqa: E402


def run(job: dict) -> dict:
    """The record of a job: lists have an entry for each timed step."""
    runtime.settle(offline=True)
    with tempfile.TemporaryDirectory() as work, pretrain.accelerate_forgets():
        side = Side(job, Path(work))
        loss = {"sft": ours_sft, "trl": trl, "pretrain": ours_pretrain, "plain": plain}[job["side"]](side)
        return side.record(loss)


class Side:
    """What all sides share: settings, choices, model, clock and counts."""

    def __init__(self, job: dict, work: Path) -> None:
        self.job, self.work = job, work
        is_sft = job["side"] in ("sft", "trl")
        settings = {
            "output_dir": work / "run",
            "model.path": "random",
            "train.tokens_per_step": 131072,
            "train.max_steps": job["warm_ups"] + job["steps"],
            "train.total_tokens": "null",
            "train.num_epochs": "null",
            "train.logging_steps": 10**6,
            "train.save_steps": 10**6,
            "train.attention": job["attention"] or "auto",
            "train.micro_batch_rows": job["micro_rows"] or "null",
        } | job["settings"]
        words = [f"recipe={'sft' if is_sft else 'pretrain'}", "scale=135m"]
        words += [f"{name}={value}" for name, value in settings.items()]
        self.cfg = compose_run(words)
        self.attention_is_asked = bool(job["attention"])
        self.vocab = self.cfg.model.vocab_size
        self.tokenizer = step_data.tokenizer(self.vocab)
        self.choices = device.choose(self.cfg.train, self.cfg.kernel)
        self.clock = Clock(job["warm_ups"])
        self.counts = Counts(self.tokenizer.pad_token_id)
        # more than the steps take: no side comes to its data's end, where a step would be a short one
        self.num_tokens = (self.cfg.train.max_steps + 1) * self.cfg.train.tokens_per_step

    def model(self, attention: str) -> torch.nn.Module:
        self.attention = attention
        net = models.build(self.cfg.model, self.tokenizer, attention=attention, seed=self.cfg.seed)
        self.config, self.parameters = net.config, sum(p.numel() for p in net.parameters())
        return net

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.choices.device, torch.bfloat16, enabled=self.choices.precision is Precision.bf16)

    def planned(self, num_rows: int) -> Plan:
        self.plan = Plan(self.cfg.train, num_rows, self.choices.device, is_smoke=False)
        return self.plan

    def record(self, loss: float) -> dict:
        counts = self.counts.of_steps()[self.job["warm_ups"] :]
        return {
            "seconds": self.clock.seconds(),
            "tokens": [tokens for tokens, _, _ in counts],
            "targets": [targets for _, targets, _ in counts],
            "flops": [flops.of_step(self.config, *of_step) for of_step in counts],
            "peak_bytes": self.clock.peak_bytes,
            "loss": loss,
            "attention": self.attention,
            "micro_rows": self.plan.micro_rows,
            "accumulation": self.plan.accumulation,
            "length": self.cfg.train.max_length,
            "vocab": self.vocab,
            "parameters": self.parameters,
            "precision": self.choices.precision.value,
        }


class Clock(TrainerCallback):
    """When steps end; peak memory since the warm-ups."""

    def __init__(self, warm_ups: int) -> None:
        self.warm_ups, self.marks, self.peak_bytes = warm_ups, [], 0

    def on_step_end(self, *_, **__) -> None:
        if torch.cuda.is_available():
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        self.peak_bytes = device.peak_memory_bytes()
        if len(self.marks) == self.warm_ups and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def seconds(self) -> list[float]:
        marks = self.marks[self.warm_ups - 1 :]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]


class Counts:
    """Tokens, targets and visible pairs of every step, summed where the batches are and looked at in the end."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id, self.steps = pad_id, []

    def add(self, batches: list[dict]) -> None:
        of_batches = []
        for batch in batches:
            is_token = batch["input_ids"] != self.pad_id
            wanted = batch["targets"] if "targets" in batch else batch["labels"]
            sums = is_token.sum(), (wanted != -100).sum(), ((batch["position_ids"] + 1) * is_token).sum()
            of_batches.append(torch.stack(sums))
        self.steps.append(torch.stack(of_batches).sum(0))

    def watch(self, trainer) -> None:
        """Count what a transformers Trainer takes for each step."""
        own = trainer.get_batch_samples

        @functools.wraps(own)
        def get_batch_samples(*given):
            batches, items = own(*given)
            self.add(batches)
            return batches, items

        trainer.get_batch_samples = get_batch_samples

    def of_steps(self) -> list[list[int]]:
        return [step.tolist() for step in self.steps]


# ---- tuning ----


def ours_sft(side: Side) -> float:
    from aquila_sft.trainer import SftTrainer

    cfg = side.cfg
    conversations = step_data.Conversations.drawn(side.num_tokens, cfg.train.max_length, side.vocab)
    rows = MixedRows(conversations.packed(side.work / "rows", cfg.train.max_length), cfg, None)
    (side.work / "run").mkdir()
    trainer = SftTrainer(
        cfg,
        model=side.model(side.choices.attention),
        tokenizer=side.tokenizer,
        rows=rows,
        plan=side.planned(len(rows)),
        choices=side.choices,
        folder=side.work / "run",
        metrics=MetricsFile(side.work / "metrics.jsonl", from_step=-1, last_step=side.plan.steps),
        stop=runtime.StopSignal(),
        evaluation=lambda net: {},
    )
    trainer.args.save_strategy = "no"
    side.attention = settle.settle(trainer.model, side.choices.device, side.autocast(), asked=side.attention_is_asked)
    return trained(trainer, side)


def trl(side: Side) -> float:
    from trl import SFTConfig, SFTTrainer

    cfg, plan = side.cfg, side.planned(1)
    conversations = step_data.Conversations.drawn(side.num_tokens, cfg.train.max_length, side.vocab)
    on_gpu = side.choices.device == "cuda"
    args = SFTConfig(
        output_dir=str(side.work / "run"),
        seed=cfg.seed,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_rows,
        gradient_accumulation_steps=plan.accumulation,
        max_length=cfg.train.max_length,
        packing=True,
        packing_strategy="bfd",
        optim="adamw_torch_fused",
        learning_rate=cfg.optim.lr,
        lr_scheduler_type=cfg.schedule.kind.value,
        warmup_steps=schedule.warmup_steps(cfg.schedule, plan.steps),
        adam_beta1=cfg.optim.betas[0],
        adam_beta2=cfg.optim.betas[1],
        adam_epsilon=cfg.optim.eps,
        weight_decay=cfg.optim.weight_decay,
        max_grad_norm=cfg.optim.max_grad_norm,
        use_cpu=not on_gpu,
        bf16=side.choices.precision is Precision.bf16,
        activation_checkpointing=False,
        dataloader_num_workers=2 if on_gpu else 0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **side.job["extra"],
    )
    trainer = SFTTrainer(
        model=side.model(side.choices.attention),
        args=args,
        train_dataset=conversations.dataset(),
        processing_class=side.tokenizer,
    )
    return trained(trainer, side)


def trained(trainer, side: Side) -> float:
    side.counts.watch(trainer)
    trainer.add_callback(side.clock)
    return trainer.train().training_loss


# ---- pretraining ----


def loader_of(side: Side) -> Loader:
    train = side.cfg.train
    part = TextRows(step_data.Documents(side.num_tokens, train.max_length, side.vocab), train.max_length)
    plan = side.planned(len(part))
    order = MixtureOrder({"made-up": len(part)}, {"made-up": 1.0}, block_rows=1000, seed=0, stage="pretrain")
    on_gpu = side.choices.device == "cuda"
    return Loader(plan, order, [part], train.max_length, side.tokenizer.pad_token_id, pin=on_gpu)


def ours_pretrain(side: Side) -> float:
    net, loader = side.model(side.choices.attention), loader_of(side)
    swap.install(net, side.choices.kernel)
    trainer = pretrain.Trainer(
        side.cfg,
        model=net,
        tokenizer=side.tokenizer,
        loader=loader,
        choices=side.choices,
        folder=side.work / "run",
        metrics=MetricsFile(side.work / "metrics.jsonl", from_step=-1, last_step=side.plan.steps),
        stop=runtime.StopSignal(),
        evaluation=lambda net: {},
        eval_steps=None,
    )
    side.attention = settle.settle(net, side.choices.device, side.autocast(), asked=side.attention_is_asked)
    if side.job["is_compiled"]:
        shape = (side.plan.micro_rows, side.cfg.train.max_length)
        settle.compile_layers(net, shape, side.choices.device, side.autocast())
    trainer.wrapped.train()

    def step(loaded) -> torch.Tensor:
        update = trainer.step(loaded)
        return update.nats / update.targets

    return looped(side, loader, step)


def causal(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of transformers' models: plainly causal, which needs no mask."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("sdpa_causal", causal)  # no mask function: transformers makes no mask


def plain(side: Side) -> float:
    cfg, loader = side.cfg, loader_of(side)
    net = side.model("sdpa_causal").to(side.choices.device).train()
    optimizer = torch.optim.AdamW(
        pretrain.parameter_groups(net, cfg.optim),
        lr=cfg.optim.lr,
        betas=tuple(cfg.optim.betas),
        eps=cfg.optim.eps,
        fused=True,
    )

    def head(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = net.lm_head(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return head(net.model(input_ids=ids, use_cache=False).last_hidden_state, targets)

    if side.job["is_compiled"] and side.job["extra"].get("compile") == "whole":
        loss_of = torch.compile(loss_of, dynamic=False)
    elif side.job["is_compiled"]:
        head = torch.compile(head, dynamic=False)
        for layer in net.model.layers:
            layer.compile(dynamic=False)

    def step(loaded) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = cfg.optim.lr * schedule.multiplier(loaded.step, cfg.schedule, side.plan.steps)
        lost = torch.zeros((), device=side.choices.device)
        for batch in loaded.batches:
            ids, targets = (batch[name].to(side.choices.device, non_blocking=True) for name in ("input_ids", "targets"))
            with side.autocast():
                loss = loss_of(ids, targets) / loaded.targets
            loss.backward()
            lost += loss.detach()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return lost

    return looped(side, loader, step)


def looped(side: Side, loader: Loader, step) -> float:
    """Mean loss of the steps."""
    losses = []
    with contextlib.closing(loader.ahead(0, side.plan.steps)) as ahead:
        for loaded in ahead:
            side.counts.add(loaded.batches)
            losses.append(step(loaded))
            side.clock.on_step_end()
    return torch.stack(losses).mean().item()


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
