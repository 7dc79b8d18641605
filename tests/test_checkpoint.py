"""A checkpoint is whole or it is none; a run directory belongs to one run."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from aquila_sft import checkpoint, run_dir
from aquila_sft.errors import Stopped, UserError


def write(parent, step, text="weights"):
    def fill(folder):
        (folder / "sub").mkdir()
        (folder / "model.bin").write_text(text * 100)
        (folder / "sub/state.json").write_text("{}")

    checkpoint.write(parent, step, fill)
    return checkpoint.folder(parent, step)


def test_a_committed_checkpoint_verifies_and_the_newest_is_found(tmp_path):
    write(tmp_path, 5)
    newest = write(tmp_path, 40)
    assert checkpoint.problem(newest) is None and checkpoint.newest(tmp_path) == newest
    assert json.loads((newest / "MANIFEST.json").read_text())["step"] == 40
    assert not list(tmp_path.glob(".writing*"))


def damage(kind, folder):
    file = folder / "model.bin"
    if kind == "flipped bit":
        data = bytearray(file.read_bytes())
        data[17] ^= 1
        file.write_bytes(data)
    elif kind == "cut":
        os.truncate(file, 10)
    elif kind == "file gone":
        file.unlink()
    elif kind == "no manifest":
        (folder / "MANIFEST.json").unlink()
    else:
        os.truncate(folder / "MANIFEST.json", 30)


@pytest.mark.parametrize("kind", ["flipped bit", "cut", "file gone", "no manifest", "cut manifest"])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_taken(tmp_path, kind, capsys):
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    damage(kind, newer)
    assert checkpoint.newest(tmp_path) == older
    assert (tmp_path / "damaged-step-000010").is_dir() and "step-000010 is damaged" in capsys.readouterr().out


def test_no_older_checkpoint_is_deleted_while_the_newest_does_not_verify(tmp_path, capsys):
    folders = [write(tmp_path, step) for step in (5, 10, 15)]
    damage("flipped bit", folders[-1])
    checkpoint.keep_newest(tmp_path, 1)
    assert all(folder.is_dir() for folder in folders)
    assert "step-000015 is damaged" in capsys.readouterr().out and checkpoint.newest(tmp_path) == folders[1]


def test_what_was_never_committed_is_no_checkpoint_and_is_cleared(tmp_path):
    (tmp_path / ".writing-000005/checkpoint-5").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None
    checkpoint.clear_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(28, FULL), RuntimeError(f"failed: {FULL}")])
def test_a_full_disk_is_one_line_and_other_errors_are_not_hidden(tmp_path, error):
    with pytest.raises(UserError, match=f"cannot be written: {FULL}; nothing that was saved is lost"):
        with checkpoint.room(tmp_path):
            raise error
    with pytest.raises(RuntimeError, match="shape"):
        with checkpoint.room(tmp_path):
            raise RuntimeError("shape mismatch")


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    checkpoint.keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]


def test_a_folder_is_whole_or_gone_and_what_a_kill_left_of_one_goes_before_its_namesake(tmp_path, monkeypatch):
    def removes_a_file_and_dies(path):
        (path / "model.bin").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", removes_a_file_and_dies)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.delete(write(tmp_path, 5))
    left = checkpoint.leftover(checkpoint.folder(tmp_path, 5))
    assert [path.name for path in tmp_path.iterdir()] == [left.name] and not (left / "model.bin").exists()
    again = write(tmp_path, 5)
    checkpoint.delete(again)
    checkpoint.delete(again)  # none is there: nothing is wrong
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Config:
    output_dir: str
    stage: str = "sft"
    recipe: str = "sft"
    scale: str = "mini"
    demo: bool = True
    overwrite: bool = False
    lr: float = 0.1
    run_name: str = "a"


def open_run(folder, *, begin=True, finish=False, fail=None, **changes):
    cfg = Config(str(folder), **changes)
    with run_dir.opened(cfg, run_dir.identity_of(cfg, data="d1")) as out:
        was_finished = out.is_finished()
        if fail:
            (out.path / "data").mkdir(exist_ok=True)
            raise fail
        if begin and not was_finished:
            out.begin()
        if finish:
            out.final.mkdir(exist_ok=True)
            out.write_summary(cfg, "done")
        return was_finished


def test_the_run_directory_rule(tmp_path):
    folder = tmp_path / "run"
    assert open_run(folder) is False  # begin
    assert open_run(folder) is False  # go on
    assert open_run(folder, run_name="b") is False  # a name changes no weights
    open_run(folder, finish=True)
    assert open_run(folder) is True  # reuse
    with pytest.raises(UserError, match=r"another configuration .*lr: 0.1 there, 0.2 now.*overwrite=true"):
        open_run(folder, lr=0.2)
    assert open_run(folder) is True  # a refusal loses nothing
    (folder / "notes.txt").write_text("mine")
    assert open_run(folder, lr=0.2, overwrite=True) is False
    names = {p.name for p in folder.iterdir()}
    assert names == {".lock", "config.yaml", "env.json", "identity.json", "notes.txt"}


def test_a_run_that_fails_its_checks_neither_costs_the_old_run_nor_blocks_the_directory(tmp_path):
    folder = tmp_path / "run"
    open_run(folder, finish=True)
    with pytest.raises(UserError, match="a check failed"):
        open_run(folder, lr=0.2, overwrite=True, fail=UserError("a check failed"))
    assert open_run(folder) is True and not (folder / ".previous").exists()
    fresh = tmp_path / "fresh"
    with pytest.raises(UserError, match="a check failed"):
        open_run(fresh, lr=0.3, fail=UserError("a check failed"))
    assert open_run(fresh, lr=0.4) is False
    with pytest.raises(UserError, match="another configuration"):
        open_run(fresh, lr=0.3)


def test_a_start_that_was_killed_before_it_began_gives_the_old_run_back(tmp_path):
    folder = tmp_path / "run"
    open_run(folder, finish=True)
    run_dir.RunDir(folder).set_aside()  # what overwrite=true does first; then the process dies
    (folder / "config.yaml").write_text("half of the new one")
    assert open_run(folder) is True
    assert "half" not in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("stop", [Stopped("SIGTERM"), KeyboardInterrupt()])
def test_an_overwriting_run_that_is_stopped_before_it_began_goes_on_and_another_command_gets_the_old_one(
    tmp_path, stop
):
    folder = tmp_path / "run"
    open_run(folder, finish=True)
    for _ in range(2):
        with pytest.raises(type(stop)):
            open_run(folder, lr=0.2, overwrite=True, fail=stop)
        (folder / "data/tokens").write_text("made so far")
    shutil.copytree(folder, other := tmp_path / "other")
    assert open_run(folder, lr=0.2, overwrite=True) is False
    assert (folder / "data/tokens").read_text() == "made so far" and not (folder / "final").exists()
    assert not list(folder.glob(".previous*")) and open_run(folder, lr=0.2) is False
    assert open_run(other) is True and not (other / "data").exists()


def test_whatever_rename_or_removal_a_kill_comes_before_the_old_run_comes_back_whole(tmp_path, monkeypatch):
    """An overwriting start is killed while it sets the old run aside, or brings it back after a failed check."""
    monkeypatch.setattr(run_dir, "environment", dict)
    own, deaths = {"rename": os.rename, "remove": run_dir.remove}, 0
    left = [0]

    def dying(name):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise SystemExit  # and so at every later call: nothing is put right by a dead process
            own[name](*arguments)

        return call

    for count in range(100):
        folder = tmp_path / str(count)
        open_run(folder, finish=True)
        (folder / "data").mkdir()
        (folder / "data/tokens").write_text("of the old run")
        left[0] = count
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", dying("rename"))
            patch.setattr(run_dir, "remove", dying("remove"))
            with pytest.raises((UserError, SystemExit)) as end:
                open_run(folder, lr=0.2, overwrite=True, fail=UserError("a check failed"))
        assert open_run(folder) is True and (folder / "data/tokens").read_text() == "of the old run"
        assert not (folder / ".previous").exists()
        deaths += end.type is SystemExit
        if end.type is UserError:
            break
    assert deaths > 20


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds thesis.tex"):
            open_run(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    cfg = Config(str(tmp_path / "run"))
    code = (
        "import sys, dataclasses\nfrom aquila_sft import run_dir\nfrom aquila_sft.errors import UserError\n"
        "from pathlib import Path\ntry:\n    with run_dir.locked(Path(sys.argv[1])): pass\n"
        "except UserError as e: print(e); sys.exit(2)"
    )
    with run_dir.opened(cfg, {}):
        other = subprocess.run([sys.executable, "-c", code, cfg.output_dir], capture_output=True, text=True)
    assert other.returncode == 2 and f"pid {os.getpid()}" in other.stdout
