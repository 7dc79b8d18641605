"""Documents become shards on disk.

    documents -> batches -> ids, on all cores, while the next ones are read -> train/ and held-back/<source>.<language>/

Documents are streamed: what is in memory is a few batches, and the hashes of those that fell to the held-back share.
The same documents in the same order give the same bytes. Nothing leaves without a line in the ledger.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from aquila_sft.chat_template import IM_END, IM_START
from aquila_sft.config import ShardPolicy
from aquila_sft.data import chat_documents
from aquila_sft.data.documents import Document, DocumentLedger
from aquila_sft.data.shards import PartWriter
from aquila_sft.errors import UserError

FORMAT = 1  # raise it when a change here changes the shards
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 4096  # what is tokenized in one call
PIECE_CHARACTERS = 2**19  # longer documents are tokenized in pieces: an Encoding takes about 100 bytes a token

Placed = tuple[Document, str]  # a document, and "file:line"


class Encoder:
    """Texts to ids, BOS in front and EOS behind where the tokenizer has them.

    A special string inside a text is encoded as the ordinary text it is, so that no document can end itself. The
    tokenizer is not changed; the work is done by a copy of its backend.
    """

    def __init__(self, tokenizer) -> None:
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["post_processor"] = state["truncation"] = state["padding"] = None
        specials = {"<|im_start|>", "<|im_end|>", *tokenizer.all_special_tokens}
        for token in state["added_tokens"]:
            # Only tokens marked special can be switched off; blanks that are added tokens stay what they are.
            token["special"] = token["special"] or token["content"] in specials
        self.backend = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
        self.backend.encode_special_tokens = True
        self.bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.unknown = tokenizer.unk_token_id
        chat_ids = [tokenizer.get_added_vocab().get(text) for text in (IM_START, IM_END)]
        self.chat_ids = None if None in chat_ids else chat_ids
        special_ids = {token["id"] for token in state["added_tokens"] if token["special"]} - {self.unknown}
        if special_ids & set(self.ids_of(["".join(f" {text}{text}\n" for text in sorted(specials))])[0].tolist()):
            raise UserError("this tokenizer cannot encode its special tokens as text; use a byte-level one")
        self.cuts_freely = self.encodes_pieces_alike()

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """int32 [tokens] for each text; empty for one that the vocabulary cannot spell."""
        pieces = [self.pieces(text) for text in texts]
        encoded = iter(self.ids_of([piece for parts in pieces for piece in parts if isinstance(piece, str)]))
        return [
            self.wrapped([next(encoded) if isinstance(piece, str) else np.array([piece], np.int32) for piece in parts])
            for parts in pieces
        ]

    def pieces(self, text: str) -> list[str | int]:
        """Texts that can be encoded by themselves, and between them the ids of a conversation's marks."""
        runs = [text]
        if chat_documents.OPEN in text:
            ids = chat_documents.marks(self.chat_ids)
            runs = [ids.get(run, run) for run in chat_documents.MARK.split(text) if run]
        return [piece for run in runs for piece in (cut(run) if self.cuts_freely and isinstance(run, str) else [run])]

    def ids_of(self, texts: list[str]) -> list[np.ndarray]:
        """int32 [tokens] for each text, of a few batches' characters at a time, so that a long one stays bounded."""
        sizes = itertools.accumulate(map(len, texts))
        groups = itertools.groupby(zip(sizes, texts, strict=True), key=lambda item: item[0] // (2 * BATCH_CHARACTERS))
        return [
            np.array(encoding.ids, dtype=np.int32)
            for _, group in groups
            for encoding in self.backend.encode_batch_fast([text for _, text in group], add_special_tokens=False)
        ]

    def wrapped(self, ids: list[np.ndarray]) -> np.ndarray:
        if self.unknown is not None and any((part == self.unknown).any() for part in ids):
            return np.empty(0, dtype=np.int32)
        return np.concatenate([np.array(self.bos, np.int32), *ids, np.array(self.eos, np.int32)])

    def encodes_pieces_alike(self) -> bool:
        """Whether a text cut where cut() cuts has the ids of the whole, as with the published split regex."""
        ends, begins = ("a\n", "。\n\n", ") \r\n", "  \n \n"), ("The", "中", "1", "ſ")
        pairs = [(end, begin) for end in ends for begin in begins]
        whole = self.ids_of([a + b for a, b in pairs])
        first, second = self.ids_of([a for a, _ in pairs]), self.ids_of([b for _, b in pairs])
        return all(w.tolist() == a.tolist() + b.tolist() for w, a, b in zip(whole, first, second, strict=True))


def cut(text: str) -> list[str]:
    """A long text in pieces that begin with a letter or digit behind a line's end."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS and (end := LINE_START.search(text, start + PIECE_CHARACTERS)):
        pieces.append(text[start : end.end()])
        start = end.end()
    return [*pieces, text[start:]]


LINE_START = re.compile(r"\n(?=[^\W_])")


class HoldBack:
    """Which documents are kept from training: by the hash of their content, so the order of files hardly matters.

    The first document of a part is never held back, nor more than `holdout_max_bytes` of a part. What is held back
    in one part is trained on in none: a copy is left out. Memory: the hashes of the documents below the threshold.
    """

    def __init__(self, policy: ShardPolicy) -> None:
        self.threshold = int(policy.holdout_fraction * 2**64)
        self.max_bytes = policy.holdout_max_bytes
        self.bytes: collections.Counter = collections.Counter()
        self.held: set[int] = set()
        self.trained: set[int] = set()  # those below the threshold
        self.begun: set[str] = set()

    def folder(self, part: str, text: bytes) -> str | None:
        """train or held-back; None for a copy of what is held back."""
        number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        if number < self.threshold:
            if number in self.held:
                return None
            has_room = self.bytes[part] + len(text) <= self.max_bytes
            if part in self.begun and has_room and number not in self.trained:
                self.held.add(number)
                self.bytes[part] += len(text)
                return "held-back"
            self.trained.add(number)
        self.begun.add(part)
        return "train"


def write(
    found: Iterable[Placed],
    folder: Path,
    encoder: Encoder,
    policy: ShardPolicy,
    ledger: DocumentLedger,
    *,
    vocab_size: int,
    tokenizer_sha256: str,
) -> dict[str, dict[str, dict]]:
    """{"train": {"wiki.zh": figures}, "held-back": {…}}; figures name the shards, relative to `folder`.

    Texts are brought into NFC, as the published vocabulary has them; sizes in bytes are those of NFC.
    """
    about = {"vocab_size": vocab_size, "tokenizer_sha256": tokenizer_sha256}
    hold_back = HoldBack(policy)
    with contextlib.ExitStack() as stack:
        writers: dict[tuple[str, str], PartWriter] = {}
        for document, where, ids in tokenized(found, encoder):
            content = document.text.encode()
            part = f"{document.source}.{document.language}"
            if not len(ids):
                ledger.refuse("text that the vocabulary cannot spell", document.language, document.source, where)
                continue
            use = hold_back.folder(part, content)
            if use is None:
                ledger.refuse("copy of a held-back document", document.language, document.source, where)
                continue
            if (use, part) not in writers:
                writers[use, part] = stack.enter_context(
                    PartWriter(
                        folder / use / part,
                        shard_tokens=policy.shard_tokens,
                        source=document.source,
                        language=document.language,
                        **about,
                    )
                )
            writers[use, part].add(ids, len(content))
            ledger.add(document, len(ids), len(content), use == "held-back")
    parts: dict[str, dict[str, dict]] = {"train": {}, "held-back": {}}
    for (use, part), writer in sorted(writers.items()):
        parts[use][part] = figures(writer, folder)
    return parts


def figures(writer: PartWriter, folder: Path) -> dict:
    return {
        "source": writer.about["source"],
        "language": writer.about["language"],
        "documents": writer.documents,
        "tokens": writer.tokens,
        "text_bytes": writer.text_bytes,
        "bytes_per_token": round(writer.text_bytes / writer.tokens, 4),
        "shards": len(writer.paths),
        "files": [path.relative_to(folder).as_posix() for path in writer.paths],
    }


def tokenized(
    found: Iterable[Placed], encode: Callable[[list[str]], list[np.ndarray]]
) -> Iterator[tuple[Document, str, np.ndarray]]:
    """Documents in their order with their ids; while one batch is tokenized the next is read."""
    with ThreadPoolExecutor(1) as pool:
        waiting: collections.deque[tuple[list[Placed], Future]] = collections.deque()

        def oldest() -> Iterator[tuple[Document, str, np.ndarray]]:
            batch, encoded = waiting.popleft()
            for (document, where), ids in zip(batch, encoded.result(), strict=True):
                yield document, where, ids

        for batch in batches(found):
            waiting.append((batch, pool.submit(encode, [document.text for document, _ in batch])))
            if len(waiting) > 2:
                yield from oldest()
        while waiting:
            yield from oldest()


def batches(found: Iterable[Placed]) -> Iterator[list[Placed]]:
    """Of about as many characters each. Texts come out in NFC."""
    batch: list[Placed] = []
    characters = 0
    for document, where in found:
        text = unicodedata.normalize("NFC", document.text)
        batch.append((Document(text, document.language, document.source), where))
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
