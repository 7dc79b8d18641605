"""The run directory: what is in it, and what the same command does on it a second time.

    no directory                     begin
    unfinished, same identity        go on from the newest complete checkpoint
    finished, same identity          reuse it, and say so
    another identity                 refuse, with the keys that differ, unless overwrite=true

The identity is everything that can change the weights: settings, and the content of data, base model and tokenizer.
File names, logging and the number of processes are not part of it.
"""

import contextlib
import dataclasses
import enum
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from aquila_sft import checkpoint, runtime
from aquila_sft.checkpoint import digest, remove
from aquila_sft.errors import Stopped, UserError

# Settings that cannot change the weights, or that the identity holds by content instead of by name.
NOT_IDENTITY = {
    "run_name",
    "output_dir",
    "overwrite",
    "evaluate",  # and what is in it
    "report_to",
    "audit.lost_share",
    "audit.allow",
    "recipe",
    "scale_is_explicit",
    "debug",
    "demo",
    "data.files",
    "data.decontaminate",
    "data.cache",
    "data.slice_mb",
    "data.workers",
    "data.executor",
    "data.tasks",
    "data.slurm",
    "data.bundled",
    "data.manifest",
    "data.subset",
    "data.shards",
    "data.eval_bytes",
    "data.damaged_blocks",
    "model.path",
    "model.revision",
    "model.subfolder",
    "tokenizer.path",
    "tokenizer.ranks",
    "train.micro_batch_rows",
    "train.logging_steps",
    "train.save_steps",
    "train.eval_steps",
    "train.keep_checkpoints",
    "train.activation_checkpointing",
    "train.intermediate_steps",
    "train.eval_share",
    "train.max_rollbacks",
}


# What a run makes. Only these are ever moved or deleted; whatever else lies in the directory is the user's.
MADE = (
    *("config.yaml", "env.json", "input.json", "metrics.jsonl", "summary.json", "ledger.json", "answers.jsonl"),
    *("checkpoints", "intermediate", "final", "adapter", "data", "tokenizer", "tensorboard"),
    "identity.json",  # leaves last and comes back first: where it lies tells whose the other files are
)
PREVIOUS = ".previous"  # an overwritten run waits here until the new one has begun
DELETING = ".deleting"
OURS = (".lock", ".writing-", "summary.json")  # may lie in a directory that no run has claimed yet


@dataclasses.dataclass
class RunDir:
    """Paths of one run, and the little state that says how far it is."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def summary(self) -> dict:
        return read_json(self.path / "summary.json") or {}

    def is_finished(self) -> bool:
        return self.summary().get("status") == "done" and self.final.is_dir()

    def write_summary(self, cfg: Any, status: str, **figures: Any) -> None:
        about = {"stage": cfg.stage, "recipe": cfg.recipe, "scale": cfg.scale, "demo": cfg.demo}
        write_json(self.path / "summary.json", {"status": status} | about | figures)

    def final_is_whole(self) -> bool:
        """False, after moving it aside, for a final/ whose files are not as they were written."""
        wrong = checkpoint.problem(self.final)
        if wrong and runtime.is_main():
            aside = self.final.with_name("damaged-final")
            remove(aside)
            self.final.rename(aside)
            runtime.say(f"{self.final} is damaged ({wrong}): moved to {aside}, and made again")
        return wrong is None

    @contextlib.contextmanager
    def recorded(self, cfg: Any) -> Iterator[None]:
        """summary.json tells how the run stands, whatever ends it: running, done, stopped or failed."""
        try:
            if runtime.is_main():
                self.write_summary(cfg, "running")
            yield
        except BaseException as error:
            if runtime.is_main():
                status = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
                with contextlib.suppress(OSError):  # on a disk that takes nothing the error itself is what matters
                    self.write_summary(cfg, status, reason=str(error) or type(error).__name__)
            raise

    def begin(self) -> None:
        """Every check has passed: from now on this directory is this run's, and an overwritten one is gone."""
        claim = read_json(self.path / "identity.json")
        write_json(self.path / "identity.json", claim | {"has_begun": True})
        remove(self.path / DELETING)
        if (self.path / PREVIOUS).is_dir():  # gone with one rename: a half deleted run must not come back
            os.rename(self.path / PREVIOUS, self.path / DELETING)
            remove(self.path / DELETING)

    def set_aside(self) -> None:
        (self.path / PREVIOUS).mkdir()
        self.move(self.path, self.path / PREVIOUS, MADE)

    def restore(self) -> None:
        """Bring back the run that was to be overwritten by one that never began."""
        previous = self.path / PREVIOUS
        if previous.is_dir():
            if (previous / "identity.json").exists():
                for name in reversed(MADE):
                    remove(self.path / name)
            self.move(previous, self.path, MADE[::-1])
            previous.rmdir()

    def overwrites(self, identity: dict) -> bool:
        """Whether what lies here is a run of this identity, with another one set aside for it."""
        claim = read_json(self.path / "identity.json")
        is_set_aside = (self.path / PREVIOUS / "identity.json").exists()
        return is_set_aside and claim is not None and claim["sha256"] == digest(identity)

    @staticmethod
    def move(source: Path, target: Path, names: tuple[str, ...]) -> None:
        for name in names:
            if (source / name).exists():
                os.rename(source / name, target / name)


@contextlib.contextmanager
def opened(cfg: Any, identity: dict) -> Iterator[RunDir]:
    """Apply the rule above and hold the directory's lock. Yields the run directory.

    For the main process only. Raises UserError for a directory that is another run's, that is no run's, or that
    another process trains in now. A run that fails before begin() neither blocks its directory nor costs the run
    that it was to overwrite; one that is stopped or killed there goes on with the same command, and any other command
    brings the old run back.
    """
    run = RunDir(Path(cfg.output_dir))
    make_folder(run.path)
    with locked(run.path):
        if not run.overwrites(identity):
            run.restore()
        previous = read_json(run.path / "identity.json")
        if previous is None:
            strangers = [p.name for p in run.path.iterdir() if not p.name.startswith(OURS)]
            if strangers:
                raise UserError(
                    f"{run.path} is not empty and not a run directory (it holds {strangers[0]}); "
                    "choose another with run_name= or output_dir="
                )
        elif previous["sha256"] != digest(identity):
            if not previous["has_begun"]:
                remove(run.path / "tokenizer")
            elif cfg.overwrite:
                run.set_aside()
            else:
                raise UserError(refusal(run.path, previous["identity"], identity))
        if not run.is_finished():
            has_begun = bool(previous and previous["sha256"] == digest(identity) and previous["has_begun"])
            claim = {"sha256": digest(identity), "has_begun": has_begun, "identity": identity}
            write_json(run.path / "identity.json", claim)  # first: a directory with other files and no claim is no run
            settings = yaml.safe_dump(plain(cfg), sort_keys=False, allow_unicode=True)
            checkpoint.write_text(run.path / "config.yaml", settings)
            write_json(run.path / "env.json", environment())
        try:
            yield run
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException:
            run.restore()
            raise


def make_folder(path: Path) -> None:
    try:
        checkpoint.make_folder(path)
        (path / ".lock").touch()
    except OSError as error:
        raise UserError(f"output_dir={path} cannot be written: {error.strerror}; choose another") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One training at a time in a directory; the lock goes with the process, however it ends."""
    with open(path / ".lock", "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process (pid {lock.read().strip() or 'unknown'}) is at work in {path}; wait for it "
                "and give the same command again. Two runs need two run_name=, several processes of one run a "
                "launcher (README, 'Launching')"
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def refusal(path: Path, old: dict, new: dict) -> str:
    differing = [
        f"{k}: {old.get(k, 'absent')} there, {new.get(k, 'absent')} now"
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    ]
    return (
        f"{path} holds a run of another configuration ({digest(old)[:12]} there, {digest(new)[:12]} now; "
        f"{'; '.join(differing)}); give this one a run_name= of its own, or overwrite=true to delete that run"
    )


def identity_of(cfg: Any, **contents: str) -> dict:
    """Flat settings that can change the weights, and content hashes (`data=…, base=…, tokenizer=…`)."""
    settings = flat(plain(cfg)).items()
    return {k: v for k, v in settings if k not in NOT_IDENTITY and not k.startswith("evaluate.")} | contents


def flat(tree: dict, prefix: str = "") -> dict:
    items: dict = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


def plain(cfg: Any) -> dict:
    """A dataclass as dicts, lists, strings and numbers."""

    def value(v: Any) -> Any:
        return v.value if isinstance(v, enum.Enum) else v

    return dataclasses.asdict(cfg, dict_factory=lambda pairs: {k: value(v) for k, v in pairs})


def files_sha256(files: list[Path]) -> str:
    """One hash over the bytes of files, in order; names do not count."""
    return joined(map(checkpoint.sha256, files))


def joined(hashes: Iterable[str]) -> str:
    """One of several, in order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, hashes))).hexdigest()


def folder_sha256(folder: Path, *patterns: str) -> str:
    """One hash over the files of a folder that match, in order of pattern and name."""
    return files_sha256(sorted(file for pattern in patterns for file in folder.glob(pattern)))


def environment() -> dict:
    """What a number in this directory was produced with."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    packages = (
        "aquila-sft",
        "torch",
        "triton",
        "transformers",
        "trl",
        "peft",
        "datasets",
        "accelerate",
        "tokenizers",
        "hydra-core",
        "numpy",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "processes": runtime.world_size(),
        "versions": versions,
    }


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # no JSON, no UTF-8
        raise UserError(f"{path} is damaged ({error}); bring back a copy of it, or choose another run_name=") from None


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, also when the process is killed while writing."""
    checkpoint.write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
