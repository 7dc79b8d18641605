"""One step's gradients of the real trainer, for any split into micro-batches and processes.

python gradients_worker.py <base folder> <prepared rows folder> <rows in a micro-batch> <out.pt> [<setting>=<value> …]
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS, LENGTH = 8, 128


def step(base: str | Path, rows_folder: str | Path, micro_rows: int, *settings: str, kernel: str = "torch") -> dict:
    """The gradients of every parameter in the first step, and its loss; norms and loss computed by `kernel`."""
    sys.path.insert(0, str(ROOT))
    from transformers import TrainerCallback

    import train as program
    from aquila_sft import device, model, runtime
    from aquila_sft.data.rows import PackedRows
    from aquila_sft.data.text_share import MixedRows
    from aquila_sft.log import MetricsFile
    from aquila_sft.pretrain import accelerate_forgets
    from aquila_sft.tokenizer import load_tokenizer
    from aquila_sft.trainer import Plan, SftTrainer

    cfg = program.compose_run(
        [
            "recipe=sft",
            "scale=mini",
            f"model.path={base}",
            f"train.max_length={LENGTH}",
            f"train.tokens_per_step={ROWS * LENGTH}",
            f"train.micro_batch_rows={micro_rows}",
            "train.max_steps=1",
            "train.logging_steps=1",
            "train.precision=fp32",
            "optim.max_grad_norm=0",
            *settings,
        ]
    )
    choices = dataclasses.replace(device.choose(cfg.train, cfg.kernel), kernel=kernel)
    rows = MixedRows(PackedRows(Path(rows_folder)), cfg, None)
    net = model.load(Path(base))
    folder = Path(tempfile.mkdtemp())
    taken = {}

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            taken.update({n: p.grad.clone() for n, p in net.named_parameters()})

    with accelerate_forgets():
        trainer = SftTrainer(
            cfg,
            model=net,
            tokenizer=load_tokenizer(Path(base)),
            rows=rows,
            plan=Plan(cfg.train, len(rows), choices.device, is_smoke=False),
            choices=choices,
            folder=folder,
            metrics=MetricsFile(folder / "metrics.jsonl", from_step=-1, last_step=1),
            stop=runtime.StopSignal(),
            evaluation=lambda net: {},
        )
        trainer.add_callback(Take())
        trainer.train()
    return {"gradients": taken, "loss": next((line["loss"] for line in trainer.metrics.read() if "loss" in line), None)}


def main(base: str, rows_folder: str, micro_rows: str, out: str, *settings: str) -> None:
    sys.path.insert(0, str(ROOT))
    from aquila_sft import runtime

    runtime.settle(offline=True)
    import torch

    taken = step(base, rows_folder, int(micro_rows), *settings)
    if runtime.is_main():
        torch.save(taken, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
