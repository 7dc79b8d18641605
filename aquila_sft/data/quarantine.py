"""What was left out of a set, to be looked at and to be taken back.

    record, reason, place -> Writer -> quarantine.jsonl.zst -> read -> the same

A line is {"reason", "where", "language", "source", "record"}; the record of a line that is no JSON object is its text.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from aquila_sft.data import sources
from aquila_sft.data.hygiene import Verdict

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
        self.stream.write(json.dumps(about | {"record": record}, default=str).encode() + b"\n")


def read(file: Path, reason: str | None = None) -> Iterator[dict]:
    """All lines, or those whose reason begins so."""
    for _, line in sources.read(file):
        if line is not None and (reason is None or line["reason"].startswith(reason)):
            yield line
