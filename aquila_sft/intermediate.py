"""Models from the middle of a run, kept for good and listed: what one studies, compares and anneals from.

    intermediate/pretrain-step-0000512-tokens-603M/  a model folder that transformers loads, with MANIFEST.json
    intermediate/index.json  a list: name, stage, step, tokens, lr, mixture, ledger, bits_per_byte, weights_sha256

After steps 1, 2, 4, 8, … at first, where a model changes fastest, then every train.intermediate_steps, and at the end.
They hold no optimizer state: a run goes on from checkpoints/, which train.keep_checkpoints may thin out.
"""

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aquila_sft import checkpoint, run_dir
from aquila_sft import model as models

INDEX = "index.json"


def is_due(step: int, every: int | None, last_step: int) -> bool:
    """Whether the model is kept after so many steps."""
    if every is None or step == 0:
        return False
    is_power_of_two = step & (step - 1) == 0
    return step % every == 0 or step == last_step or (step < every and is_power_of_two)


def name_of(stage: str, step: int, tokens: int) -> str:
    """Names sort by step; tokens are rounded down."""
    unit, size = next((u for u in (("", 1), ("K", 10**3), ("M", 10**6)) if tokens < 10**4 * u[1]), ("B", 10**9))
    return f"{stage}-step-{step:07d}-tokens-{tokens // size}{unit}"


def index(folder: Path) -> list[dict]:
    return run_dir.read_json(folder / INDEX) or []


def begin(folder: Path, from_step: int) -> None:
    """Forget what came after `from_step`: the run goes on from there, and makes it again."""
    folder.mkdir(exist_ok=True)
    checkpoint.clear_leftovers(folder)
    kept = [entry for entry in index(folder) if entry["step"] <= from_step and (folder / entry["name"]).is_dir()]
    for path in folder.iterdir():
        if path.is_dir() and path.name not in {entry["name"] for entry in kept}:
            shutil.rmtree(path)
    run_dir.write_json(folder / INDEX, kept)


def keep(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, stage: str, step: int, **about: object
) -> None:
    """Write the model and its entry. `about`: what else the index says of it, `tokens` among it."""
    name = name_of(stage, step, about["tokens"])
    aside = folder / f".writing-{name}"
    with checkpoint.room(folder):
        models.save(model, tokenizer, aside)
        weights = {file.name: checkpoint.sha256(file) for file in sorted(aside.glob("*.safetensors"))}
        checkpoint.commit(aside, folder / name, stage=stage, step=step, **about)
        entry = {"name": name, "stage": stage, "step": step, **about, "weights_sha256": weights}
        run_dir.write_json(folder / INDEX, [*index(folder), entry])
