"""Documents become ids, and ids become shards.

    documents -> batches -> ids, while the next ones are read -> IdsWriter: <source>.<language>.ids and .npy of a slice
    the .npy of all slices -> plan: which documents are held back, where every shard begins and ends
    a shard's place in the plan -> write_shard

In memory is a batch of documents, or the sizes of one slice's. The same documents in the same order give the same
bytes.
"""

import collections
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from aquila_sft.chat_template import IM_END, IM_START
from aquila_sft.config.data import PreparePolicy
from aquila_sft.data import chat_documents
from aquila_sft.data.documents import Document
from aquila_sft.data.shards import ShardWriter, token_dtype
from aquila_sft.errors import UserError

FORMAT = 2  # raise it when a change of the code, here or in what steps.py calls, changes the shards
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 4096  # what is tokenized in one call
PIECE_CHARACTERS = 2**19  # longer documents are tokenized in pieces: an Encoding takes about 100 bytes a token

Placed = tuple[Document, str]  # a document, and "file:line"
# What is known of a document beside its ids; number: the first 64 bits of its text's sha256.
DOCUMENT = np.dtype([("tokens", "<u4"), ("text_bytes", "<u8"), ("number", "<u8")])


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
        self.open(Tokenizer.from_str(json.dumps(state, ensure_ascii=False)))
        self.bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.unknown = tokenizer.unk_token_id
        chat_ids = [tokenizer.get_added_vocab().get(text) for text in (IM_START, IM_END)]
        self.chat_ids = None if None in chat_ids else chat_ids
        special_ids = {token["id"] for token in state["added_tokens"] if token["special"]} - {self.unknown}
        if special_ids & set(self.ids_of(["".join(f" {text}{text}\n" for text in sorted(specials))])[0].tolist()):
            raise UserError("this tokenizer cannot encode its special tokens as text; use a byte-level one")
        self.cuts_freely = self.encodes_pieces_alike()

    def open(self, backend) -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True

    def save(self, path: Path) -> None:
        """For load(), which needs no transformers: a worker starts in a second."""
        about = {name: value for name, value in vars(self).items() if name != "backend"}
        path.write_text(json.dumps(about | {"backend": self.backend.to_str()}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Encoder":
        from tokenizers import Tokenizer

        encoder = cls.__new__(cls)
        about = json.loads(path.read_text("utf-8"))
        encoder.open(Tokenizer.from_str(about.pop("backend")))
        vars(encoder).update(about)
        return encoder

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


class IdsWriter:
    """The ids of a slice's documents: for each source and language one file of ids and one of DOCUMENT records."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder, self.dtype = folder, token_dtype(vocab_size)
        self.files: dict[str, tuple] = {}

    def __enter__(self) -> "IdsWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for part, (file, records) in self.files.items():
            file.close()
            if kind is None:
                np.save(self.folder / f"{part}.npy", np.array(records, dtype=DOCUMENT))

    def add(self, part: str, ids: np.ndarray, text_bytes: int, number: int) -> None:
        if part not in self.files:
            self.files[part] = (open(self.folder / f"{part}.ids", "wb"), [])
        file, records = self.files[part]
        file.write(ids.astype(self.dtype).tobytes())
        records.append((len(ids), text_bytes, number))


def plan(slices: list[Path], policy: PreparePolicy) -> dict[str, dict]:
    """{"train/wiki.zh/00000.shard": {source, language, documents, tokens, text_bytes, spans}, "held-back/…": …}.

    spans: [slice, first document, document behind the last] of that part.
    """
    parts: dict[str, PartPlan] = {}
    for number, folder in enumerate(slices):
        for path in sorted(folder.glob("*.npy")):
            part = parts.setdefault(path.stem, PartPlan(path.stem, policy))
            part.add(number, np.load(path))
    return dict(sorted((name, shard) for part in parts.values() for name, shard in part.shards.items()))


class PartPlan:
    """One source and language, slice by slice.

    A shard is closed at the first document end after shard_tokens. Held back are documents by the hash of their
    content, so the order of files hardly matters; never the first of a part, and no more than holdout_max_bytes.
    """

    def __init__(self, name: str, policy: PreparePolicy) -> None:
        self.name, self.shard_tokens = name, policy.shard_tokens
        self.threshold, self.room = int(policy.holdout_fraction * 2**64), policy.holdout_max_bytes
        self.shards: dict[str, dict] = {}
        self.open: dict[str, dict] = {}  # use -> the shard that is being filled
        self.count: collections.Counter = collections.Counter()  # of shards, by use

    def add(self, number: int, documents: np.ndarray) -> None:
        held = self.held_back(documents)
        for use, chosen in (("train", ~held), ("held-back", held)):
            for begin, end in runs(chosen):
                sizes = np.cumsum(documents["tokens"][begin:end], dtype=np.int64)
                done = 0  # documents of the run
                while done < end - begin:
                    shard = self.open.get(use) or self.new(use)
                    before = int(sizes[done - 1]) if done else 0
                    last = int(np.searchsorted(sizes, before + self.shard_tokens - shard["tokens"]))
                    stop = min(last + 1, end - begin)
                    shard["documents"] += stop - done
                    shard["tokens"] += int(sizes[stop - 1]) - before
                    shard["text_bytes"] += int(documents["text_bytes"][begin + done : begin + stop].sum())
                    shard["spans"].append([number, begin + done, begin + stop])
                    if shard["tokens"] >= self.shard_tokens:
                        del self.open[use]
                    done = stop

    def held_back(self, documents: np.ndarray) -> np.ndarray:
        held = np.zeros(len(documents), dtype=bool)
        if self.threshold:
            for i in np.flatnonzero(documents["number"] < self.threshold).tolist():
                size = int(documents["text_bytes"][i])
                is_first = i == 0 and not self.shards
                if size <= self.room and not is_first:
                    held[i] = True
                    self.room -= size
        return held

    def new(self, use: str) -> dict:
        source, _, language = self.name.rpartition(".")
        shard = {"source": source, "language": language, "documents": 0, "tokens": 0, "text_bytes": 0, "spans": []}
        self.open[use] = self.shards[f"{use}/{self.name}/{self.count[use]:05d}.shard"] = shard
        self.count[use] += 1
        return shard


def runs(chosen: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def write_shard(path: Path, slices: list[Path], shard: dict, *, vocab_size: int, tokenizer_sha256: str) -> None:
    """One shard of a plan."""
    part = f"{shard['source']}.{shard['language']}"
    about = {"source": shard["source"], "language": shard["language"], "tokenizer_sha256": tokenizer_sha256}
    dtype, opened = token_dtype(vocab_size), -1
    with ShardWriter(path, vocab_size=vocab_size, **about) as writer:
        for number, begin, end in shard["spans"]:
            if number != opened:
                documents, opened = np.load(slices[number] / f"{part}.npy"), number
                ends = np.cumsum(documents["tokens"], dtype=np.int64)
                starts = ends - documents["tokens"]
                file = slices[number] / f"{part}.ids"
            for i in range(begin, end):
                count, offset = int(documents["tokens"][i]), int(starts[i]) * dtype.itemsize
                writer.add(np.fromfile(file, dtype, count, offset=offset), int(documents["text_bytes"][i]))


def figures(planned: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """{"train": {"wiki.zh": figures and files}, "held-back": {…}} of a plan, for the manifest."""
    parts: dict[str, dict[str, dict]] = {"train": {}, "held-back": {}}
    for name, shard in planned.items():
        use, part, _ = name.split("/")
        about = parts[use].setdefault(
            part,
            {"source": shard["source"], "language": shard["language"]}
            | {"documents": 0, "tokens": 0, "text_bytes": 0, "bytes_per_token": 0.0, "shards": 0, "files": []},
        )
        for key in ("documents", "tokens", "text_bytes"):
            about[key] += shard[key]
        about["bytes_per_token"] = round(about["text_bytes"] / about["tokens"], 4)
        about["shards"] += 1
        about["files"].append(name)
    return parts


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
    """Of about as many characters each."""
    batch: list[Placed] = []
    characters = 0
    for document, where in found:
        batch.append((document, where))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
