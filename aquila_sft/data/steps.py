"""How text becomes shards: steps, each of them tasks that know nothing of each other and of who runs them.

    index     benchmark items -> their n-grams                                                     one task
    read      slice of files -> clean documents, free of benchmark items; their keys, signatures   a task a slice
    match     range of keys of a band, of all slices -> documents with an earlier one like them    a task a range
    copies    what all ranges found, of one group of slices                                        a task a group
    tokenize  slice -> ids of the documents that stay, by source and language                      a task a slice
    plan      sizes of them all -> what is held back, where which shard begins and ends            one task
    shards    ids of one shard, of all slices -> train/ or held-back/<source>.<language>/00000.shard

A task reads what earlier steps left, and leaves one file or folder: written under another name, flushed, renamed. It
is there and whole or it is not there, whatever was killed; who comes again makes what is missing. What it holds
follows from the input alone: the same bytes from one worker or a thousand. Memory is that of one slice, or of one
range of keys.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aquila_sft.config.data import PreparePolicy
from aquila_sft.data import clean, conversations, duplicates, text_set
from aquila_sft.data.documents import Document, DocumentLedger
from aquila_sft.data.index_step import INDEX, index_of
from aquila_sft.data.slices import Slice
from aquila_sft.data.tasks import Step, of_slices, slice_tasks, write_json
from aquila_sft.data.units import unit_hashes

READ_CHARACTERS, READ_DOCUMENTS = 2**22, 4096  # that are in memory at once


@dataclass(frozen=True)
class Work:
    """What every task is given: where it works, on what, and how."""

    folder: Path
    slices: tuple[Slice, ...]
    policy: PreparePolicy
    text_column: str
    encoder: Path  # text_set.Encoder.save
    tokenizer_sha256: str
    vocab_size: int

    settings = "prepare"
    is_durable = True

    @property
    def steps(self) -> tuple[Step, ...]:
        return STEPS


# ---- read


def make_read(work: Work, task: str, folder: Path) -> None:
    """documents.parquet, keys.npy, rows.npy, signatures.bin, ledger.json of one slice."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    ledger, index = DocumentLedger(), index_of(work)

    def refuse(reason: str, language: str, source: str, where: str) -> None:
        ledger.read += 1
        ledger.refuse(reason, language, source, where)

    keys = duplicates.KeyWriter(folder, near=work.policy.near_duplicates is not None)
    schema = pyarrow.schema([("text", "large_string"), ("language", "string"), ("where", "string")])
    batch: list[tuple[str, str, str]] = []
    units: list[np.ndarray] = []
    characters = 0
    with pyarrow.parquet.ParquetWriter(folder / "documents.parquet", schema, compression="zstd") as writer:

        def put() -> None:
            texts, languages, places = zip(*batch, strict=True)
            keys.add(list(texts), units)
            writer.write_batch(pyarrow.record_batch([list(texts), list(languages), list(places)], schema=schema))
            batch.clear()
            units.clear()

        for document, where in work.slices[int(task)].documents(work.text_column, refuse):
            ledger.read += 1
            text = clean.normal(document.text)
            language = document.language if text == document.text else conversations.language(text)
            of = unit_hashes(text) if index or keys.near else None
            problem = clean.problem(text, work.policy.clean)
            if problem is None and index and (benchmark := index(of)):
                problem = f"item of {benchmark}"
            if problem:
                ledger.refuse(problem, language, document.source, where, len(text.encode()))
                continue
            batch.append((text, language, where))
            units.append(of)
            characters += len(text)
            if characters >= READ_CHARACTERS or len(batch) >= READ_DOCUMENTS:
                put()
                characters = 0
        if batch:
            put()
    keys.finish()
    write_json(folder / "ledger.json", ledger.state())


# ---- match


def match_tasks(work: Work) -> list[str]:
    return duplicates.tasks(of_slices(work, "read"), near=work.policy.near_duplicates is not None)


def make_match(work: Work, task: str, target: Path) -> None:
    duplicates.make(of_slices(work, "read"), task, work.policy.near_duplicates, target)


# ---- copies


def copies_tasks(work: Work) -> list[str]:
    return duplicates.group_tasks(len(work.slices))


def make_copies(work: Work, task: str, target: Path) -> None:
    duplicates.gather(work.folder / "match", task, target)


# ---- tokenize


def make_tokenize(work: Work, task: str, folder: Path) -> None:
    """<part>.ids, <part>.npy (text_set.DOCUMENT) and ledger.json of one slice."""
    import pyarrow.parquet

    folder.mkdir()
    ledger = DocumentLedger()
    source = work.slices[int(task)].source
    file = pyarrow.parquet.ParquetFile(work.folder / "read" / task / "documents.parquet")
    equal, like = duplicates.copies(work.folder / "copies", int(task), file.metadata.num_rows)

    def staying():
        row = 0
        for group in file.iter_batches(batch_size=READ_DOCUMENTS):
            for record in group.to_pylist():
                reason = "copy of an earlier document" if equal[row] else "nearly a copy of an earlier document"
                if equal[row] or like[row]:
                    size = len(record["text"].encode())
                    ledger.refuse(reason, record["language"], source, record["where"], size)
                else:
                    yield Document(record["text"], record["language"], source), record["where"]
                row += 1

    with text_set.IdsWriter(folder, work.vocab_size) as writer:
        for document, where, ids in text_set.tokenized(staying(), encoder_of(work)):
            content = document.text.encode()
            if not len(ids):
                reason = "text that the vocabulary cannot spell"
                ledger.refuse(reason, document.language, source, where, len(content))
                continue
            number = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
            writer.add(f"{source}.{document.language}", ids, len(content), number)
    write_json(folder / "ledger.json", ledger.state())


encoders: dict[Path, text_set.Encoder] = {}  # one a process: making it takes a second with a large vocabulary


def encoder_of(work: Work) -> text_set.Encoder:
    if work.encoder not in encoders:
        encoders[work.encoder] = text_set.Encoder.load(work.encoder)
    return encoders[work.encoder]


# ---- plan, shards


def plan_tasks(work: Work) -> list[str]:
    return ["plan.json"]


def make_plan(work: Work, task: str, target: Path) -> None:
    write_json(target, text_set.plan(of_slices(work, "tokenize"), work.policy))


def plan_of(work: Work) -> dict:
    return json.loads((work.folder / "plan/plan.json").read_text("utf-8"))


def shard_tasks(work: Work) -> list[str]:
    return list(plan_of(work))


def make_shard(work: Work, task: str, target: Path) -> None:
    about = {"vocab_size": work.vocab_size, "tokenizer_sha256": work.tokenizer_sha256}
    text_set.write_shard(target, of_slices(work, "tokenize"), plan_of(work)[task], **about)


STEPS = (
    INDEX,
    Step("read", slice_tasks, make_read),
    Step("match", match_tasks, make_match),
    Step("copies", copies_tasks, make_copies),
    Step("tokenize", slice_tasks, make_tokenize),
    Step("plan", plan_tasks, make_plan),
    Step("shards", shard_tasks, make_shard),
)


def is_done(work: Work) -> bool:
    """Whether the last step is, and with it all before."""
    return (work.folder / "plan/plan.json").exists() and all(
        STEPS[-1].target(work, task).exists() for task in shard_tasks(work)
    )


def ledger_of(work: Work) -> DocumentLedger:
    """Of all slices, in the order of the input; what stays is added by the plan."""
    ledger = DocumentLedger()
    for step in ("read", "tokenize"):
        for folder in of_slices(work, step):
            ledger.merge(json.loads((folder / "ledger.json").read_text("utf-8")))
    for task, shard in plan_of(work).items():
        ledger.add(shard, held_back=task.startswith("held-back/"))
    return ledger
