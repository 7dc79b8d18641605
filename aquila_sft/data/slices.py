"""The input cut into slices that are worked on apart, by what the input is and never by who works on it.

    {source: files} -> pieces of files -> Slice: neighbouring pieces of one source, together about slice_mb
    Slice -> documents, in the order of the input

jsonl is cut at bytes, parquet at row groups; what is compressed, a json array or a txt file is one piece. The slices in
their order are the input in its order, so that what is made of them does not depend on their size either.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aquila_sft import checkpoint
from aquila_sft.data import documents, sources
from aquila_sft.data.documents import Document, Refuse

KEPT = "slices.json"  # in a folder of work: a cut, and of what
READ = 2**20  # bytes in memory while lines are counted


@dataclass(frozen=True)
class Piece:
    """All of a file, or bytes begin … end of its lines, or row groups begin … end."""

    file: str
    begin: int = 0
    end: int | None = None
    first: int = 1  # the number of its first line


@dataclass(frozen=True)
class Slice:
    source: str
    pieces: tuple[Piece, ...]

    def documents(self, text_column: str, refuse: Refuse) -> Iterator[tuple[Document, str]]:
        for piece in self.pieces:
            yield from documents.of_file(
                self.source, Path(piece.file), text_column, refuse, piece.begin, piece.end, piece.first
            )


def cut(files: dict[str, list[Path]], slice_bytes: int) -> list[Slice]:
    slices = []
    for source, paths in files.items():
        pieces: list[Piece] = []
        size = 0
        for path in paths:
            for piece, piece_bytes in pieces_of(path, slice_bytes):
                if pieces and size + piece_bytes > slice_bytes:
                    slices.append(Slice(source, tuple(pieces)))
                    pieces, size = [], 0
                pieces.append(piece)
                size += piece_bytes
        slices.append(Slice(source, tuple(pieces)))
    return slices


def origin(files: dict[str, list[Path]], slice_bytes: int) -> dict:
    """What a cut follows from, before it is made; JSON."""
    looks = {name: [[str(path), sources.settled_look(path)] for path in paths] for name, paths in files.items()}
    return {"slice_bytes": slice_bytes, "files": looks}


def keep(folder: Path, origin: dict, cut: Sequence[Slice]) -> None:
    """For kept(): counting the lines of a terabyte takes its time."""
    checkpoint.write_text(folder / KEPT, json.dumps({"origin": origin, "slices": [asdict(part) for part in cut]}))


def kept(folder: Path, origin: dict) -> list[Slice] | None:
    """The cut that was kept there, if it is of files that look as these do; None where one could have changed."""
    file = folder / KEPT
    if not file.is_file() or any(look is None for paths in origin["files"].values() for _, look in paths):
        return None
    try:
        known = json.loads(file.read_text("utf-8"))
    except ValueError:  # damaged: it is made again
        return None
    if known["origin"] != origin:
        return None
    return [Slice(part["source"], tuple(Piece(**piece) for piece in part["pieces"])) for part in known["slices"]]


def pieces_of(path: Path, size: int) -> Iterator[tuple[Piece, int]]:
    """Pieces of about `size` bytes where the kind of file allows, and how large each is."""
    whole = path.stat().st_size
    if path.suffix == ".jsonl":
        yield from lines(path, whole, size)
    elif path.suffix == ".parquet":
        yield from row_groups(path, size)
    else:
        yield Piece(str(path)), whole


def lines(path: Path, whole: int, size: int) -> Iterator[tuple[Piece, int]]:
    """A piece has the lines that begin in it, as sources.read gives them."""
    with open(path, "rb") as stream:
        first = 1
        for begin in range(0, max(whole, 1), size):
            end = begin + size
            yield Piece(str(path), begin, end if end < whole else None, first), min(whole, end) - begin
            # A newline at its last byte ends a line of this piece, and the next piece's first line begins there.
            for at in range(begin, min(end, whole), READ):
                first += stream.read(min(READ, min(end, whole) - at)).count(b"\n")


def row_groups(path: Path, size: int) -> Iterator[tuple[Piece, int]]:
    try:
        about = sources.parquet_file(path).metadata
    except sources.Unreadable:  # told when it is read
        yield Piece(str(path)), path.stat().st_size
        return
    begin, held = 0, 0
    for group in range(about.num_row_groups):
        held += about.row_group(group).total_byte_size
        if held >= size or group == about.num_row_groups - 1:
            yield Piece(str(path), begin, group + 1), held
            begin, held = group + 1, 0
