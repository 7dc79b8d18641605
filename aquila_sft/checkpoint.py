"""Checkpoints that are complete or absent.

A checkpoint folder is written under another name, every file is flushed to the disk, MANIFEST.json (path, size, sha256
of each file, and what the caller adds) goes in last, then one rename makes it visible. Whatever kills the process, a
folder with a manifest that verifies is whole; anything else is not a checkpoint.

    checkpoints/.writing-000500/…  --manifest, fsync, rename-->  checkpoints/step-000500/
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from aquila_sft import runtime
from aquila_sft.errors import UserError

MANIFEST = "MANIFEST.json"


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """A full disk as one line; the libraries that write report it as errors of many kinds."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if "No space left" not in str(error) and shutil.disk_usage(path).free > 2**20:
            raise
        raise UserError(
            f"no space left in {path}; nothing that was saved is lost: make room, and the same command goes on"
        ) from None


def folder(parent: Path, step: int) -> Path:
    return parent / f"step-{step:06d}"


def commit(written: Path, target: Path, **about: object) -> None:
    """Make the folder `written` visible as `target`, durably. A target that is there already is whole, and kept."""
    if target.exists():
        shutil.rmtree(written)
        return
    files = {
        str(f.relative_to(written)): {"size": f.stat().st_size, "sha256": sha256(f)}
        for f in sorted(written.rglob("*"))
        if f.is_file()
    }
    (written / MANIFEST).write_text(json.dumps({"files": files, **about}, indent=1), encoding="utf-8")
    for path in [*written.rglob("*"), written]:
        sync(path)
    os.rename(written, target)
    sync(target.parent)


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every byte is as it was written."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text("utf-8"))["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (json.JSONDecodeError, KeyError):
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if sha256(file) != expected["sha256"]:
            return f"{name} does not have the bytes that were written"
    return None


def newest(parent: Path) -> Path | None:
    """The newest checkpoint that verifies. One that does not is moved aside, with a line that says so."""
    for candidate in sorted(parent.glob("step-[0-9]*"), key=step_of, reverse=True):
        wrong = problem(candidate)
        if wrong is None:
            return candidate
        aside = moved_aside(candidate)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(candidate, aside)
        runtime.say(f"checkpoint {candidate.name} is damaged ({wrong}): moved to {aside}, looking for an older one")
    return None


def moved_aside(checkpoint: Path) -> Path:
    """Where a damaged one goes."""
    return checkpoint.with_name(f"damaged-{checkpoint.name}")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def keep_newest(parent: Path, count: int) -> None:
    """Delete all but the newest `count`; called after a newer one was committed."""
    for old in sorted(parent.glob("step-[0-9]*"), key=step_of)[:-count]:
        shutil.rmtree(old)


def clear_leftovers(parent: Path) -> None:
    """Remove what a killed process was writing."""
    for left in parent.glob(".writing*"):
        shutil.rmtree(left)


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
