"""What lies on this machine for a run that has not begun; looked at, never written, never fetched.

    a recipe's settings -> what the recipes before it made -> shards, vocabulary, base, conversations, documents

Each function returns figures, or raises UserError as the run would. What only the Hub has is Absent: no fault, but
nothing to look at.
"""

import dataclasses
import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import safetensors

from aquila_sft import checkpoint, hub, prerequisites, run_dir, snapshot
from aquila_sft.config.data import TextData
from aquila_sft.config.runs import PretrainRun, Run, SftRun
from aquila_sft.data import documents, sft_set, sources
from aquila_sft.data.ledger import Ledger
from aquila_sft.data.rows import PackedRows
from aquila_sft.errors import UserError
from aquila_sft.inputs import named_vocabulary
from aquila_sft.log import MetricsFile


class Absent(Exception):
    """Not here now, and no fault: a recipe makes it first, or the Hub has it. The message says which."""


# ---- what the recipes before made ----


def needs(run: Run, compose_run: prerequisites.ComposeRun) -> dict[str, Run]:
    """The recipes whose outputs `run` takes because it names none of its own, with theirs before them."""
    if not prerequisites.open_needs(run):
        return {}
    names = [name for name in prerequisites.all_needs(run.recipe) if not prerequisites.is_given(name, run)]
    return {name: compose_run(prerequisites.words(name, run)) for name in names}


def take(run: Run, before: dict[str, Run]) -> list[str]:
    """Set the paths that finished recipes before `run` would set; the names of those that are not finished."""
    if before:
        prerequisites.set_paths(run, before, output_of)
    return [name for name, other in before.items() if not prerequisites.is_finished(other)]


def output_of(made: Run, needed_by: Run) -> str | None:
    """What a recipe before left, None if it is not finished; for an anneal a checkpoint."""
    if not prerequisites.is_finished(made):
        return None
    out = Path(made.output_dir)
    newest = newest_step(out) if needed_by.recipe == "anneal" and made.recipe == "pretrain" else None
    return str(newest or out / "final")


def newest_step(out: Path) -> Path | None:
    """The newest checkpoint by name; whether it is whole is for the run to find out, which may move it aside."""
    return next(reversed(checkpoint.all_of(out / "checkpoints")), None)


def state_of(run: Run) -> tuple[str, list[str]]:
    """How far the run directory is, and the settings in which the run there differs from this one."""
    out = Path(run.output_dir)
    known = run_dir.read_json(out / "identity.json")
    if known is None:
        strangers = [p.name for p in out.iterdir() if p.name not in (".lock", "summary.json")] if out.is_dir() else []
        if strangers:
            raise UserError(f"output_dir={out} is no run directory (it holds {strangers[0]}); choose another")
        return "new", []
    settings, there = run_dir.identity_of(run), known["identity"]
    found_out = ("kernel", "train.precision", "train.attention")  # what `auto` became
    differing = [
        f"{key}={value} ({there[key]} there)"
        for key, value in settings.items()
        # the identity of recipe=prepare has hashes under the names of sources
        if key in there and key not in found_out and not key.startswith("data.files.") and there[key] != value
    ]
    if not known["has_begun"]:
        return "new", []
    if run_dir.RunDir(out).is_finished():
        return "finished, it would be reused", differing
    newest = newest_step(out)
    return f"unfinished, it would go on from {newest.name if newest else 'its beginning'}", differing


# ---- vocabularies and bases ----


def tokenizer_of(folder: Path):
    """The tokenizer of a folder. Absent for tiktoken ranks, which a run converts first."""
    from aquila_sft.tokenizer import RANKS_FILE, load_tokenizer, read_ranks

    if folder.is_file():
        read_ranks(folder)
    if folder.is_file() or not (folder / "tokenizer.json").is_file() and (folder / RANKS_FILE).is_file():
        raise Absent(f"{folder}: tiktoken ranks, converted by the run")
    return load_tokenizer(folder)


def tokenizer_asked_for(run: Run):
    """What tokenizer.path or tokenizer.ranks names."""
    return tokenizer_of(named_vocabulary(run.tokenizer))


def base_of(run: PretrainRun | SftRun) -> Path | None:
    """The folder of the model that is gone on from; None: random weights."""
    path = run.model.path
    if path == "random":
        return None
    if path is None:
        raise Absent("a model of the recipe before")
    wanted = hub.wanted_model(path, run.model.revision, run.model.subfolder)
    if hub.needs_hub(path) and path.count("/") == 1 and not path.startswith((".", "~", "/", "outputs/")):
        folder = snapshot.cached(wanted)
        if folder is None:
            raise Absent(f"{path} from the Hub")
        return folder / run.model.subfolder if run.model.subfolder else folder
    folder = hub.model_folder(path, run.model.revision, run.model.subfolder)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={path} holds no model: config.json is missing")
    if not (weights := sorted(folder.glob("*.safetensors"))):
        raise UserError(f"model.path={path} has no *.safetensors; pickled weights are not read")
    try:
        config_of(folder)
        for file in weights:
            safetensors.safe_open(file, "numpy")  # reads the header, and compares it with the size
    except (ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"model.path={path} cannot be loaded: {error}") from None
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))


def rate_at(base: Path) -> float | None:
    """The learning rate that a checkpoint was left at, from the metrics.jsonl of its run; None where there is none."""
    is_step = base.name.startswith("step-")
    run = base.parent.parent if is_step else base.parent
    logged = [
        m
        for m in MetricsFile.lines(run / "metrics.jsonl")
        if "lr" in m and (not is_step or m["step"] <= checkpoint.step_of(base))
    ]
    return logged[-1]["lr"] if logged else None


def tokens_per_s(run: Path) -> float | None:
    """The median of what a run logged, its first step left out: that one warms up."""
    logged = [m["tokens_per_s"] for m in MetricsFile.lines(run / "metrics.jsonl") if "tokens_per_s" in m][1:]
    return float(np.median(logged)) if logged else None


# ---- conversations ----


@dataclasses.dataclass
class Conversations:
    """Figures of a set, as `sample` of it make them; beyond that scaled by the number of records."""

    records: int
    sampled: int
    report: dict  # the ledger of the sample
    rows: int  # of the whole
    filled: float
    tokens: int
    answer_tokens: int

    @property
    def is_exact(self) -> bool:
        return self.sampled == self.records


def conversations(run: SftRun, tokenizer, sample: int, folder: Path) -> Conversations:
    """The first `sample`, prepared as the run would into a folder of their own. UserError when nothing is left."""
    from aquila_sft.chat_template import encode_batch

    files = conversation_files(run)
    policy = sft_set.policy_of(run)
    encode = partial(encode_batch, tokenizer, default_system=run.tokenizer.system)
    report = sft_set.prepare(files, folder, encode, policy, {}, first=sample)
    rows = PackedRows(folder / "train")
    records = report["read"] if report["read"] < sample else sum(count_records(file) for file in files)
    whole = max(1.0, records / report["read"])
    return Conversations(
        records=records,
        sampled=report["read"],
        report=report,
        rows=round(len(rows) * whole),
        filled=report["rows"]["train"]["filled"],
        tokens=round(report["tokens"] * whole),
        answer_tokens=round(report["answer_tokens"] * whole),
    )


def conversation_files(run: SftRun) -> list[Path]:
    if run.data.files is not None:
        return sources.find(run.data.files)
    if run.data.bundled == "world":
        file = Path(f"outputs/{run.scale}/world/conversations.jsonl")
        if not file.is_file():
            raise Absent("the bundled world, written by the run")
        return [file]
    if run.data.manifest is None:
        raise UserError("data.files, data.manifest and data.bundled are all null: give data.files=<conversations>")
    raise Absent(f"the data set {run.data.manifest}, {run.data.subset}, from the Hub")


def count_records(file: Path) -> int:
    """Records of a file, without looking into them."""
    if file.name.endswith(".parquet"):
        return sources.parquet_file(file).metadata.num_rows
    if file.name.endswith(".json"):
        return sum(1 for _ in sources.read(file))
    with sources.readable(file), sources.open_bytes(file) as stream:
        return sum(1 for line in stream if line.strip())


# ---- documents ----


@dataclasses.dataclass
class Documents:
    """Figures of text, from the first documents of each source."""

    files: dict[str, list[Path]]
    file_bytes: int  # of all files, as they are on the disk
    sampled: list[str]
    languages: Counter  # bytes of the sampled text
    report: dict


def texts(data: TextData, scale: str, sample: int) -> Documents:
    if data.files is None and data.bundled == "world":
        world = Path(f"outputs/{scale}/world")
        paths = {"world": [world / "documents.jsonl"], "world_notes": [world / "notes.jsonl"]}
        if not all(path.is_file() for listed in paths.values() for path in listed):
            raise Absent("the bundled world, written by the run")
    elif data.files is None:
        corpora = ", ".join(name for name, weight in (getattr(data, "corpora", None) or {}).items() if weight)
        raise Absent(f"the corpora {corpora} from the Hub" if corpora else "text: give data.files=<files>")
    else:
        paths = documents.find(data, Path())  # writes nothing where files are given
    ledger, sampled, languages = Ledger(), [], Counter()
    for source, listed in paths.items():
        found = documents.read({source: listed}, data.text_column, ledger.refuse)
        for document, _ in itertools.islice(found, max(1, sample // len(paths))):
            languages[document.language] += len(document.text.encode())
            sampled.append(document.text)
    total = sum(path.stat().st_size for listed in paths.values() for path in listed)
    return Documents(paths, total, sampled, languages, ledger.as_dict())
