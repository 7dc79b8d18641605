"""The bundled world: small true facts in Chinese and English, enough to train a tiny model and to ask it afterwards.

    data/world/*.yaml  ->  documents, notes, conversations, questions

A table holds rows and, for each relation over them, the wordings. A fact is one row of one relation. It is stated in
documents and notes and asked in conversations in every wording but one, and that one is its question in the test set:
the fact has been taught and so has the wording, but never the two together. Skills are relations with computed rows.
"""

import dataclasses
import functools
import json
import os
import random
import string
from collections.abc import Iterator
from pathlib import Path

import yaml

from aquila_sft.chat_template import DEFAULT_SYSTEM
from aquila_sft.errors import UserError

TABLES = Path(__file__).parents[2] / "data" / "world"
LANGUAGES = ("zh", "en")

THEME_ROUNDS, THEME_SENTENCES = 34, 950  # how often a row stands in documents on its relation; fewer if it is large
NOTE_ROUNDS, NOTE_ENTRIES = 18, 400  # the same for notes
SUBJECT_ROUNDS = 10  # times each row is the subject of a document, where its table has several relations
SKILL_QUESTIONS = 15  # in the test set, for each skill and language
MULTI_TURN = 0.17  # conversations of several turns for each one of a single turn
SYSTEM_LINE = 0.08  # of all conversations


@dataclasses.dataclass(frozen=True)
class World:
    documents: list[dict]  # {"id", "text", "language", "source"}
    notes: list[dict]  # the same, denser
    conversations: list[dict]  # Infinity-Instruct's schema
    questions: list[dict]  # {"id", "language", "kind", "relation", "question", "answer"}
    talk: list[dict]  # the conversations as plain text, for the vocabulary only: it has to spell questions too


@dataclasses.dataclass(frozen=True)
class Relation:
    """Rows, and by language the ways to speak of them: title, openers, questions, answer, statements, notes."""

    name: str
    table: str
    kind: str  # "fact" or "skill"
    wording: dict[str, dict]
    rows: dict[int, dict[str, dict]]  # number in the table -> language -> slot -> words

    def question(self, language: str, row: int, wording: int) -> str:
        return sentence(self.wording[language]["questions"][wording].format(**self.rows[row][language]))

    def answer(self, language: str, row: int) -> str:
        return sentence(self.wording[language]["answer"].format(**self.rows[row][language]))

    def said(self, language: str, row: int, form: str) -> list[str]:
        """Its `statements` or `notes`, not yet capitalised, and first the answer, if it names what it is about."""
        words = self.wording[language]
        answer = [words["answer"]] if words["answer"].count("{") > 1 else []
        return [text.format(**self.rows[row][language]) for text in answer + words[form]]


def sentence(text: str) -> str:
    """Templates begin small, so that a connector can stand before them."""
    return text[0].upper() + text[1:]


def make(seed: int = 0) -> World:
    """A pure function of the seed and the tables."""
    everything = relations(seed)
    held = {(r.name, language): held_out(r, language, seed) for r in everything for language in LANGUAGES}
    talks = conversations(everything, held, seed)
    return World(
        documents=numbered(documents(everything, seed), "world", seed),
        notes=numbered(notes(everything, seed), "world_notes", seed),
        conversations=talks,
        questions=questions(everything, held),
        talk=[{"text": spoken(record), "source": "world_talk"} for record in talks],
    )


def write(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Five files of JSON lines, each written whole or not at all; a file that is already right is left alone."""
    texts = vars(make(seed))
    paths = {name: folder / f"{name}.jsonl" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in texts.items():
            write_lines(paths[name], records)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; start in another directory") from None
    return paths


def write_lines(path: Path, records: list[dict]) -> None:
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if path.is_file() and path.read_bytes() == content:
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def spoken(record: dict) -> str:
    """A conversation as ChatML renders it, without its marks."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = record["conversations"]
    if turns[0]["from"] != "system":
        turns = [{"from": "system", "value": DEFAULT_SYSTEM}, *turns]
    return "\n".join(f"{roles[turn['from']]}\n{turn['value']}" for turn in turns)


# tables -> relations


@functools.cache
def tables() -> dict[str, dict]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {path.stem: yaml.load(path.read_text("utf-8"), loader) for path in sorted(TABLES.glob("*.yaml"))}


def relations(seed: int = 0) -> list[Relation]:
    """Those of the tables, then the skills with the rows of this seed."""
    facts = [
        Relation(name, table, "fact", wording, filled_rows(content, wording))
        for table, content in tables().items()
        for name, wording in content.get("relations", {}).items()
    ]
    skills = tables()["skills"]["skills"].items()
    rows = skill_rows(seed)
    return facts + [Relation(name, name, "skill", wording, dict(enumerate(rows[name]))) for name, wording in skills]


def filled_rows(content: dict, wording: dict) -> dict[int, dict[str, dict]]:
    """The rows with every slot of the answer. A row is its Chinese columns, then its English ones."""
    heads = [(language, column) for language in LANGUAGES for column in content["columns"][language]]
    needed = {(lang, slot) for lang in LANGUAGES for _, slot, *_ in string.Formatter().parse(wording[lang]["answer"])}
    rows = {}
    for number, row in enumerate(content["rows"]):
        cells = {head: str(cell) for head, cell in zip(heads, row, strict=True) if cell is not None}
        if all(head in cells for head in needed if head[1]):
            rows[number] = {lang: {slot: cells[lang, slot] for at, slot in cells if at == lang} for lang in LANGUAGES}
    return rows


def skill_rows(seed: int) -> dict[str, list[dict[str, dict]]]:
    """Sums within 20 and steps around the week and the year are all there; pairs and lists of words are drawn."""
    words, nouns = tables()["skills"], tables()["words"]["words"]
    pairs = [(a, b) for a in range(1, 100) for b in range(1, 100)]
    drawn = random.Random(f"{seed} larger").sample([(a, b) for a, b in pairs if a != b], 450)
    rng = random.Random(f"{seed} count")
    lists = [list(zip(*rng.sample(nouns, 2 + i % 5), strict=True)) for i in range(300)]
    return {
        "sum": [
            {
                lang: {"a": a, "b": b, "c": a + b, "a_word": spell[a], "b_word": spell[b], "c_word": spell[a + b]}
                for lang, spell in words["numbers"].items()
            }
            for a, b in pairs
            if a + b <= 20
        ],
        "larger": [
            dict.fromkeys(LANGUAGES, {"a": a, "b": b, "large": max(a, b), "small": min(a, b)}) for a, b in drawn
        ],
        "count": [
            {"zh": {"list": "、".join(zh), "n": len(zh)}, "en": {"list": ", ".join(en), "n": len(en)}}
            for zh, en in lists
        ],
        "translation": [
            {lang: {"word": word, "other": other, "tongue": words["tongues"][lang][into]} for lang in LANGUAGES}
            for zh, en in nouns
            for word, other, into in ((zh, en, "en"), (en, zh, "zh"))
        ],
    } | {name: list(neighbours(words[name], words["beside"][name])) for name in ("weekday", "month")}


def neighbours(circle: dict[str, list[str]], beside: dict[str, list[str]]) -> Iterator[dict[str, dict]]:
    """The one before and the one after each name."""
    for i in range(len(circle["en"])):
        for side, step in enumerate((-1, 1)):
            yield {
                language: {"name": names[i], "beside": beside[language][side], "other": names[(i + step) % len(names)]}
                for language, names in circle.items()
            }


# relations -> documents and notes, as (language, text)


def documents(everything: list[Relation], seed: int) -> Iterator[tuple[str, str]]:
    """Paragraphs on a theme, several rows of one relation, and on a subject, all that is known of a row or two."""
    for language in LANGUAGES:
        for relation in everything:
            rng = random.Random(f"{seed} theme {language} {relation.name}")
            rounds = min(THEME_ROUNDS, THEME_SENTENCES // len(relation.rows))
            for group in groups(list(relation.rows), rounds, 4, 6, rng):
                ways = [relation.said(language, row, "statements") for row in group]
                said = [way[i] for way, i in zip(ways, rng.sample(range(len(ways[0])), len(ways)), strict=True)]
                yield language, paragraph(language, rng.choice(["", *relation.wording[language]["openers"]]), said, rng)
        for table in sorted({r.table for r in everything}):
            rng = random.Random(f"{seed} subject {language} {table}")
            about = [r for r in everything if r.table == table]
            rows = sorted({row for r in about for row in r.rows})
            for _ in range(SUBJECT_ROUNDS if len(about) > 1 else 0):
                said = []
                for row in rng.sample(rows, len(rows)):
                    facts = [rng.choice(r.said(language, row, "statements")) for r in about if row in r.rows]
                    said += rng.sample(facts, len(facts))
                    if len(said) >= 3:
                        yield language, paragraph(language, "", said, rng)
                        said = []


def notes(everything: list[Relation], seed: int) -> Iterator[tuple[str, str]]:
    """A heading and its entries, all in one wording."""
    for language in LANGUAGES:
        colon, semicolon, stop = {"zh": "：；。", "en": (": ", "; ", ".")}[language]
        for relation in everything:
            rng = random.Random(f"{seed} notes {language} {relation.name}")
            rounds = max(1, min(NOTE_ROUNDS, NOTE_ENTRIES // len(relation.rows)))
            for group in groups(list(relation.rows), rounds, 5, 9, rng):
                ways = [relation.said(language, row, "notes") for row in group]
                style = rng.randrange(len(ways[0]))
                entries = semicolon.join(way[style].rstrip(".。") for way in ways)
                yield language, relation.wording[language]["title"] + colon + entries + stop


def groups(rows: list[int], rounds: int, least: int, most: int, rng: random.Random) -> Iterator[list[int]]:
    """Every row once a round, in groups of `least` to `most`; the last group of a round may have one row more."""
    for _ in range(rounds):
        left = rng.sample(rows, len(rows))
        while left:
            size = min(rng.randint(least, most), len(left) - least) if len(left) > most + 1 else len(left)
            yield left[:size]
            left = left[size:]


def paragraph(language: str, opener: str, said: list[str], rng: random.Random) -> str:
    connectors = tables()["chat"]["connectors"][language]
    linked = said[:1] + [rng.choice(connectors) + text if rng.random() < 0.15 else text for text in said[1:]]
    return (" " if language == "en" else "").join(sentence(text) for text in ([opener] if opener else []) + linked)


def numbered(found: Iterator[tuple[str, str]], source: str, seed: int) -> list[dict]:
    """Each text once, shuffled."""
    texts = list(dict.fromkeys(found))
    random.Random(f"{seed} {source}").shuffle(texts)
    return [
        {"id": f"{source}-{number:05d}", "text": text, "language": language, "source": source}
        for number, (language, text) in enumerate(texts)
    ]


# relations -> conversations and questions


def held_out(relation: Relation, language: str, seed: int) -> dict[int, int]:
    """Row -> the wording it is never asked in: every fact and some rows of a skill, over all wordings evenly."""
    rng = random.Random(f"{seed} held out {relation.name} {language}")
    rows = rng.sample(list(relation.rows), len(relation.rows))
    wordings = len(relation.wording[language]["questions"])
    first = rng.randrange(wordings)
    chosen = rows if relation.kind == "fact" else rows[:SKILL_QUESTIONS]
    return {row: (first + i) % wordings for i, row in enumerate(chosen)}


def questions(everything: list[Relation], held: dict[tuple[str, str], dict[int, int]]) -> list[dict]:
    return [
        {
            "id": f"{relation.name}-{language}-{row:03d}",
            "language": language,
            "kind": relation.kind,
            "relation": relation.name,
            "question": relation.question(language, row, wording),
            "answer": relation.answer(language, row),
        }
        for relation in everything
        for language in LANGUAGES
        for row, wording in sorted(held[relation.name, language].items())
    ]


def conversations(everything: list[Relation], held: dict[tuple[str, str], dict[int, int]], seed: int) -> list[dict]:
    """Every exchange on its own, and some again as turns of longer conversations, shuffled."""
    rng = random.Random(f"{seed} conversations")
    chat = tables()["chat"]
    found = []
    for language in LANGUAGES:
        single = [("chat", say, talk["reply"]) for talk in chat["talk"][language] for say in talk["said"]]
        for relation in everything:
            asked = [
                (relation.kind, relation.question(language, row, wording), relation.answer(language, row))
                for row in relation.rows
                for wording in range(len(relation.wording[language]["questions"]))
                if held[relation.name, language].get(row) != wording
            ]
            limit = tables()["skills"]["conversations"][relation.name] if relation.kind == "skill" else len(asked)
            single += rng.sample(asked, min(limit, len(asked)))
        several = [rng.sample(single, rng.choice([2, 2, 3])) for _ in range(round(MULTI_TURN * len(single)))]
        for exchanges in [[exchange] for exchange in single] + several:
            system = rng.choice(chat["system"][language]) if rng.random() < SYSTEM_LINE else None
            found.append(conversation(language, exchanges, system))
    rng.shuffle(found)
    return [{"id": number} | one for number, one in enumerate(found)]


def conversation(language: str, exchanges: list[tuple[str, str, str]], system: str | None) -> dict:
    turns = [{"from": "system", "value": system}] if system else []
    for _, question, answer in exchanges:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    labels = [tables()["chat"]["labels"][kind] for kind in sorted({kind for kind, *_ in exchanges})]
    return {
        "conversations": turns,
        "label": {key: [label[key] for label in labels] for key in labels[0]},
        "langdetect": {"zh": "zh-cn", "en": "en"}[language],
        "source": "world",
    }
