"""What a tuning run is made from, found on this machine or fetched to it: base model, vocabulary, conversations.

settings -> find_inputs -> Inputs (paths, and hashes of their contents) -> load_tokenizer -> a tokenizer for chat
"""

import dataclasses
from pathlib import Path

from aquila_sft import hub, run_dir, runtime
from aquila_sft.config.model import Tokenizer
from aquila_sft.config.runs import PretrainRun, SftRun
from aquila_sft.data import sources, world
from aquila_sft.errors import UserError

BASE_FILES = ("config.json", "*.safetensors")  # what a base model is, apart from its vocabulary


@dataclasses.dataclass
class Inputs:
    """What a run is made from, as files of this machine."""

    base: Path | None  # None: fresh weights
    tokenizer: Path | None  # folder, or tiktoken ranks; None: the base's own
    data: list[Path]
    origin: dict  # Hub repositories and commits, for the record
    questions: Path | None = None  # the bundled world's test

    def contents(self) -> dict[str, str]:
        """Content hashes for the run's identity."""
        vocabulary = self.tokenizer or self.base
        names = ("tokenizer*.json", "special_tokens_map.json", "qwen.tiktoken")
        return {
            "data": run_dir.files_sha256(self.data),
            "base": run_dir.folder_sha256(self.base, *BASE_FILES) if self.base else "random",
            "vocabulary": run_dir.folder_sha256(vocabulary, *names)
            if vocabulary.is_dir()
            else run_dir.files_sha256([vocabulary]),
        }


def find_inputs(cfg: SftRun) -> Inputs:
    """Base, tokenizer and data as local files. Raises UserError with the ways on when one is missing."""
    if cfg.data.files is None and cfg.data.manifest is None and cfg.data.bundled is None:
        raise UserError("data.files, data.manifest and data.bundled are all null: give data.files=<conversations>")
    chosen = cfg.tokenizer.ranks or cfg.tokenizer.path
    if chosen is None and cfg.model.path == "random":
        raise UserError(
            "model.path=random has no tokenizer of its own: add tokenizer.path=<folder>, or tokenizer=aquila "
            "tokenizer.ranks=<qwen.tiktoken>"
        )
    vocabulary = Path(chosen).expanduser() if chosen else None
    if vocabulary is not None and not vocabulary.exists():
        raise UserError(
            f"tokenizer.{'ranks' if cfg.tokenizer.ranks else 'path'}={vocabulary}: no such "
            f"{'file' if cfg.tokenizer.ranks else 'folder'}"
        )
    origin: dict = {}
    questions = None
    if cfg.data.files is not None:
        files = sources.find(cfg.data.files)
    elif cfg.data.bundled == "world":
        written = world.write(Path(f"outputs/{cfg.scale}/world"))
        files, questions = [written["conversations"]], written["questions"]
    else:
        fetched = hub.dataset_files(cfg.data.manifest, cfg.data.subset)
        files = fetched.files
        origin["data"] = {
            "repo": fetched.repo,
            "commit": fetched.revision,
            "subset": fetched.subset,
            "licence": fetched.licence,
        }
    base = (
        None
        if cfg.model.path == "random"
        else hub.model_folder(cfg.model.path, cfg.model.revision, cfg.model.subfolder)
    )
    if base is not None:
        origin["model"] = {
            "path": cfg.model.path,
            "subfolder": cfg.model.subfolder,
            "commit": hub.commit_of(base) if hub.needs_hub(cfg.model.path) else None,
        }
    return Inputs(base, vocabulary, files, origin, questions)


def named_vocabulary(tokenizer: Tokenizer) -> Path:
    """The rank file or folder that tokenizer.ranks or tokenizer.path names. Raises UserError where it is not there."""
    key = "ranks" if tokenizer.ranks else "path"
    path = Path(getattr(tokenizer, key)).expanduser()
    if not path.exists() or path.is_dir() != (key == "path"):
        raise UserError(f"tokenizer.{key}={path}: no such {'file' if key == 'ranks' else 'folder'}")
    return path


def same_vocabulary(run: PretrainRun, own, of_shards, start: Path) -> None:
    """Raises UserError where the base at `start` has another vocabulary than the shards; both are tokenizers."""
    from aquila_sft.tokenizer import tokenizer_sha256

    if tokenizer_sha256(own, with_template=False) != tokenizer_sha256(of_shards, with_template=False):
        raise UserError(
            f"model.path={run.model.path} has another vocabulary ({len(own):,} entries) than data.shards="
            f"{run.data.shards} ({len(of_shards):,}); prepare them with tokenizer.path={start}"
        )


def load_tokenizer(cfg: SftRun, inputs: Inputs, out: run_dir.RunDir):
    """The run's tokenizer, with our chat template and a padding token, chat tokens checked or added."""
    from aquila_sft import chat_template
    from aquila_sft import tokenizer as tokenizers

    converted = out.path / "tokenizer"
    if cfg.tokenizer.ranks:
        tokenizer = tokenizers.convert_tiktoken(inputs.tokenizer, converted)
    else:
        tokenizer = tokenizers.load_tokenizer(inputs.tokenizer or inputs.base, converted_to=converted)
    template = chat_template.chatml(cfg.tokenizer.system)
    if tokenizer.chat_template and tokenizer.chat_template != template:
        runtime.say(f"  the tokenizer's own chat template is replaced: ChatML, system line {cfg.tokenizer.system!r}")
    tokenizer.chat_template = template
    if added := add_chat_tokens(cfg, tokenizer):
        runtime.say(f"  {added} chat tokens added to the vocabulary: {len(tokenizer):,} entries")
    chat_template.turn_end_id(tokenizer)  # raises when they are missing
    if give_padding(tokenizer):
        runtime.say(
            f"  the tokenizer has no padding token: {tokenizer.pad_token} is used; labels go by position, not by id"
        )
    return tokenizer


def add_chat_tokens(run: SftRun, tokenizer) -> int:
    """How many were missing and are added, where the run asks for it. Raises UserError with LoRA."""
    from aquila_sft import chat_template

    added = chat_template.add_chat_tokens(tokenizer) if run.tokenizer.add_chat_tokens else 0
    if added and run.lora:
        raise UserError(
            "tokenizer.add_chat_tokens=true with LoRA: the embedding of the added tokens would never be "
            "trained; tune full weights (recipe=sft), or a base that knows <|im_start|> and <|im_end|>"
        )
    return added


def give_padding(tokenizer) -> bool:
    """Whether the tokenizer has no padding token of its own: an existing one then serves."""
    lacks = tokenizer.pad_token is None
    if lacks:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return lacks
