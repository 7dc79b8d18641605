"""Checkpoints that are complete or absent, whatever kills the process or the machine.

    .writing-000500/     every file is written, then MANIFEST.json: path, size and sha256 of each, and its own sha256;
                         all files and folders are fsynced
    step-000500/         one rename and an fsync of the parent: from here on the checkpoint survives a power cut
    .deleting-000100/    the new one is read back; only when it verifies, an old one is renamed away and deleted

So a folder `step-…` is whole, or its disk is damaged. newest() takes the newest that verifies, and says what it passed
over and why. saving.py does the writing in a thread while training goes on.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from aquila_sft import runtime
from aquila_sft.errors import UserError, disk_fault

MANIFEST = "MANIFEST.json"
IS_STEP = re.compile(r"step-\d+")
DELETING = ".deleting-"  # before the name of what is half gone
SPARE = 2**24  # bytes left free beside a checkpoint: configuration, vocabulary, log


def write(parent: Path, step: int, fill: Callable[[Path], None], keep: int | None = None, **about: object) -> None:
    """The checkpoint of `step` from what `fill` puts into a folder; of the older ones the newest stay, `keep` in all.

    When it returns, a crash recovers this step or a later one. Raises UserError for what the disk refuses.
    """
    aside = parent / f".writing-{step:06d}"
    with room(parent):
        make_folder(parent)
        try:
            remove(aside)
            aside.mkdir()
            fill(aside)
            commit(aside, folder(parent, step), step=step, **about)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # half a checkpoint takes the room that the log needs
            raise
        if keep is not None:
            keep_newest(parent, keep)


def preflight(parent: Path, size: int) -> None:
    """Raises UserError when the disk has no room for a checkpoint of about `size` bytes."""
    make_folder(parent)
    free = shutil.disk_usage(parent).free
    if free < size + SPARE:
        raise UserError(
            f"no space left in {parent}: a checkpoint takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
            "nothing that was saved is lost: make room, and the same command goes on"
        )


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """A disk that is full, read-only or failing as one line; the libraries that write report it in many ways."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        fault = disk_fault(error)
        if fault is None and shutil.disk_usage(path).free > SPARE:
            raise
        raise UserError(
            f"{path} cannot be written: {fault or 'no space left'}; nothing that was saved is lost: put that right, "
            "and the same command goes on"
        ) from None


def folder(parent: Path, step: int) -> Path:
    return parent / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def all_of(parent: Path) -> list[Path]:
    """Oldest first."""
    named = (path for path in parent.glob("step-*") if IS_STEP.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


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
    manifest = json.loads(json.dumps({"files": files, **about}))  # as it will be read
    manifest["manifest_sha256"] = digest(manifest)
    (written / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*written.rglob("*"), written]:
        sync(path)
    os.rename(written, target)
    sync(target.parent)


def problem(checkpoint: Path, but: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a checkpoint folder, or None when every byte is as it was written, in all files `but` some."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
        own, files = manifest.pop("manifest_sha256"), manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is damaged"
    if own != digest(manifest):
        return f"{MANIFEST} is damaged"
    if IS_STEP.fullmatch(checkpoint.name) and manifest.get("step", step_of(checkpoint)) != step_of(checkpoint):
        return f"it is of step {manifest['step']}"
    for name, expected in files.items():
        file = checkpoint / name
        if name in but:
            continue
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if sha256(file) != expected["sha256"]:
            return f"{name} does not have the bytes that were written"
    return None


def newest(parent: Path) -> Path | None:
    """The newest checkpoint that verifies. One that does not is moved aside, with a line that says so."""
    for candidate in reversed(all_of(parent)):
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


def keep_newest(parent: Path, count: int) -> None:
    """Delete all but the newest `count`, if the newest verifies as it lies on the disk."""
    old = all_of(parent)[:-count]
    if not old:
        return
    latest = all_of(parent)[-1]
    if wrong := problem(latest):
        runtime.say(f"checkpoint {latest.name} is damaged ({wrong}): the ones before it are kept")
        return
    for checkpoint in old:
        delete(checkpoint)


def delete(folder: Path) -> None:
    """Whole under its name or not there: what is interrupted leaves half a folder as leftover(), which goes first."""
    away = leftover(folder)
    remove(away)
    if folder.exists():
        os.rename(folder, away)
        sync(folder.parent)  # or a power cut could leave the old name on a folder that is half empty
        remove(away)


def leftover(folder: Path) -> Path:
    """Where a folder is while it is deleted."""
    return folder.with_name(f"{DELETING}{folder.name}")


def clear_leftovers(parent: Path) -> None:
    """Remove what a killed process was writing or deleting."""
    for left in [*parent.glob(".writing*"), *parent.glob(f"{DELETING}*")]:
        remove(left)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """A folder whose name survives a power cut, and so its parents'."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_text(file: Path, text: str) -> None:
    """The old content or the new, never a part of it, also after a power cut."""
    aside = file.with_name(f".writing-{file.name}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, file)
    sync(file.parent)


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # so that what is read back comes from the disk, not from memory
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
