"""A power cut at any point of a save, an operation of it that fails, a bit that flips afterwards: nothing is lost."""

import errno
import io
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import disk
import pytest

from aquila_sft import checkpoint, run_dir
from aquila_sft.errors import UserError

STEPS = (1, 2, 3)  # one is kept: a new one may cost the old one only once it is durable
TREE = ("outputs", "run", "checkpoints")

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks files up in Linux's /proc")


def content(step: int) -> dict[str, bytes]:
    return {"model.bin": b"weights %d " % step * 50, "part/optimizer.bin": b"moments %d " % step * 30}


def save(parent: Path, step: int, keep: int = 1) -> None:
    def fill(folder: Path) -> None:
        for name, data in content(step).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

    checkpoint.write(parent, step, fill, keep=keep, places=step)


def recovered(parent: Path) -> int | None:
    """The step that a start after the crash goes on from; everything visible must be whole, and another save work."""
    broken = [path.name for path in checkpoint.all_of(parent) if checkpoint.problem(path)]
    assert not broken, f"{broken} is visible and not whole"
    if parent.is_dir():
        checkpoint.clear_leftovers(parent)
    newest = checkpoint.newest(parent)
    step = checkpoint.step_of(newest) if newest else None
    if newest:
        assert all((newest / name).read_bytes() == data for name, data in content(step).items())
    save(parent, (step or 0) + 1)
    assert checkpoint.newest(parent) == checkpoint.folder(parent, (step or 0) + 1)
    return step


@pytest.fixture
def memory():
    """A folder of its own, in memory where there is such a place: thousands of folders are made and removed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder).resolve()


@pytest.fixture
def quick(monkeypatch):
    """The check itself need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded").resolve()
    with disk.recorded(folder) as log:
        for step in STEPS:
            save(folder.joinpath(*TREE), step)
            log.saved(step)
    return log


def violation(log: list, known: dict, folder: Path) -> str | None:
    """What is wrong in the first crash state that is not recovered; None when all are."""
    for tree, saved in disk.crashes(log, random.Random(0)):
        key = repr(tree)
        if key not in known:
            disk.lay(tree, folder)
            try:
                known[key] = recovered(folder.joinpath(*TREE))
            except AssertionError as error:
                known[key] = str(error)
            shutil.rmtree(folder)
        if isinstance(known[key], str):
            return known[key]
        if (known[key] or 0) < (saved or 0):
            return f"step {saved} was saved, step {known[key]} is recovered"
    return None


def test_every_crash_state_recovers_the_last_saved_step_or_a_later_one(log, quick, memory):
    known = {}
    assert violation(log, known, memory / "state") is None
    assert len(known) > 100 and {None, *STEPS} == set(known.values())


def test_leaving_out_any_one_fsync_loses_something(log, quick, memory):
    known = {}
    fsyncs = [i for i, operation in enumerate(log) if operation[0] == "fsync"]
    assert len(fsyncs) > 20
    for i in fsyncs:
        assert violation(log[:i] + log[i + 1 :], known, memory / "state"), (i, log[i - 1 : i + 2])


class Config:
    """As little of a run's configuration as a run directory looks at."""

    def __init__(self, folder: Path) -> None:
        self.output_dir, self.overwrite = str(folder), False


def test_a_crash_in_a_run_directory_never_bars_the_same_command(quick, memory, monkeypatch):
    monkeypatch.setattr(run_dir, "environment", dict)
    monkeypatch.setattr(run_dir, "plain", vars)
    identity = {"lr": 0.1}
    folder = (memory / "recorded").resolve()
    folder.mkdir()
    with disk.recorded(folder) as log:
        with run_dir.opened(Config(folder / "run"), identity) as out:
            run_dir.write_json(out.path / "summary.json", {"status": "running"})
            out.begin()
            save(out.checkpoints, 1)
            log.saved(1)
            run_dir.write_json(out.path / "summary.json", {"status": "done"})
    known = set()
    for tree, saved in disk.crashes(log, random.Random(0)):
        if (key := repr((tree, saved))) in known:
            continue
        known.add(key)
        disk.lay(tree, memory / "state")
        with run_dir.opened(Config(memory / "state/run"), identity) as out:
            newest = checkpoint.newest(out.checkpoints)
            assert newest or not saved
            out.summary()
        shutil.rmtree(memory / "state")
    assert len(known) > 100


def failing(monkeypatch, number: int, at: int) -> list:
    """The at-th operation on files from now on fails; the list says which it was."""
    operations = []

    def wrap(owner, name, counts=lambda *_: True):
        original = getattr(owner, name)

        def call(*arguments, **named):
            if counts(*arguments):
                operations.append((name, arguments))
                if len(operations) == at:
                    raise OSError(number, os.strerror(number))
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    for name in disk.PATCHED:
        wrap(os, name)
    wrap(io, "open", lambda path, mode="r", *_: "w" in mode)
    return operations


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_whatever_operation_the_disk_refuses_nothing_saved_is_lost(quick, memory, number):
    at = 0
    while True:
        at += 1
        parent = memory / f"{at}" / "checkpoints"
        save(parent, 1)
        save(parent, 2, keep=2)
        with pytest.MonkeyPatch.context() as patch:
            operations = failing(patch, number, at)
            try:
                save(parent, 3)
            except UserError as error:
                assert os.strerror(number) in str(error) and "the same command goes on" in str(error)
        if len(operations) < at:
            break
        assert recovered_step(parent) in (2, 3), operations[at - 1]
        save(parent, 3)
        assert recovered_step(parent) == 3 and not list(parent.glob(".writing*"))
    assert at > 20


def recovered_step(parent: Path) -> int:
    return checkpoint.step_of(checkpoint.newest(parent))


def test_a_disk_without_room_is_refused_before_anything_is_written(memory, monkeypatch):
    save(memory, 1)
    free = shutil.disk_usage(memory).free
    with pytest.raises(UserError, match="no space left in .*: a checkpoint takes .* MB and .* MB are free"):
        checkpoint.preflight(memory, free)
    assert [path.name for path in memory.iterdir()] == ["step-000001"]
    checkpoint.preflight(memory, 1000)


def flipped(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


@pytest.mark.parametrize("damage", [flipped, cut])
def test_every_flipped_bit_and_every_cut_is_found_and_the_one_before_is_used(quick, memory, damage, capsys):
    chance = random.Random(damage.__name__)
    (memory / "whole").mkdir()
    for step in (1, 2):
        save(memory / "whole", step, keep=2)
    for number in range(200):
        parent = memory / "damaged"
        shutil.copytree(memory / "whole", parent)
        files = [path for path in sorted(checkpoint.folder(parent, 2).rglob("*")) if path.is_file()]
        damage(file := chance.choice(files), chance)
        assert checkpoint.newest(parent) == checkpoint.folder(parent, 1), (number, file)
        assert "checkpoint step-000002 is damaged" in capsys.readouterr().out
        shutil.rmtree(parent)


def test_old_ones_stay_when_the_newest_does_not_verify(memory, capsys):
    for step in (1, 2):
        save(memory, step, keep=2)
    (memory / "step-000003").mkdir()
    (memory / "step-000003" / checkpoint.MANIFEST).write_text(json.dumps({"files": {}}))
    checkpoint.keep_newest(memory, 1)
    assert len(checkpoint.all_of(memory)) == 3 and "step-000003 is damaged" in capsys.readouterr().out
