"""Files of records, one at a time: parquet, jsonl (also .gz, .zst) and json arrays, from paths and globs.

    paths, globs -> files -> (where, record | None)        where = "file:line", or "file:row" of a parquet file

A line that is not a JSON object comes out as None and is the caller's to count: one bad line never ends a run. A file
in which no line is one is not what its name says: Unreadable.
"""

import codecs
import contextlib
import glob
import gzip
import io
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from aquila_sft.data import json_stream
from aquila_sft.errors import UserError

CLOCKS_NS = 2_000_000_000  # the coarsest times of change that a file system keeps
Broken = Callable[[object], None]
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")


def find(patterns: list[str], suffixes: tuple[str, ...] = SUFFIXES, *, setting: str = "data.files") -> list[Path]:
    """The files that paths and globs name, each once, sorted within a pattern. Raises UserError when one names none."""
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(f"{setting}={pattern} is a folder; name its files, as in {setting}={pattern}/*.parquet")
        found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        found = [f for f in found if f.is_file()]
        if not found:
            raise UserError(f"{setting}={pattern}: no such file (working directory {Path.cwd()})")
        files += [f for f in found if f not in files]
    for file in files:
        if not file.name.endswith(suffixes):
            raise UserError(f"{setting}={file}: unknown kind of file; readable are {', '.join(suffixes)}")
    return files


def look(file: Path) -> list[int]:
    """Size, inode, and when content and inode were changed: what a file's bytes cannot change without."""
    about = file.stat()
    return [about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]


def settled_look(file: Path) -> list[int] | None:
    """The same, before reading; None for a file changed so lately that the clocks would not show another change."""
    now = look(file)
    return now if time.time_ns() - max(now[2:]) > CLOCKS_NS else None


class Unreadable(UserError):
    """A file that is not what its name says; `where`: its line, as far as one is known."""

    def __init__(self, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.where = where

    def __reduce__(self):
        return type(self), (str(self), self.where)


def read(
    file: Path,
    column: str | None = None,
    begin: int = 0,
    end: int | None = None,
    first: int = 1,
    on_broken: Broken = lambda what: None,
) -> Iterator[tuple[str, dict | None]]:
    """Records of one file with their places. Raises Unreadable for a file that cannot be read at all.

    column: the one that is wanted; a parquet file's others are not even decoded.
    begin, end: a part of the file: row groups of parquet, bytes of lines, of which those count that begin there.
    first: the number of the first line that begins in this part.
    on_broken: is told what comes as None, before it comes: the bytes of a line, an array's element, a parquet row.
    """
    with readable(file):
        if file.name.endswith(".parquet"):
            yield from read_parquet(file, column, begin, end, on_broken)
        elif file.name.endswith(".json"):
            yield from read_array(file, on_broken)
        else:
            yield from read_lines(file, begin, end, first, on_broken)


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise as one line with its name."""
    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise Unreadable(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def read_lines(
    file: Path,
    begin: int = 0,
    end: int | None = None,
    first: int = 1,
    on_broken: Broken = lambda what: None,
) -> Iterator[tuple[str, dict | None]]:
    has_record, broken = False, None
    with open_bytes(file) as stream:
        at = begin
        if begin:  # the line that began before belongs to the part before
            stream.seek(begin - 1)
            before = stream.readline()
            at += len(before) - 1
            first += len(before) > 1
        line = b""
        # Bytes are split at \n only: str.splitlines would also split at U+0085 and U+2028 inside a record.
        for number, line in enumerate(stream, first):
            if end is not None and at >= end:
                break
            if line.strip():
                record = parsed(line)
                if record is None:
                    broken = broken or line
                    on_broken(line)
                has_record = has_record or record is not None
                yield f"{file}:{number}", record
            at += len(line)
        if begin or has_record or broken is None:  # the first part of a file tells, for all of it
            return
        if all(parsed(line) is None for line in itertools.chain([line], stream)):
            raise Unreadable(
                f"{file}: no line of it is a JSON object; {what_instead(broken)}; mend the file or leave it out of "
                "data.files"
            )


def what_instead(line: bytes) -> str:
    """What a file is, as its first line shows, that is not lines of JSON in UTF-8."""
    if line.startswith(b"\x1f\x8b"):
        return "it is compressed: its name should end with .gz"
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is UTF-16, wanted is UTF-8"
    if b"\r" in line.rstrip():
        return "its lines end with \\r alone, wanted is \\n"
    return f"the first is {line[:60]!r}"


def parsed(line: bytes) -> dict | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of 5,000 digits, a thousand brackets
        return None
    return record if isinstance(record, dict) else None


def open_bytes(file: Path) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        import pyarrow

        # not zstandard, which takes a stream that breaks off for one that ends
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return open(file, "rb")


def read_array(file: Path, on_broken: Broken = lambda what: None) -> Iterator[tuple[str, dict | None]]:
    """A JSON array, or one object, or (as some name them) lines of JSON objects in a .json file."""
    with open(file, "rb") as stream:
        if has_lines(stream):
            yield from read_lines(file, on_broken=on_broken)
            return
        stream.seek(0)
        try:
            for number, record in enumerate(json_stream.values(stream), 1):
                if not isinstance(record, dict):
                    on_broken(record)
                yield f"{file}:{number}", record if isinstance(record, dict) else None
        except json.JSONDecodeError as error:
            raise Unreadable(
                f"{file}:{error.lineno}: not JSON ({error.msg}, column {error.colno}); mend the file or leave "
                "it out of data.files",
                f"{file}:{error.lineno}",
            ) from None
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"{file}: JSON that cannot be read ({error}); leave it out of data.files") from None


def has_lines(stream: BinaryIO) -> bool:
    """Whether the first line that is not blank is an object; an array on one line is not read for it."""
    while line := stream.readline(2**16):
        if line.strip():
            begins = line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
            return begins and parsed(line if line.endswith(b"\n") else line + stream.readline()) is not None
    return False


def read_parquet(
    file: Path,
    column: str | None = None,
    begin: int = 0,
    end: int | None = None,
    on_broken: Broken = lambda what: None,
) -> Iterator[tuple[str, dict | None]]:
    import pyarrow

    try:
        table = parquet_file(file)
        if column is not None and column not in table.schema_arrow.names:
            column = None
        groups = range(begin, table.num_row_groups if end is None else end)
        number = sum(table.metadata.row_group(group).num_rows for group in range(begin))
        columns = None if column is None else [column]
        for batch in table.iter_batches(batch_size=1000, row_groups=groups, columns=columns):
            for record in rows_of(batch, on_broken):
                number += 1
                yield f"{file}:{number}", record
    except pyarrow.ArrowInvalid as error:
        raise no_parquet(file, error) from None


def parquet_file(file: Path):
    """Opened: its metadata are read. Raises Unreadable."""
    import pyarrow
    import pyarrow.parquet

    with readable(file):
        try:
            return pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise no_parquet(file, error) from None


def no_parquet(file: Path, error: Exception) -> Unreadable:
    return Unreadable(f"{file} is not a readable parquet file: {' '.join(str(error).split())}")


def rows_of(batch, on_broken: Broken) -> Iterator[dict | None]:
    """The rows of a batch; None for one whose strings are not UTF-8, which parquet does not check."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            row = batch.slice(number, 1)
            try:
                yield from row.to_pylist()
            except UnicodeDecodeError:
                on_broken({name: as_read(row[name][0]) for name in row.schema.names})
                yield None


def as_read(value) -> object:
    """A pyarrow scalar in Python's types, strings that are not UTF-8 as their bytes."""
    import pyarrow

    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, pyarrow.StructScalar):
            return {name: as_read(inner) for name, inner in value.items()}
        if isinstance(value, (pyarrow.ListScalar, pyarrow.LargeListScalar)):
            return [as_read(inner) for inner in value.values]
        return value.as_buffer().to_pybytes()
