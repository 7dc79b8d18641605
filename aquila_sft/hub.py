"""Models and data sets of the Hugging Face Hub by name: a local folder of each, downloaded where it is missing.

    model_folder("BAAI/Aquila-135M", None)       -> folder that transformers loads from
    dataset_files("infinity_instruct", "0625")   -> parquet files of a pinned commit, and their licence

How a part of a repository gets here is in snapshot.py.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from aquila_sft import checkpoint, snapshot
from aquila_sft.door import nearest
from aquila_sft.errors import UserError

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"

# What AutoModelForCausalLM and AutoTokenizer read, and qwen.tiktoken, which recipe=tokenizer converts.
# Never *.py, and no pickles (*.bin, *.pt): neither is ever executed or loaded here.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.jinja",
)
NOT_MODEL_FILES = ("*/*", "consolidated*")  # subfolders; Mistral's second copy of the weights

FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".zip", ".gz", ".tar")


@dataclass(frozen=True)
class DatasetFiles:
    """Files of a data set and where they are from, for the ledger of a run."""

    files: list[Path]
    repo: str
    revision: str  # the commit, 40 hex digits
    subset: str
    licence: str


def needs_hub(path: str | None) -> bool:
    """Whether `model.path` has to come from the Hub: neither unset, nor `random`, nor a folder here."""
    return path not in (None, "random") and not Path(path).expanduser().is_dir()


def model_folder(path: str, revision: str | None, subfolder: str | None = None) -> Path:
    """Folder with config, tokenizer and safetensors: `path` itself if it is one, else from the Hub.

    `subfolder`: where in it the model lies, as in BAAI/Aquila-135M-Intermediate; nothing else of it is downloaded. A
    Hub snapshot's folder is named after its commit. Raises UserError, one line, within 10 s unless a download began.
    """
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        if subfolder and not (folder / subfolder).is_dir():
            there = sorted(p.parent.relative_to(folder).as_posix() for p in folder.rglob("config.json"))
            raise UserError(
                f"model.subfolder={subfolder}: {folder} has no such folder{nearest(subfolder, there)}; models are in: "
                f"{', '.join(there) or 'none'}"
            )
        return verified(folder / subfolder if subfolder else folder)
    if folder.is_file():
        raise UserError(f"model.path={path} is a file; name the folder with config.json and *.safetensors")
    if "://" in path:
        raise UserError(f"model.path={path} is an address; write the Hub id, owner/name, or a local folder")
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path
    if looks_local or path.endswith(FILE_SUFFIXES):  # not Path.suffix: that of Qwen2.5-0.5B is .5B
        raise UserError(
            f"model.path={path}: no such folder (working directory {Path.cwd()}); a folder of a Hub repository is "
            "model.path=<owner/name> model.subfolder=<folder>"
        )
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        raise UserError(f"model.path={path!r} is neither a folder here nor a Hub id such as BAAI/Aquila-135M") from None
    fetched = snapshot.fetch(wanted_model(path, revision, subfolder))
    return fetched / subfolder if subfolder else fetched


def verified(folder: Path) -> Path:
    """A model that a run here left says which bytes it has; what has other ones is not gone on from in silence."""
    if (folder / checkpoint.MANIFEST).is_file() and (wrong := checkpoint.problem(folder, but=("README.md",))):
        raise UserError(
            f"model.path={folder} is damaged ({wrong}); take another checkpoint, or, if it was changed on purpose, "
            f"remove its {checkpoint.MANIFEST}"
        )
    return folder


def wanted_model(path: str, revision: str | None, subfolder: str | None) -> snapshot.Wanted:
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    return snapshot.Wanted(
        path,
        "model",
        revision,
        tuple(inside + name for name in MODEL_FILES),
        tuple(inside + name for name in NOT_MODEL_FILES),
        subset=subfolder,
        hint=" (and no folder here has that name)",
    )


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot, or of a folder in one."""
    return next((part for part in reversed(folder.parts) if snapshot.COMMIT.fullmatch(part)), None)


def manifest_of(name: str, key: str = "data.manifest") -> dict:
    """What data/manifests/<name>.yaml says."""
    from omegaconf import OmegaConf

    known = sorted(file.stem for file in MANIFESTS.glob("*.yaml"))
    if name not in known:
        raise UserError(f"{key}={name} is not one of {', '.join(known)}{nearest(str(name), known)}")
    return OmegaConf.to_container(OmegaConf.load(MANIFESTS / f"{name}.yaml"))


def dataset_files(manifest: str, subset: str | None, at_most_bytes: float | None = None) -> DatasetFiles:
    """The files of one subset of data/manifests/<manifest>.yaml, at the commit it pins; of them the first by name.

    at_most_bytes: no further file is taken that would exceed it, but for the first one.
    Raises UserError, one line, within 10 s unless a download began.
    """
    about = manifest_of(manifest)
    subsets = about["subsets"]
    if subset not in subsets:
        raise UserError(
            f"data.subset={subset} is not one of {', '.join(subsets)} of data.manifest={manifest}"
            f"{nearest(str(subset), list(subsets))}"
        )
    wanted = snapshot.Wanted(
        about["repo"], "dataset", about["revision"], include=tuple(subsets[subset]["files"]), subset=subset
    )
    if at_most_bytes is not None:
        wanted = dataclasses.replace(wanted, include=first_files(wanted, at_most_bytes))
    folder = snapshot.fetch(wanted)
    return DatasetFiles(
        [folder / name for name in wanted.pick(snapshot.names_in(folder))],
        repo=wanted.repo,
        revision=folder.name,
        subset=subset,
        licence=about["licence"],
    )


def first_files(wanted: snapshot.Wanted, at_most_bytes: float) -> tuple[str, ...]:
    """Names of the first files of `wanted` up to that size, asked once: later runs need no network for them."""
    key = hashlib.sha256(repr((wanted.repo, wanted.revision, wanted.include, at_most_bytes)).encode()).hexdigest()[:16]
    kept = snapshot.cache_folder() / f"aquila-choice-{key}.json"
    if kept.is_file():
        return tuple(json.loads(kept.read_text("utf-8")))
    try:
        _, sizes = snapshot.within(snapshot.probe_seconds(), lambda: snapshot.probe(wanted))
    except snapshot.probe_errors() as error:
        raise wanted.refusal(snapshot.why(error)) from error
    names, total = [], 0
    for name, size in sizes.items():
        if names and total + size > at_most_bytes:
            break
        names.append(name)
        total += size
    kept.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(kept, json.dumps(names))
    return tuple(names)
