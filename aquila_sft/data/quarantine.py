"""What was left out of a set, to be looked at and to be taken back.

    record, reason, place -> Writer -> quarantine.jsonl.zst -> read -> the same

A line is {"reason", "where", "language", "source", "record"}; the record of a line that is no JSON object is its text.
What was read can be read back: bytes that are no UTF-8 stand in a text as surrogateescape has them, so that
`text.encode("utf-8", "surrogateescape")` are the bytes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from aquila_sft.data import sources
from aquila_sft.data.hygiene import Verdict
from aquila_sft.errors import UserError

FILE = "quarantine.jsonl.zst"


class Writer:
    def __init__(self, file: Path) -> None:
        import pyarrow

        self.stream = pyarrow.output_stream(str(file), compression="zstd")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.stream.close()

    def add(self, reason: str, where: str, verdict: Verdict, record: object) -> None:
        about = {"reason": reason, "where": where, "language": verdict.language, "source": verdict.source}
        # ASCII: a record may hold half of a surrogate pair, which no UTF-8 can
        self.stream.write(json.dumps(about | {"record": record}, default=text_of).encode() + b"\n")


def text_of(value: object) -> str:
    """Of bytes, and of what else JSON has no type for, such as dates."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


PLACE = re.compile(rb'\{"reason": "(?:[^"\\]|\\.)*", "where": ("(?:[^"\\]|\\.)*")')


def places(file: Path) -> Iterator[str]:
    """Where each record stood, in the order of the input; the records themselves are not looked at."""
    with sources.readable(file), sources.open_bytes(file) as stream:
        for line in stream:
            yield json.loads(PLACE.match(line)[1])


def read(file: Path, reason: str | None = None) -> Iterator[dict]:
    """All lines, or those whose reason begins so. Raises UserError for a file of anything else."""
    for where, line in sources.read(file):
        if line is None or not isinstance(line.get("reason"), str) or not {"where", "record"} <= line.keys():
            raise UserError(f"{where}: no line of a quarantine, which has reason, where and record")
        if reason is None or line["reason"].startswith(reason):
            yield line
