"""Files of text, one document at a time, by source.

    data.files, or the bundled world -> find -> {"wiki": [a.jsonl, b.parquet], "books": [c.txt]}
    files -> read -> Document(text, language, source), "file:line"

parquet (of which only the text column is read), jsonl (.gz, .zst), json: a record is a document; one that holds a
conversation instead of a text is rendered as the chat template does (chat_documents.py). txt (.gz, .zst): a
file is a document, unless it is larger than 1 MiB: then it is cut at blank lines into documents of about 64 KiB, so
that a book or a whole corpus in one file is never in memory at once.
"""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aquila_sft.config.data import TextData
from aquila_sft.data import chat_documents, conversations, sources
from aquila_sft.data.ledger import Ledger
from aquila_sft.errors import UserError

TXT = (".txt", ".txt.gz", ".txt.zst")
WHOLE_TXT = 2**20  # bytes: a txt file up to this is one document
CUT_TXT = 2**16  # bytes after which a larger one is cut at the next blank line
COLUMN_WITHIN = 10_000  # records: a file whose first so many all lack the text column stops the run

Refuse = Callable[[str, str, str, str], None]  # reason, language, source, where


@dataclass(frozen=True)
class Document:
    text: str
    language: str  # zh, en or other, by script
    source: str


class DocumentLedger(Ledger):
    """What was read, kept, held back and left out of a set of documents, by language, source and reason."""

    unit = "documents"

    def refuse(self, reason: str, language: str, source: str, where: str, text_bytes: int = 0) -> None:
        super().refuse(reason, language, source, where, text_bytes=text_bytes)

    def add(self, shard: dict, *, held_back: bool) -> None:
        """The documents of a shard, as text_set.plan describes it."""
        for counter in (self.languages[shard["language"]], self.sources[shard["source"]]):
            counter["held_back" if held_back else "kept"] += shard["documents"]
            counter["tokens"] += shard["tokens"]
            counter["text_bytes"] += shard["text_bytes"]

    def as_dict(self) -> dict:
        report = super().as_dict() | {"text_bytes": self.total("text_bytes")}
        of_conversations = ("shortened", "answer_tokens", "answer_tokens_cut", "answer_tokens_left_out")
        of_conversations += ("mended", "kept_by_source")
        return {key: value for key, value in report.items() if key not in of_conversations}


def find(data: TextData, world_folder: Path, *, for_vocabulary: bool = False) -> dict[str, list[Path]]:
    """The files of every source. The bundled world is written to `world_folder` first; a vocabulary for it also has to
    spell what is asked and answered, which no document holds.

    Raises UserError when there are none, or when a pattern names no file.
    """
    if data.files is not None:
        return {name: sources.find(patterns, sources.SUFFIXES + TXT) for name, patterns in data.files.items()}
    if data.bundled == "world":
        from aquila_sft.data import world

        written = world.write(world_folder)
        found = {"world": [written["documents"]], "world_notes": [written["notes"]]}
        return found | {"world_talk": [written["talk"]]} if for_vocabulary else found
    raise UserError(
        "data.files is not set, and this scale brings no text of its own: give data.files=<file, glob or list>, or "
        "data.files={wiki_zh: zh/*.jsonl, wiki_en: en.parquet} for several sources (parquet, jsonl, json, txt), or "
        "scale=mini for the bundled world"
    )


def read(files: dict[str, list[Path]], text_column: str, refuse: Refuse) -> Iterator[tuple[Document, str]]:
    """Documents and where they stood. What is none goes to `refuse`: one bad line never ends a run.

    Raises UserError for a file that cannot be read at all, and for one in which no record has the text column.
    """
    for source, paths in files.items():
        for path in paths:
            yield from of_file(source, path, text_column, refuse)


def of_file(
    source: str, path: Path, text_column: str, refuse: Refuse, begin: int = 0, end: int | None = None, first: int = 1
) -> Iterator[tuple[Document, str]]:
    """The documents of a file, or of a part of it, see sources.read."""
    for where, text, problem in texts_of(path, text_column, begin, end, first):
        if problem is None and not (problem := problem_of(text)):
            yield Document(text, conversations.language(text), source), where
        else:
            known = isinstance(text, str)
            refuse(problem, conversations.language(text) if known else "unknown", source, where)


def problem_of(text: str) -> str | None:
    if not text.strip():
        return "empty text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "text that is not valid Unicode"
    return None


def texts_of(
    path: Path, text_column: str, begin: int = 0, end: int | None = None, first: int = 1
) -> Iterator[tuple[str, str | None, str | None]]:
    """(where, text, None), or (where, None or text, why it is no document)."""
    if path.name.endswith(TXT):
        for where, content in txt_pieces(path):
            try:
                yield where, chat_documents.plain(content.decode("utf-8-sig").strip("\r\n")), None
            except UnicodeDecodeError:
                yield where, None, "text that is not UTF-8"
        return
    has_column, columns, objects = begin > 0, collections.Counter(), 0  # the first part of a file tells
    for where, record in sources.read(path, text_column, begin, end, first):
        if record is None:
            yield where, None, "not a JSON object"
        elif text_column in record:
            has_column = True
            text = record[text_column]
            is_text = isinstance(text, str)
            yield (
                where,
                chat_documents.plain(text) if is_text else text,
                None if is_text else "text that is not a string",
            )
        elif chat_documents.is_conversation(record):
            has_column = True
            try:
                yield where, chat_documents.rendered(record), None
            except conversations.Refused as refused:
                yield where, None, refused.args[0]
        else:
            if not has_column:
                objects += 1
                if len(columns) < 100:
                    columns.update(record.keys())
                if objects == COLUMN_WITHIN:
                    break
            yield where, None, "no text column"
    if not has_column and objects:
        names = ", ".join(name for name, _ in columns.most_common(10))
        raise UserError(
            f"data.text_column={text_column}: {path} has no such column; it has: {names or 'none at all'}"
            + (f"; use data.text_column={next(iter(columns))}" if len(columns) == 1 else "")
        )


def txt_pieces(path: Path) -> Iterator[tuple[str, bytes]]:
    """The bytes of a txt file, whole or cut at blank lines, with the number of their first line."""
    with sources.readable(path):
        with sources.open_bytes(path) as stream:
            beginning = stream.read(WHOLE_TXT + 1)
        if len(beginning) <= WHOLE_TXT:
            yield f"{path}:1", beginning
            return
        with sources.open_bytes(path) as stream:
            piece, first, number = bytearray(), 1, 1
            while line := stream.readline(CUT_TXT):
                if len(piece) >= WHOLE_TXT or (len(piece) >= CUT_TXT and not line.strip()):
                    end = whole_characters(piece)
                    yield f"{path}:{first}", bytes(piece[:end])
                    piece, first = piece[end:], number
                piece += line
                number += line.endswith(b"\n")
            if piece.strip():
                yield f"{path}:{first}", bytes(piece)


def whole_characters(piece: bytearray) -> int:
    """The length of a piece without a UTF-8 character whose last bytes are still to come."""
    for back in range(1, 4):
        if piece[-back] >= 0xC0:
            needed = 2 if piece[-back] < 0xE0 else 3 if piece[-back] < 0xF0 else 4
            return len(piece) - (back if needed > back else 0)
        if piece[-back] < 0x80:
            break
    return len(piece)
