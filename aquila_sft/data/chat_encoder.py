"""Conversations to ids and targets in another process: a tokenizer's backend in a file, without transformers."""

import dataclasses
import functools
from pathlib import Path

from aquila_sft import chat_template, checkpoint
from aquila_sft.data.hygiene import Messages


@dataclasses.dataclass
class Encoder:
    """Encodes with `tokenizer` here; what is pickled is the file's name, and who unpickles it reads the file."""

    tokenizer: object
    system: str | None
    file: Path

    def __call__(self, conversations: list[Messages]) -> list[tuple[list[int], list[bool]]]:
        return chat_template.encode_batch(self.tokenizer, conversations, default_system=self.system)

    def __reduce__(self):
        if not self.file.exists():
            checkpoint.write_text(self.file, self.tokenizer.backend_tokenizer.to_str())
        return of_file, (self.system, self.file)


def of_file(system: str | None, file: Path) -> Encoder:
    return Encoder(backend_of(file), system, file)


@functools.lru_cache(maxsize=1)
def backend_of(file: Path) -> "Backend":
    return Backend(file)


class Backend:
    """As much of a tokenizer as chat_template asks for."""

    is_fast = True

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_file(str(file))

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)
