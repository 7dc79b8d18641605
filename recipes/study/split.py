"""What is trained on and what is held back, by source, and text to tell forgetting by.

    conversations of each source -> train/<source>.jsonl, held-back/<source>.jsonl, items/<source>.jsonl
    held-back part of shards     -> text/<source>.<language>.jsonl

Held back are those whose questions have the smallest hashes: the same on any machine, whatever else is in the files. A
plan's `skip` passes over the first of them, so that settings which were chosen on one study's answers are judged on
others; that holds for the same files, rules and `max_bytes`.
items/ has their questions and answers as benchmark items, so that data.decontaminate= keeps copies of them out of what
is trained on. Runs of one folder are compared item by item, so what is there is never replaced by another split.
"""

import hashlib
import json
import shutil
from pathlib import Path

from aquila_sft.config.data import ConversationPolicy
from aquila_sft.data import sources
from aquila_sft.data.hygiene import judge, said_by
from aquila_sft.data.shards import Prepared
from aquila_sft.errors import UserError

DOCUMENT_BYTES = 2000  # many short ones tell more than a few long ones
PARTS = ("train", "held-back", "items", "text")


def prepare(plan: dict, rules: ConversationPolicy, out: Path) -> None:
    """All of it, in `out`. Raises UserError where another split lies there already."""
    fresh = out / "split.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    for source, files in plan["data"].items():
        of_source(source, files, plan, rules, fresh)
    if plan["text"]:
        of_text(Path(plan["text"]), plan["text_bytes"], fresh)
    for part in PARTS:
        if not (fresh / part).exists():
            continue
        if not (out / part).exists():
            (fresh / part).rename(out / part)
        elif contents(fresh / part) != contents(out / part):
            raise UserError(
                f"{out / part} is of other data, or of another skip=, held_back=, train=, max_bytes= or text_bytes=; "
                "runs of both do not compare: use another out=, or delete this one"
            )
    shutil.rmtree(fresh)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def texts(plan: dict, out: Path) -> dict[str, str]:
    """The files of text by source. Raises UserError for a source of text_without that is not there."""
    if not plan["text"]:
        return {}
    found = {file.stem.replace(".", "_"): str(file) for file in sorted((out / "text").glob("*.jsonl"))}
    if found and (unknown := sorted(set(plan["text_without"]) - set(found))):
        raise UserError(f"text_without={unknown}: the text has {', '.join(found)}")
    return found


def of_source(name: str, files: object, plan: dict, rules: ConversationPolicy, out: Path) -> None:
    """The plan's `held_back` conversations of a source behind `skip` others, and `train` more at most.

    None is longer than `max_bytes`. Raises UserError where there are too few.
    """
    skip, held_back, train = (number(plan, key, name) for key in ("skip", "held_back", "train"))
    found = {}
    for file in sources.find([files] if isinstance(files, str) else files, setting=f"data.{name}"):
        for _, record in sources.read(file):
            verdict = judge(record or {}, name, rules)
            size = sum(len(m["content"].encode()) for m in verdict.messages)
            if not verdict.reason and size <= plan["max_bytes"]:
                asked = "\n".join(said_by(verdict.messages, "user"))
                found.setdefault(hashlib.sha256(asked.encode()).digest(), verdict.messages)
    chosen = [found[key] for key in sorted(found)]
    first, last = skip, skip + held_back
    if len(chosen) <= last:
        told = f"{held_back} are to be held back behind {skip}; lower held_back= or skip="
        raise UserError(f"data.{name}: {len(chosen)} conversations, {told}")
    for part, listed in (("held-back", chosen[first:last]), ("train", chosen[last : last + train])):
        write(out / part / f"{name}.jsonl", [{"messages": messages, "source": name} for messages in listed])
    items = [
        {"question": "\n".join(m["content"] for m in messages[:-1]), "answer": messages[-1]["content"]}
        for messages in chosen[first:last]
    ]
    write(out / "items" / f"{name}.jsonl", items)


def number(plan: dict, key: str, source: str) -> int:
    """Of conversations of that source: the plan has one number for all, or one each."""
    return plan[key][source] if isinstance(plan[key], dict) else plan[key]


def of_text(shards: Path, max_bytes: int, out: Path) -> None:
    """About `max_bytes` of held-back documents of every part, as text. Of a long one its beginning."""
    from aquila_sft.tokenizer import load_tokenizer

    prepared = Prepared(shards)
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for name, part in prepared.held_back.items():
        documents, size = [], 0
        tokens, begins = part.read(0, part.tokens)
        edges = [*begins.nonzero()[0].tolist(), part.tokens]
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            whole = tokenizer.decode([i for i in tokens[start:end].tolist() if i not in marks])
            text = whole.encode()[:DOCUMENT_BYTES].decode(errors="ignore")
            documents.append({"text": text})
            size += len(text.encode())
            if size >= max_bytes:
                break
        write(out / "text" / f"{name}.jsonl", documents)


def write(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
