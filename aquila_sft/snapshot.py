"""Part of one Hub repository as a folder of this machine, or one line that says why not and how to go on.

    Wanted -> fetch:  cached and whole? -> use it     else: probe (PROBE_S at most) -> room on the disk? -> download

The probe asks for what the download will need, the listing and one file, under a deadline that holds even
where no timeout reaches (name resolution, a server that drips): huggingface_hub itself retries for minutes.
HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are huggingface_hub's own and work as everywhere.
"""

import errno
import fnmatch
import os
import queue
import re
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquila_sft.errors import UserError

PROBE_S = 6.0  # for all of the probe: a run that cannot start says so within 10 s, imports included
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Wanted:
    """Part of one repository, with what a person calls it."""

    repo: str
    kind: str  # `model` or `dataset`
    revision: str | None  # commit, tag or branch; None: the main branch
    include: tuple[str, ...]  # patterns of file names; * also matches /
    exclude: tuple[str, ...] = ()
    subset: str | None = None
    hint: str = ""  # what else the user may have meant

    @property
    def name(self) -> str:
        kind = {"model": "model", "dataset": "data set"}[self.kind]
        part = {"model": "folder", "dataset": "subset"}[self.kind]
        subset = f"{part} {self.subset}, " if self.subset else ""
        return f"{kind} {self.repo} ({subset}revision {self.revision or 'main'})"

    @property
    def page(self) -> str:  # conditions are accepted on the Hub itself, not on a mirror of it
        return "https://huggingface.co/" + ("datasets/" if self.kind == "dataset" else "") + self.repo

    @property
    def local_way(self) -> str:
        return {"model": "model.path=<folder>", "dataset": "data.files=<files>"}[self.kind]

    @property
    def selection(self) -> dict[str, Any]:
        return {
            "repo_type": self.kind,
            "revision": self.revision,
            "allow_patterns": list(self.include),
            "ignore_patterns": list(self.exclude),
        }

    def pick(self, names: list[str]) -> list[str]:
        return sorted(
            n
            for n in names
            if any(fnmatch.fnmatchcase(n, p) for p in self.include)
            and not any(fnmatch.fnmatchcase(n, p) for p in self.exclude)
        )

    def refusal(self, why: str) -> UserError:
        """One line: what is missing, why, and the three ways on."""
        return UserError(
            f"cannot get {self.name}: {why}{self.hint}; accept the conditions at {self.page} and run "
            f"`hf auth login` (or set HF_TOKEN); or point at a local copy: {self.local_way}; "
            "or use scale=mini with model.path= and data.files= of your own for a small trial"
        )


def fetch(wanted: Wanted) -> Path:
    """The snapshot folder of `wanted`, downloaded as far as it is missing. Raises UserError."""
    pinned = COMMIT.fullmatch(wanted.revision or "")
    if pinned and (folder := cached(wanted)):
        return folder
    try:
        commit, sizes = within(probe_seconds(), lambda: probe(wanted))
    except probe_errors() as error:
        folder = None if pinned else cached(wanted)
        if folder is None:
            raise wanted.refusal(why(error)) from error
        say(f"note: {why(error)}; {wanted.name} is read from the cache, commit {folder.name}")
        return folder
    try:
        check_room(wanted, commit, sizes)
        return download(wanted, commit, sizes)
    except download_errors() as error:
        if full(error):
            raise UserError(
                f"no space left for {wanted.name} in {cache_folder()}; free some, or set HF_HOME "
                "to a folder on a larger disk; the same command goes on"
            ) from error
        raise wanted.refusal(
            f"the download broke off ({why(error)}), the same command goes on with the missing files"
        ) from error


def cached(wanted: Wanted) -> Path | None:
    """The snapshot in the cache, if it is known to be whole; no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(wanted.repo, **wanted.selection, local_files_only=True))
    except LocalEntryNotFoundError:  # also for a snapshot that its listing shows to be incomplete
        return None
    # A cache without a listing (older versions, single files by hand) cannot tell what is missing; names can.
    return folder if missing_from(wanted, names_in(folder)) is None else None


def probe(wanted: Wanted) -> tuple[str, dict[str, int]]:
    """The commit and the sizes of the wanted files, after asking for one of them as the download will.

    The listing of a gated repository is public, its files are not: only asking for a file tells.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    timeout = probe_seconds()
    info = HfApi().repo_info(
        wanted.repo, repo_type=wanted.kind, revision=wanted.revision, files_metadata=True, timeout=timeout
    )
    if not COMMIT.fullmatch(info.sha or ""):
        raise Lacking("the answer names no commit")
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    names = wanted.pick(list(sizes))
    if (what := missing_from(wanted, names)) is not None:
        raise Lacking(f"the repository has {what} at commit {info.sha}")
    get_hf_file_metadata(hf_hub_url(wanted.repo, names[0], repo_type=wanted.kind, revision=info.sha), timeout=timeout)
    return info.sha, {name: sizes[name] for name in names}


def check_room(wanted: Wanted, commit: str, sizes: dict[str, int]) -> None:
    """Says how much is to come. Raises OSError (ENOSPC) if the disk has no room for it."""
    cache = cache_folder()
    here = cache / f"{wanted.kind}s--{wanted.repo.replace('/', '--')}" / "snapshots" / commit
    left = {name: size for name, size in sizes.items() if not (here / name).is_file()}
    disk = next(p for p in (cache, *cache.parents) if p.exists())
    if left:
        say(
            f"downloading {wanted.name}, commit {commit}: {len(left)} of {len(sizes)} files, "
            f"{sum(left.values()) / 1e9:.2f} GB, to {cache}"
        )
    if sum(left.values()) > shutil.disk_usage(disk).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))


def download(wanted: Wanted, commit: str, sizes: dict[str, int]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    folder = Path(snapshot_download(wanted.repo, **{**wanted.selection, "revision": commit}))
    missing = [name for name in sizes if not (folder / name).is_file()]
    if missing:  # snapshot_download returns what is cached when the Hub goes away
        raise OSError(f"{missing[0]} is missing")
    if wanted.revision != commit:  # tells the cache what `main` is, for a later run without network
        hf_hub_download(wanted.repo, next(iter(sizes)), repo_type=wanted.kind, revision=wanted.revision)
    return folder


def names_in(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def missing_from(wanted: Wanted, names: list[str]) -> str | None:
    """What `names` lack to be all of `wanted`, as far as names can tell; None when nothing."""
    names = wanted.pick(names)
    if wanted.kind == "dataset":  # a part of it may have been fetched alone, as a folder of 7M_domains
        for pattern in wanted.include:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return f"no file {pattern}"
    if wanted.kind == "model":
        inside = f"{wanted.subset.strip('/')}/" if wanted.subset else ""
        if f"{inside}config.json" not in names:
            return f"no {inside}config.json"
        if not any(n.endswith(".safetensors") for n in names):
            return "no *.safetensors (pickled weights are not read)"
    for name in names:  # train-00000-of-00015.parquet, model-00001-of-00002.safetensors
        if part := re.fullmatch(r"(.*-)(\d{5})(-of-(\d{5})\..*)", name):
            first = 0 if f"{part[1]}00000{part[3]}" in names else 1
            for number in range(first, first + int(part[4])):
                if f"{part[1]}{number:05d}{part[3]}" not in names:
                    return f"no {part[1]}{number:05d}{part[3]}"
    return None


class Lacking(ValueError):
    """The repository is there, what is wanted of it is not."""


def probe_seconds() -> float:
    """PROBE_S, or HF_HUB_ETAG_TIMEOUT where someone has set it higher for a slow network."""
    given = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    return max(PROBE_S, float(given)) if given.isdigit() else PROBE_S


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """work(), or TimeoutError after `seconds`. What hangs stays in a daemon thread and holds up no exit."""
    answer: queue.Queue = queue.Queue()

    def run() -> None:
        try:
            answer.put((work(), None))
        except BaseException as error:  # handed over, and raised below
            answer.put((None, error))

    threading.Thread(target=run, name="hub-probe", daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def probe_errors() -> tuple[type[Exception], ...]:
    """All that a network, a proxy, a mirror or a token can do. The rest are bugs and keep their traceback."""
    from huggingface_hub.errors import HTTPError  # httpx's, whichever generation of httpx it uses

    # ValueError: an answer that is no JSON, a token with a stray character.
    # ImportError: a SOCKS proxy without the package for it.
    return HTTPError, OSError, ValueError, ImportError


def download_errors() -> tuple[type[Exception], ...]:
    return *probe_errors(), RuntimeError  # what the Xet transfer raises


def why(error: Exception) -> str:
    """A few words on one line."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    host = constants.ENDPOINT
    logged_in = get_token() is not None
    account = "this account has no access" if logged_in else "nobody is logged in"
    first_line = next((ln.strip() for ln in str(error).splitlines() if ln.strip()), type(error).__name__)
    first_line = first_line.replace(";", ",").rstrip(".")[:200]
    if isinstance(error, Lacking):
        return first_line
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return why(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set and {cache_folder()} has no complete copy"
    if isinstance(error, GatedRepoError):
        return f"it is gated and {account}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private and {account}"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        meaning = {
            401: "the token was refused" if logged_in else account,
            403: "access was refused",
            404: "not found",
            429: "too many requests",
        }
        return f"{host} answered {status}" + (f", {meaning[status]}" if status in meaning else "")
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"{host} did not answer in time (HF_HUB_ETAG_TIMEOUT=60 waits longer)"
    if isinstance(error, HTTPError):
        return f"no connection to {host}, {first_line}"
    if isinstance(error, PermissionError):
        return f"{first_line}, set HF_HOME to a folder that can be written"
    if isinstance(error, UnicodeError):
        return "HF_TOKEN has a character that no token has"
    if isinstance(error, ValueError):
        return f"{host} did not answer like a Hub, {first_line}"
    return first_line


def full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind `error`."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
