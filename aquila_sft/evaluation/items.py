"""Items of a benchmark, from the Hub's files or the original ones in a folder.

    Benchmark -> files -> records -> reader -> {part: [Item, …]}, in the order of the files

A reader knows every published shape of its benchmark and gives the fields that the prompt names. A record without them
ends the run with one line: half a benchmark is none.
"""

import csv
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aquila_sft.data import sources
from aquila_sft.errors import UserError
from aquila_sft.evaluation import rules
from aquila_sft.evaluation.benchmarks import Benchmark, Source

SHUFFLE = 42  # the reference's, before it takes the first `limit` and draws examples


@dataclass(frozen=True)
class Item:
    """One question. `gold`: the place of the right choice; `golds`: what a written answer may be."""

    part: str
    prompt: str
    choices: tuple[str, ...] = ()
    gold: int = -1
    golds: tuple[str, ...] = ()


Record = tuple[str, dict]  # where it stands, what it says


def read(benchmark: Benchmark, data: str, cache: Path, limit: int | None) -> dict[str, list[Item]]:
    """The items of every part. Raises UserError for what is missing or has other columns.

    data: `hub` or a folder; cache: where archives from the Hub are unpacked; limit: so many items of the whole row, an
    equal share of every part, those that the reference takes: it shuffles with a seed of its own first.
    """
    share = None if limit is None else max(1, limit // len(benchmark.parts))
    loaded: dict[str, list[Record]] = {}
    items = {}
    for part, source in benchmark.parts.items():
        files = find(benchmark, part, source, data, cache)
        key = "\n".join(map(str, files))
        if key in loaded and ":" not in part:
            raise UserError(
                f"{files[0]} would be {part} and another part of {benchmark.name}: give each a folder of its name"
            )
        if key not in loaded:  # a file with all subjects is read once
            loaded = {key: [record for file in files for record in records(file, benchmark.columns)]}
        chosen = of_part(loaded[key], part)
        if not chosen:
            raise UserError(f"{files[0]} holds no item of {part}")
        items[part] = shuffled(benchmark, part, chosen, data, cache)[:share]
    return items


def of_part(found: list[Record], part: str) -> list[Record]:
    """Records of one subject where a file has them all."""
    subject = part.partition(":")[2]
    return [r for r in found if not subject or r[1].get("subject", subject) == subject]


def shuffled(benchmark: Benchmark, part: str, found: list[Record], data: str, cache: Path) -> list[Item]:
    """Items in the reference's order: shuffled, then each with its own examples, drawn by the same generator."""
    draw = random.Random(SHUFFLE)
    read_one = READERS[benchmark.reader]
    topic = benchmark.topics.get(part, "")

    def item(record: Record) -> Item:
        where, content = record
        try:
            fields = all_text(read_one(content))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            missing = f"no column {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{where} is no item of {part}: {missing}; it has: {', '.join(map(str, content))}"
            ) from None
        prompt = benchmark.prompt.format_map(fields | {"topic": topic})
        choices = tuple(benchmark.choice.format(text=text) for text in fields.get("choices", ()))
        return Item(part, prompt, choices, fields.get("gold", -1), tuple(fields.get("golds", ())))

    items = [item(record) for record in found]
    draw.shuffle(items)
    if benchmark.shots:
        files = find_files(benchmark, data, "shots", benchmark.local_shots, cache)
        pool = [item(record) for file in files for record in records(file, ())]
        if len(pool) < benchmark.shots:
            raise UserError(f"{files[0]} holds {len(pool)} examples; {benchmark.name} needs {benchmark.shots}")
        items = [with_examples(one, draw.sample(pool, benchmark.shots)) for one in items]
    return items


def with_examples(item: Item, examples: list[Item]) -> Item:
    shown = "".join(f"{example.prompt} {example.golds[0]}\n\n" for example in examples)
    return Item(item.part, shown + item.prompt, item.choices, item.gold, item.golds)


# ---- files ----


def find(benchmark: Benchmark, part: str, source: Source, data: str, cache: Path) -> list[Path]:
    return find_files(benchmark, data, "files", source.local, cache, part=part, hub=source.hub)


def find_files(
    benchmark: Benchmark,
    data: str,
    which: str,
    local: tuple[str, ...],
    cache: Path,
    part: str | None = None,
    hub: dict | None = None,
) -> list[Path]:
    part = part or benchmark.name
    hub = hub or next(iter(benchmark.parts.values())).hub
    if data == "hub":
        return from_hub(hub, which, local, cache)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"eval.data={data}: no such folder; name one with the benchmarks' files, or eval.data=hub")
    name = part.partition(":")[0]
    bases = [folder / name, folder / f"eval_{name}", *([folder] if ":" not in part else [])]
    if found := first_match(bases, local):
        return found
    raise UserError(f"eval.data={data} has no file for {part}: none of {', '.join(local)} in {bases[0]} or {bases[1]}")


def first_match(bases: list[Path], patterns: tuple[str, ...]) -> list[Path]:
    for base in bases:
        for pattern in patterns:
            if found := sorted(p for p in base.glob(pattern) if p.is_file()):
                return found
    return []


def from_hub(hub: dict, which: str, local: tuple[str, ...], cache: Path) -> list[Path]:
    """Files of a Hub data set; an archive is unpacked, and read as the folder that it is."""
    from aquila_sft import snapshot

    wanted = snapshot.Wanted(hub["repo"], "dataset", hub.get("revision"), tuple(hub[which]))
    folder = snapshot.fetch(wanted)
    files = [folder / name for name in wanted.pick(snapshot.names_in(folder))]
    archives = [file for file in files if file.suffix == ".zip"]
    if not archives:
        return files
    target = cache / hub["repo"].replace("/", "--")
    if not target.is_dir():  # whole or not at all: a kill may come at any time
        unpacked = target.with_name(f"{target.name}.partial")
        shutil.rmtree(unpacked, ignore_errors=True)
        for archive in archives:
            with zipfile.ZipFile(archive) as content:
                content.extractall(unpacked)
        unpacked.rename(target)
    found = first_match([target, *sorted(p for p in target.iterdir() if p.is_dir())], local)
    if not found:
        raise UserError(f"{hub['repo']}: {archives[0].name} has none of {', '.join(local)}")
    return found


def records(file: Path, columns: tuple[str, ...]) -> list[Record]:
    """All records of a file: jsonl, json, parquet, csv. Raises UserError for a line that is none."""
    if file.suffix == ".csv":
        return list(csv_records(file, columns))
    found = list(with_labels(file, sources.read(file)))
    if len(found) == 1 and isinstance(found[0][1], dict) and isinstance(found[0][1].get("Data"), list):
        found = [(f"{file}:Data[{i}]", record) for i, record in enumerate(found[0][1]["Data"])]
    for where, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object; the file is damaged")
    return found


def csv_records(file: Path, columns: tuple[str, ...]) -> Iterator[Record]:
    try:
        text = file.read_bytes().decode("utf-8-sig")  # \r\n inside a cell stays
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:  # a quote that never ends, as in a file that was cut off
        raise UserError(f"{file} is no table: {error}; the file is damaged") from None
    if not rows:
        return
    names = list(columns) or [name.strip().lower() if len(name.strip()) > 1 else name for name in rows.pop(0)]
    for number, row in enumerate(rows, 1 if columns else 2):
        if len(row) < len(names):
            raise UserError(f"{file}: row {number} has {len(row)} columns, expected {len(names)} ({', '.join(names)})")
        yield f"{file}:{number}", dict(zip(names, row, strict=False))


def with_labels(file: Path, found: Iterator[tuple[str, dict | None]]) -> Iterator[tuple[str, dict | None]]:
    """The original PIQA has its answers beside it: valid.jsonl, valid-labels.lst."""
    labels = file.with_name(f"{file.stem}-labels.lst")
    if not labels.is_file():
        yield from found
        return
    golds, rows = labels.read_text("utf-8", errors="replace").split(), list(found)
    if len(golds) != len(rows):
        raise UserError(f"{labels} has {len(golds)} answers for the {len(rows)} items of {file.name}")
    for (where, record), gold in zip(rows, golds, strict=True):
        yield where, None if record is None else record | {"label": gold}


# ---- readers: a record of any published shape -> the fields that prompts name, choices, gold or golds ----


def hellaswag(record: dict) -> dict:
    """Without ctx_a and ctx_b (some copies have lost them) the context stands as it is."""
    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}" if "ctx_a" in record else record["ctx"]
    endings = [rules.clean_hellaswag(ending) for ending in record["endings"]]
    query = rules.clean_hellaswag(f"{record['activity_label']}: {context} ")
    return {"query": query, "choices": endings, "gold": within(int(record["label"]), endings)}


def question(record: dict) -> dict:
    """ARC, CommonsenseQA, OpenBookQA, in the original nesting and in the Hub's columns."""
    nested = record["question_stem"] if "question_stem" in record else record["question"]
    if isinstance(nested, dict):
        stem, labels = nested["stem"], [choice["label"] for choice in nested["choices"]]
        texts = [choice["text"] for choice in nested["choices"]]
    else:
        stem, labels, texts = nested, list(record["choices"]["label"]), list(record["choices"]["text"])
    return {"question": stem, "choices": texts, "gold": labels.index(record["answerKey"].strip())}


def piqa(record: dict) -> dict:
    choices = [record["sol1"], record["sol2"]]
    return {"question": record["goal"], "choices": choices, "gold": within(int(record["label"]), choices)}


def siqa(record: dict) -> dict:
    choices = [record["answerA"], record["answerB"], record["answerC"]]
    gold = within(int(record["label"]) - 1, choices)
    return {"context": record["context"], "question": record["question"], "choices": choices, "gold": gold}


def winogrande(record: dict) -> dict:
    query, rest = record["sentence"].split("_")
    choices = [f"{record[option]} {rest.strip()}" for option in ("option1", "option2")]
    return {"query": query, "choices": choices, "gold": within(int(record["answer"]) - 1, choices)}


def trivia(record: dict) -> dict:
    if "Question" in record:  # the original files
        return {"question": record["Question"], "golds": rules.trivia_golds(record["Answer"]["Aliases"])}
    return {"question": record["question"], "golds": rules.trivia_golds(record["answer"]["aliases"])}


def gsm8k(record: dict) -> dict:
    return {"question": record["question"], "golds": [record["answer"]]}


def exam(record: dict) -> dict:
    """MMLU, C-Eval, CMMLU: letters in columns, or a list with the place of the answer."""
    if "choices" in record:
        choices, gold = list(record["choices"]), int(record["answer"])
    else:
        choices, gold = [record[letter] for letter in "ABCD"], list("ABCD").index(record["answer"].strip())
    return {"question": record["question"], "choices": choices, "gold": within(gold, choices)}


def within(gold: int, choices: list) -> int:
    if not 0 <= gold < len(choices):
        raise ValueError(f"the answer is number {gold + 1} of {len(choices)} choices")
    return gold


def all_text(fields: dict) -> dict:
    """A null would be scored as the word "None"."""
    for name, value in fields.items():
        for text in value if name in ("choices", "golds") else [value]:
            if name != "gold" and not isinstance(text, str):
                raise ValueError(f"{text!r} in its {name} is no text")
    return fields


READERS: dict[str, Callable[[dict], dict]] = {
    reader.__name__: reader for reader in (hellaswag, question, piqa, siqa, winogrande, trivia, gsm8k, exam)
}


def json_lines(path: Path) -> list[dict]:
    """A file of our own: one object a line, split at \\n alone."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
