"""What a model has already answered, one JSON object a line, so that an evaluation goes on after any end.

A file for each process and each model: journal/<digest of model, vocabulary and arithmetic>-<rank>.jsonl. All processes
read all files, so another number of processes may go on. A line that a kill cut off is not read.
"""

import hashlib
import json
from pathlib import Path

from aquila_sft import runtime


class Journal:
    def __init__(self, folder: Path, digest: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, float | str] = {}
        for file in sorted(folder.glob(f"{digest[:16]}-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                self.answers[key] = value
        runtime.wait_for_all()  # who read later would know answers of this time, and share out others than the rest
        self.file = folder / f"{digest[:16]}-{runtime.rank()}.jsonl"
        if self.file.is_file() and not self.file.read_bytes().endswith(b"\n"):
            with open(self.file, "a", encoding="utf-8") as file:
                file.write("\n")  # ends the line that was cut off

    @staticmethod
    def key(kind: str, *content: object) -> str:
        return hashlib.sha256(json.dumps([kind, *content], ensure_ascii=False).encode()).hexdigest()[:24]

    def add(self, answers: dict[str, float | str]) -> None:
        """Remember, in the file before anything is reported."""
        self.answers |= answers
        with open(self.file, "a", encoding="utf-8") as file:
            file.writelines(json.dumps([key, value], ensure_ascii=False) + "\n" for key, value in answers.items())
