"""One step's gradients of the real trainer, for any split into micro-batches and processes.

python gradients_worker.py <base folder> <prepared rows folder> <rows in a micro-batch> <out.pt>
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS, LENGTH = 8, 128


def main(base: str, rows_folder: str, micro_rows: str, out: str) -> None:
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import TrainerCallback

    import train as program
    from aquila_sft import device, model, runtime
    from aquila_sft.data.rows import PackedRows
    from aquila_sft.log import MetricsFile
    from aquila_sft.tokenizer import load_tokenizer
    from aquila_sft.trainer import Plan, SftTrainer

    runtime.settle(offline=True)
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
        ]
    )
    choices = device.choose(cfg.train)
    rows = PackedRows(Path(rows_folder))
    net = model.load(Path(base))
    folder = Path(tempfile.mkdtemp())
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
    taken = {}

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            taken.update({n: p.grad.clone() for n, p in net.named_parameters()})

    trainer.add_callback(Take())
    trainer.train()
    if runtime.is_main():
        torch.save({"gradients": taken, "loss": trainer.narrator.loss}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
