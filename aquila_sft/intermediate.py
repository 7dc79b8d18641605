"""Models from the middle of a run, kept for good and listed: what one studies, compares and anneals from.

    intermediate/pretrain-step-0000512-tokens-603M/  a model folder that transformers loads, with MANIFEST.json
    intermediate/index.json  a list: name, stage, step, tokens, lr, mixture, ledger, bits_per_byte, weights_sha256

After steps 1, 2, 4, 8, … at first, where a model changes fastest, then every train.intermediate_steps, and at the end.
They hold no optimizer state: a run goes on from checkpoints/, which train.keep_checkpoints may thin out.
"""

import json
import re
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aquila_sft import checkpoint, run_dir, runtime
from aquila_sft import model as models

INDEX = "index.json"
NAME = re.compile(r"\w+-step-(\d+)-tokens-\d+[KMB]?")  # as name_of makes it


def is_due(step: int, every: int | None, last_step: int) -> bool:
    """Whether the model is kept after so many steps."""
    if every is None or step == 0:
        return False
    is_power_of_two = step & (step - 1) == 0
    return step % every == 0 or step == last_step or (step < every and is_power_of_two)


def count(every: int | None, last_step: int) -> int:
    """How many models a run of so many steps keeps."""
    if every is None or not last_step:
        return 0
    early = min(every - 1, last_step).bit_length()  # powers of two
    return early + last_step // every + (not is_due(last_step, every, last_step + 1))


def name_of(stage: str, step: int, tokens: int) -> str:
    """Names sort by step; tokens are rounded down."""
    unit, size = next((u for u in (("", 1), ("K", 10**3), ("M", 10**6)) if tokens < 10**4 * u[1]), ("B", 10**9))
    return f"{stage}-step-{step:07d}-tokens-{tokens // size}{unit}"


def kept(folder: Path) -> dict[Path, int]:
    """The models that are there, in the order of their steps, and these."""
    named = {path: NAME.fullmatch(path.name) for path in sorted(folder.iterdir()) if path.is_dir()}
    return {path: int(name[1]) for path, name in named.items() if name}


def index(folder: Path) -> list[dict]:
    """An entry for each, from its own manifest: a list that is lost costs no model its place."""
    entries = []
    for path in kept(folder):
        try:
            about = json.loads((path / checkpoint.MANIFEST).read_text("utf-8"))
            files = about.pop("files")
            del about["manifest_sha256"]
        except (OSError, ValueError, KeyError, AttributeError):
            runtime.say(f"  {path}: its {checkpoint.MANIFEST} is damaged; not listed in {INDEX}")
            continue
        weights = {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}
        entries.append({"name": path.name, **about, "weights_sha256": weights})
    return entries


def begin(folder: Path, from_step: int) -> None:
    """Forget what came after `from_step`: the run goes on from there, and makes it again."""
    folder.mkdir(exist_ok=True)
    checkpoint.clear_leftovers(folder)
    for path, step in kept(folder).items():
        if step > from_step:
            checkpoint.delete(path)
    run_dir.write_json(folder / INDEX, index(folder))


def keep(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, stage: str, step: int, **about: object
) -> None:
    """Write the model and its entry. `about`: what else the index says of it, `tokens` among it."""
    name = name_of(stage, step, about["tokens"])
    aside = folder / f".writing-{name}"
    with checkpoint.room(folder):
        models.save(model, tokenizer, aside)
        checkpoint.commit(aside, folder / name, stage=stage, step=step, **about)
        run_dir.write_json(folder / INDEX, index(folder))
