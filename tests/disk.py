"""A disk that forgets: file operations are recorded, then replayed up to any point without some that were not fsynced.

    with recorded(folder) as log: …      what was made, written, renamed, deleted, fsynced under `folder`, in order
    for tree, saved in crashes(log): …   what a power cut may have left, and the last step whose save had returned

The rules, which no file system breaks and most keep more than: a name is durable after an fsync of its directory, bytes
after one of the file; before that each operation may have reached the disk or not, whatever came after it, and bytes
may be cut. A rename is one operation.
"""

import contextlib
import functools
import os
import random
from collections.abc import Iterator
from pathlib import Path

PATCHED = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


class Log(list):
    """("link", folder, name, node, is a folder) ("rename", folder, old name, new name, node) ("unlink", folder, name)
    ("data", node, bytes) ("fsync", node) ("saved", step)

    Nodes are numbers; 0 is the folder itself.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers: dict[int, int] = {}  # inode -> node
        self.contents: dict[int, bytes] = {}
        self.next = 0
        self.node(root)

    def node(self, path: Path) -> int:
        inode = path.lstat().st_ino
        if inode not in self.numbers:
            self.numbers[inode], self.next = self.next, self.next + 1
        return self.numbers[inode]

    def look(self) -> None:
        """Files that were made or written since the last look; nobody intercepts writes."""
        for path in sorted(self.root.rglob("*")):
            if path.is_dir():
                continue
            is_new = path.lstat().st_ino not in self.numbers
            node, content = self.node(path), path.read_bytes()
            if is_new:
                self.append(("link", self.node(path.parent), path.name, node, False))
            if content != self.contents.get(node, b""):
                self.contents[node] = content
                self.append(("data", node, content))

    def saved(self, step: int) -> None:
        self.look()
        self.append(("saved", step))


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[Log]:
    log, original = Log(root), {name: getattr(os, name) for name in PATCHED}

    def call(name, *arguments, **named):
        path = where(arguments[0], named.get("dir_fd"))
        if not path.is_relative_to(root):
            return original[name](*arguments, **named)
        log.look()
        if name == "fsync":
            log.append(("fsync", log.node(path)))
            return None
        node = log.node(path) if name != "mkdir" else None
        inode = path.lstat().st_ino if node is not None else None
        original[name](*arguments, **named)
        folder = log.node(path.parent)
        if name == "mkdir":
            log.append(("link", folder, path.name, log.node(path), True))
        elif name in ("rename", "replace"):
            target = where(arguments[1])
            assert target.parent == path.parent
            log.append(("rename", folder, path.name, target.name, node))
        else:
            del log.numbers[inode]  # the number of an inode comes again
            log.append(("unlink", folder, path.name))

    for name in PATCHED:
        setattr(os, name, functools.partial(call, name))
    try:
        yield log
        log.look()
    finally:
        for name in PATCHED:
            setattr(os, name, original[name])


def where(path: str | Path | int, folder: int | None = None) -> Path:
    if isinstance(path, int):
        return Path(os.readlink(f"/proc/self/fd/{path}"))
    return Path(os.readlink(f"/proc/self/fd/{folder}")) / path if folder is not None else Path(path).absolute()


def crashes(log: list, chance: random.Random) -> Iterator[tuple[dict, int | None]]:
    """({name: bytes or such a dict}, last step saved before the crash or None)."""
    saved = None
    for end in range(len(log) + 1):
        if end and log[end - 1][0] == "saved":
            saved = log[end - 1][1]
        pending = unsynced(log[:end])
        for dropped, cut in choices(pending, log, chance):
            yield replay(log[:end], dropped, cut), saved


def unsynced(log: list) -> list[int]:
    """Operations that no fsync has made durable."""
    pending: dict[int, list[int]] = {}
    for i, (kind, node, *_) in enumerate(log):
        if kind == "fsync":
            pending[node] = []
        elif kind != "saved":
            pending.setdefault(node, []).append(i)
    return sorted(i for of_node in pending.values() for i in of_node)


def choices(pending: list[int], log: list, chance: random.Random) -> Iterator[tuple[set[int], int | None]]:
    """(operations that are lost, one whose bytes are cut): none, all, each alone, all but each, and some at random."""
    yield set(), None
    yield set(pending), None
    for i in pending:
        yield {i}, None
        yield set(pending) - {i}, None
        if log[i][0] == "data":
            yield set(), i
    for _ in range(12 if len(pending) > 2 else 0):
        yield {i for i in pending if chance.random() < 0.5}, None


def replay(log: list, dropped: set[int], cut: int | None) -> dict:
    folders: dict[int, dict[str, int]] = {0: {}}
    contents: dict[int, bytes] = {}
    for i, (kind, node, *more) in enumerate(log):
        if i in dropped or kind in ("fsync", "saved"):
            continue
        if kind == "data":
            contents[node] = more[0][: len(more[0]) // 2] if i == cut else more[0]
            continue
        names = folders.setdefault(node, {})
        if kind == "link":
            names[more[0]] = more[1]
        elif kind == "rename":
            names.pop(more[0], None)
            names[more[1]] = more[2]
        else:
            names.pop(more[0], None)
    is_folder = {0} | {op[3] for op in log if op[0] == "link" and op[4]}

    def tree(node: int) -> dict | bytes:
        if node in is_folder:
            return {name: tree(child) for name, child in sorted(folders.get(node, {}).items())}
        return contents.get(node, b"")

    return tree(0)


def lay(tree: dict, folder: Path) -> None:
    """The tree as real files."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            lay(content, folder / name)
        else:
            (folder / name).write_bytes(content)
