"""Conversations become packed rows on disk, once for all runs that want the same.

    files -> slices -> sft_steps, by as many processes as there are cores -> <folder>: train/, held-back/<language>/,
    ledger.json, quarantine.jsonl.zst, prepared.json (the key), MANIFEST.json (sizes, hashes)

Nothing leaves without a line in the ledger and one in the quarantine. Tokens lie flat in memory-mapped files, so a set
may be larger than memory and several processes share it. What was prepared is reused only under the same key, and when
its bytes are those that were written: data bytes, tokenizer, template, every setting that the rows depend on, and the
code that makes them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

from aquila_sft import checkpoint, runtime
from aquila_sft.config.data import Executor, Workers
from aquila_sft.config.runs import SftRun
from aquila_sft.data import decontaminate, slices, sources
from aquila_sft.data.ledger import NothingLeft
from aquila_sft.data.sft_steps import Encoder, RowPolicy, Work
from aquila_sft.errors import Stopped, UserError

LIBRARIES = ("tokenizers", "rensa", "py3langid")
ALONE = Workers(slice_mb=32.0, workers=1, executor=Executor.processes)
PREPARED = "prepared.json"
ASIDE = ".preparing-"  # before the name of what is half done


def policy_of(run: SftRun) -> RowPolicy:
    """What a run's settings say of rows."""
    names = {f.name for f in dataclasses.fields(RowPolicy)} & {f.name for f in dataclasses.fields(run.data)}
    return RowPolicy(
        max_length=run.train.max_length, seed=run.seed, **{name: getattr(run.data, name) for name in sorted(names)}
    )


def key_of(key: dict, policy: RowPolicy) -> dict:
    """`key`, what the caller knows of data and tokenizer, with all else that the rows depend on; JSON."""
    settings = dataclasses.asdict(policy)
    if policy.decontaminate:
        settings["decontaminate"] = benchmarks_sha256(policy.decontaminate)
    return json.loads(json.dumps({**key, **settings, "code": code_sha256()}))


@functools.cache
def benchmarks_sha256(folder: str) -> str:
    return decontaminate.sha256(decontaminate.read(Path(folder).expanduser(), setting="data.decontaminate"))


@functools.cache
def code_sha256() -> str:
    """Of all that could change the rows; rather too much than too little."""
    total = hashlib.sha256()
    here = Path(__file__).parent
    for file in [*sorted(here.glob("*.py")), here.parent / "chat_template.py"]:
        total.update(file.read_bytes())
    for name in LIBRARIES:
        total.update(f"{name} {importlib.metadata.version(name)}".encode())
    return total.hexdigest()


def prepare(
    files: list[Path],
    folder: Path,
    encode: Encoder,
    policy: RowPolicy,
    key: dict,
    workers: Workers = ALONE,
    *,
    first: int | None = None,
) -> dict:
    """`folder`, unless it is there under the same key; the ledger.

    encode: list of messages -> (ids, is_target) each; one that can be pickled, where there are several processes.
    first: only so many records are looked at. Raises NothingLeft when nothing is left to train on.
    """
    key = key_of(key if first is None else {**key, "first": first}, policy)
    aside = aside_of(folder)
    if (ledger := ledger_of(folder, key)) is not None:
        checkpoint.delete(aside)  # of one that was killed behind its last step
        return ledger
    slice_bytes = int(workers.slice_mb * 2**20)
    is_little = first is not None or sum(file.stat().st_size for file in files) <= slice_bytes
    origin = slices.origin({"conversations": files}, slice_bytes)
    cut = [whole(files)] if first is not None else slices.kept(aside, origin)
    cut = tuple(cut or slices.cut({"conversations": files}, slice_bytes))
    about = {"key": key, "slices": [str(part) for part in cut]}
    if is_little or read_json(aside / "about.json") != about:  # what another key, or other slices, left half done
        checkpoint.delete(aside)
        check_disk(files, folder.parent)
    with checkpoint.room(folder.parent):
        checkpoint.make_folder(aside)
        (aside / "about.json").write_text(json.dumps(about))
        if not is_little:
            slices.keep(aside, origin, cut)
        work = Work(aside, cut, policy, encode, is_durable=not is_little, first=first)
        run(work, workers)
        made = aside / "rows" / "set"
        ledger = json.loads((made / "ledger.json").read_text("utf-8"))
        if not ledger["kept"]:
            raise NothingLeft(ledger, files)
        checkpoint.remove(made / checkpoint.MANIFEST)  # half of one
        (made / PREPARED).write_text(json.dumps({"key": key, "files": [str(file) for file in files]}))
        checkpoint.delete(folder)
        checkpoint.commit(made, folder)
        checkpoint.delete(aside)
    return ledger


def whole(files: list[Path]) -> slices.Slice:
    """All of some files as one slice."""
    return slices.Slice("conversations", tuple(slices.Piece(str(file)) for file in files))


def aside_of(folder: Path) -> Path:
    """Where it is made."""
    return folder.with_name(f"{ASIDE}{folder.name}")


def run(work: Work, policy: Workers) -> None:
    from aquila_sft.data import workers

    if policy.executor is Executor.processes:
        workers.run(work, policy)
    elif not (work.folder / "rows" / "set").exists():
        workers.with_datatrove(work, policy)
        if policy.executor is Executor.slurm:
            raise Stopped("the jobs are submitted; when they are done, the same command goes on")


def ledger_of(folder: Path, key: dict) -> dict | None:
    """Of a set that is there under this key, whole; None for any other."""
    about = read_json(folder / PREPARED)
    if about is None or about.get("key") != key:
        return None
    if wrong := checkpoint.problem(folder):
        runtime.say(f"{folder} is damaged ({wrong}): prepared again")
        return None
    return read_json(folder / "ledger.json")


def read_json(file: Path) -> dict | None:
    """None where there is none, or where what is there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        content = json.loads(file.read_text("utf-8"))
        return content if isinstance(content, dict) else None
    return None


DISK_PER_BYTE = 4  # of text: five bytes a token, twice while the parts are put together; 0.8 kB of keys a record
COMPRESSED = 4  # text in a byte of gz, zst


def check_disk(files: list[Path], parent: Path) -> None:
    """Raises UserError where the disk has too little room."""
    checkpoint.make_folder(parent)
    needed, free = DISK_PER_BYTE * sum(map(text_bytes, files)), shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"data.cache={parent}: about {amount(needed)} are needed to prepare {len(files)} file(s), "
            f"{amount(free)} are free; make room (python -m aquila_sft.cache shows what may go), or choose "
            "another data.cache="
        )


def amount(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def text_bytes(file: Path) -> int:
    """About, as it is in memory."""
    if file.suffix == ".parquet":
        with contextlib.suppress(sources.Unreadable):  # which is told when it is read
            about = sources.parquet_file(file).metadata
            return sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
    return file.stat().st_size * (COMPRESSED if file.suffix in (".gz", ".zst", ".parquet") else 1)
