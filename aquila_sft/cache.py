"""Prepared instruction sets: a folder that all runs share, who uses what of it, and what may go.

    python -m aquila_sft.cache                                   what is there
    python -m aquila_sft.cache delete=<key>|all                  delete what no run is using
    python -m aquila_sft.cache quarantine=<key or file>          what was left out and why, one JSON object a line
    python -m aquila_sft.cache quarantine=… reason=<beginning>   the original records of that reason, for data.files=
    … cache=<folder>                                             this one, instead of all outputs/*/cache

A set is named by the beginning of its key. Who makes one holds its lock alone, who trains on one shares it.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aquila_sft import checkpoint, runtime
from aquila_sft.config.runs import SftRun
from aquila_sft.data import quarantine, sft_set
from aquila_sft.errors import USER_ERROR, UserError

LOCKS = ".locks"
NO_UTF8 = re.compile("[\ud800-\udfff]")  # halves of surrogate pairs, and bytes that were no text
# What a set is called: made, half made, half deleted. Nothing under another name is ever listed or deleted.
ASIDE = rf"(?:{re.escape(checkpoint.DELETING)})?(?:{re.escape(sft_set.ASIDE)})?"
NAME = re.compile(rf"(?P<aside>{ASIDE})(?P<key>[0-9a-f]{{16}})")


def folder_of(run: SftRun, key: dict) -> Path:
    """In data.cache, or beside the run's directory, where the other runs of its scale are."""
    cache = Path(run.data.cache).expanduser() if run.data.cache else Path(run.output_dir).parent / "cache"
    return cache / checkpoint.digest(key)[:16]


@contextlib.contextmanager
def in_use(folder: Path, *, alone: bool, wait: bool = True) -> Iterator[bool]:
    """A prepared set, made or deleted alone, or shared. Yields False where another has it and one does not wait."""
    locks = folder.parent / LOCKS
    checkpoint.make_folder(locks)
    with open(locks / folder.name, "w") as lock:
        how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            runtime.say(f"  another run prepares {folder}: waiting for it")
            fcntl.flock(lock, how)
        yield True


def prepared(folder: Path, key: dict, stack: contextlib.ExitStack, make: Callable[[], dict]) -> tuple[dict, bool]:
    """The ledger of the set with this key, and whether it was there; make() makes it. Shared until `stack` ends."""
    was_there = True
    while True:
        with contextlib.ExitStack() as sharing:
            sharing.enter_context(in_use(folder, alone=False))
            if (ledger := sft_set.ledger_of(folder, key)) is not None:
                stack.push(sharing.pop_all())
                return ledger, was_there
        was_there = False
        with in_use(folder, alone=True):
            make()


def sets(caches: list[Path]) -> list[Path]:
    """Whole ones, half done ones, and what is left of half deleted ones. Raises UserError for a folder that is none."""
    found = set()
    for cache in caches:
        try:
            paths = [Path(entry) for entry in os.scandir(cache) if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise UserError(f"cache={cache} cannot be read: {error.strerror}") from None
        for path in paths:
            name = NAME.fullmatch(path.name)
            if name and (name["aside"] or (path / sft_set.PREPARED).is_file()):
                found.add(cache / name["key"])
    return sorted(found)


def chosen(caches: list[Path], name: str) -> Path:
    found = [folder for folder in sets(caches) if folder.name.startswith(name)]
    if len(found) != 1:
        raise UserError(
            f"{len(found)} prepared sets have a name that begins with {name!r}; without words all are listed"
        )
    return found[0]


def line_of(folder: Path) -> str:
    about, ledger = sft_set.read_json(folder / sft_set.PREPARED), sft_set.read_json(folder / "ledger.json")
    paths = [folder, sft_set.aside_of(folder)]
    paths += [checkpoint.leftover(path) for path in paths]
    files = [file for path in paths for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    with in_use(folder, alone=True, wait=False) as is_free:
        state = "" if is_free else ", in use"
    if about is None or ledger is None:
        return f"{folder}  not finished, {size / 1e6:,.1f} MB{state}"
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / sft_set.PREPARED).stat().st_mtime))
    names = ", ".join(Path(file).name for file in about["files"][:2]) + (" …" if len(about["files"]) > 2 else "")
    return (
        f"{folder}  {made}  {ledger['kept'] + ledger['held_back']:,} of {ledger['read']:,} conversations, "
        f"{ledger['tokens']:,} tokens, rows of {about['key']['max_length']:,}, {size / 1e6:,.1f} MB{state}: {names}"
    )


def delete(caches: list[Path], name: str) -> None:
    for folder in sets(caches) if name == "all" else [chosen(caches, name)]:
        with in_use(folder, alone=True, wait=False) as is_free:
            if not is_free:
                if name != "all":
                    raise UserError(f"delete={name}: a run is using {folder}; nothing is deleted")
                print(f"{folder}  in use, kept")
                continue
            for path in (folder, sft_set.aside_of(folder)):
                checkpoint.delete(path)
            print(f"{folder}  deleted")


def quarantined(caches: list[Path], name: str, reason: str | None) -> None:
    file = Path(name) if Path(name).exists() else chosen(caches, name)
    for line in quarantine.read(file / quarantine.FILE if file.is_dir() else file, reason):
        told = line if reason is None else line["record"]
        text = json.dumps(told, ensure_ascii=False)
        print(json.dumps(told) if NO_UTF8.search(text) else text)


def main(words: list[str]) -> int:
    try:
        given = dict(word.split("=", 1) if "=" in word else (word, "") for word in words)
        if unknown := given.keys() - {"delete", "quarantine", "reason", "cache"}:
            raise UserError(f"{min(unknown)} is not one of delete=, quarantine=, reason=, cache=")
        if empty := [name for name, value in given.items() if not value]:
            raise UserError(f"{empty[0]}= has nothing behind it; python -m aquila_sft.cache lists what there is")
        caches = [Path(given["cache"])] if "cache" in given else sorted(Path("outputs").glob("*/cache"))
        if "delete" in given:
            delete(caches, given["delete"])
        elif "quarantine" in given:
            quarantined(caches, given["quarantine"], given.get("reason"))
        else:
            for folder in sets(caches):
                print(line_of(folder))
            print(f"{len(sets(caches))} prepared set(s); delete=<key> or delete=all deletes")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # | head
        sys.stdout = None
    except OSError as error:  # of locks, of sets of somebody else
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
