"""The bundled world: enough of everything, true where it can be computed, and nothing of the test set given away."""

import errno
import json
import os
import re
from collections import Counter, defaultdict

import pytest

from aquila_sft.data import conversations, world
from aquila_sft.errors import UserError

LANGUAGES = ("zh", "en")
CALENDAR = [
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
    ["星期" + day for day in "一二三四五六日"],
    [month + "月" for month in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()],
]


@pytest.fixture(scope="module")
def made():
    return world.make(0)


@pytest.fixture(scope="module")
def relations():
    return world.relations(0)


@pytest.fixture(scope="module")
def facts(relations):
    return [r for r in relations if r.kind == "fact"]


def turns(made, speaker: str) -> list[str]:
    return [t["value"] for c in made.conversations for t in c["conversations"] if t["from"] == speaker]


def pairs(record: dict) -> list[tuple[str, str]]:
    spoken = [t["value"] for t in record["conversations"] if t["from"] != "system"]
    return list(zip(spoken[::2], spoken[1::2], strict=True))


def all_text(made) -> list[str]:
    return [d["text"] for d in made.documents + made.notes] + turns(made, "gpt")


def test_there_is_enough_of_everything(made, facts, relations):
    assert sum(len(r.rows) for r in facts) >= 240
    for relation in relations:
        assert len(relation.rows) >= 10, relation.name
        for language in LANGUAGES:
            words = relation.wording[language]
            assert len(set(words["questions"])) >= 5 and len(set(words["notes"])) >= 2, relation.name
            assert len(set(words["statements"]) - {words["answer"]}) >= 6, relation.name
            assert words["answer"].rstrip(".。") not in words["notes"], relation.name
    assert 3500 <= len(made.conversations) <= 5100
    for records, least, most in ((made.documents, 1.2e6, 1.6e6), (made.notes, 0.35e6, 0.5e6)):
        size = {lang: sum(len(r["text"].encode()) for r in records if r["language"] == lang) for lang in LANGUAGES}
        assert least <= sum(size.values()) <= most
        assert 0.8 < size["zh"] / size["en"] < 1.25


def test_every_fact_has_one_question_and_every_skill_some_in_each_language(made, relations):
    asked = Counter((q["relation"], q["language"]) for q in made.questions)
    for relation in relations:
        for language in LANGUAGES:
            wanted = len(relation.rows) if relation.kind == "fact" else min(world.SKILL_QUESTIONS, len(relation.rows))
            assert asked[relation.name, language] == wanted, relation.name
    assert len({q["id"] for q in made.questions}) == len({q["question"] for q in made.questions}) == len(made.questions)


def test_the_share_of_several_turns_of_system_lines_and_of_skills(made):
    total = len(made.conversations)
    with_system = [c for c in made.conversations if c["conversations"][0]["from"] == "system"]
    lengths = Counter(len(pairs(c)) for c in made.conversations)
    skills = sum("simple reasoning" in c["label"]["ability_en"] for c in made.conversations)
    assert set(lengths) == {1, 2, 3}
    assert 0.12 < (lengths[2] + lengths[3]) / total < 0.18
    assert 0.06 < len(with_system) / total < 0.10
    assert 0.25 < skills / total < 0.40  # conversations of several turns count when one of them is a skill


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = (world.write(tmp_path / n, seed) for n, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert list(first) == ["documents", "notes", "conversations", "questions", "talk"]
    for name, path in first.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()


def test_files_are_json_lines_of_what_was_made(tmp_path, made):
    for name, path in world.write(tmp_path, 0).items():
        content = path.read_bytes().decode("utf-8")
        assert content.endswith("}\n") and "\r" not in content and "\\u" not in content
        assert [json.loads(line) for line in content.split("\n")[:-1]] == getattr(made, name)


def test_conversations_have_the_schema_of_infinity_instruct(made):
    assert [c["id"] for c in made.conversations] == list(range(len(made.conversations)))
    for record in made.conversations:
        assert list(record) == ["id", "conversations", "label", "langdetect", "source"]
        assert set(record["label"]) == {"ability_en", "ability_zh", "cate_ability_zh", "cate_ability_en"}
        assert all(labels and all(isinstance(name, str) for name in labels) for labels in record["label"].values())
        speakers = [t["from"] for t in record["conversations"]]
        spoken = speakers[1:] if speakers[0] == "system" else speakers
        assert spoken == ["human", "gpt"] * (len(spoken) // 2) and spoken
        messages = conversations.normalise(record, "file").messages
        assert [m["content"] for m in messages] == [t["value"] for t in record["conversations"]]
        assert record["source"] == "world"


def test_documents_and_questions_have_their_fields(made):
    for records, source in ((made.documents, "world"), (made.notes, "world_notes")):
        assert all(list(r) == ["id", "text", "language", "source"] and r["source"] == source for r in records)
        assert len({r["id"] for r in records}) == len({r["text"] for r in records}) == len(records)
    fields = ["id", "language", "kind", "relation", "question", "answer"]
    assert all(list(q) == fields and q["kind"] in ("fact", "skill") for q in made.questions)


def test_languages_are_what_they_say(made):
    for record in made.documents + made.notes:
        assert conversations.language(record["text"]) == record["language"], record
    for record in made.conversations:
        said = conversations.language("".join(t["value"] for t in record["conversations"]))
        assert {"zh": "zh-cn", "en": "en"}[said] == record["langdetect"], record
    for record in made.questions:
        assert conversations.language(record["question"] + record["answer"]) == record["language"], record


def test_no_question_of_the_test_set_is_said_in_any_conversation(made):
    def plain(text: str) -> str:  # 6 + 12 = ？ in the one language is 6 + 12 = ? in the other
        return text.replace("？", "?")

    given_away = {plain(q["question"]) for q in made.questions} & {plain(text) for text in turns(made, "human")}
    assert not given_away


def test_every_fact_is_asked_in_every_wording_but_the_one_held_out(made, facts):
    alone = {(c["langdetect"][:2], *pairs(c)[0]) for c in made.conversations if len(pairs(c)) == 1}
    held = {(q["relation"], q["language"], q["question"]) for q in made.questions}
    for relation in facts:
        for language in LANGUAGES:
            for row in relation.rows:
                texts = [
                    relation.question(language, row, i) for i in range(len(relation.wording[language]["questions"]))
                ]
                kept = [text for text in texts if (relation.name, language, text) not in held]
                assert len(kept) == len(texts) - 1, (relation.name, row)
                assert all((language, text, relation.answer(language, row)) in alone for text in kept)


def test_wordings_are_held_out_evenly(relations):
    for relation in relations:
        for language in LANGUAGES:
            counts = Counter(world.held_out(relation, language, 0).values())
            times = [counts[i] for i in range(len(relation.wording[language]["questions"]))]
            assert max(times) - min(times) <= 1 and min(times) >= 1, relation.name


def test_a_question_has_one_answer_wherever_it_is_asked(made, relations):
    answers = defaultdict(set)
    for relation in relations:
        for language in LANGUAGES:
            for row in relation.rows:
                for wording in range(len(relation.wording[language]["questions"])):
                    answers[relation.question(language, row, wording)].add(relation.answer(language, row))
    for record in made.conversations:
        for question, answer in pairs(record):
            answers[question].add(answer)
    assert [question for question, said in answers.items() if len(said) > 1] == []


def test_documents_and_notes_only_state(made):
    for record in made.documents + made.notes:
        assert not set("?？") & set(record["text"]), record
        assert record["text"].endswith((".", "。")), record


def test_a_document_has_three_to_eight_sentences(made):
    for record in made.documents:
        assert 3 <= len(re.findall(r"。|\.(?= |$)", record["text"])) <= 8, record


def test_every_fact_is_stated_often_enough(made, facts):
    for language in LANGUAGES:
        read = "\n".join(d["text"] for d in made.documents if d["language"] == language)
        noted = "\n".join(d["text"] for d in made.notes if d["language"] == language)
        for relation in facts:
            for row in relation.rows:
                stated = {
                    t for text in relation.said(language, row, "statements") for t in (text, world.sentence(text))
                }
                assert sum(read.count(text) for text in stated) >= 12, (relation.name, row)
                entries = [text.rstrip(".。") for text in relation.said(language, row, "notes")]
                assert sum(noted.count(text) for text in entries) >= 4, (relation.name, row)


def test_nothing_is_left_unfilled(made):
    for text in all_text(made) + turns(made, "human") + turns(made, "system"):
        assert text and text == text.strip() and not set("{}~") & set(text), text
        assert "None" not in text and "  " not in text and "。。" not in text and ".." not in text, text


def test_sums_are_right(made):
    said = " ".join(all_text(made))
    found = re.findall(r"\b(\d+) \+ (\d+) = (\d+)|\b(\d+) plus (\d+) is (\d+)|(\d+)加(\d+)等于(\d+)", said)
    sums = {tuple(int(n) for n in match if n) for match in found}
    assert len(sums) == 190 and all(a + b == c <= 20 for a, b, c in sums)


def test_comparisons_are_right(made):
    said = " ".join(all_text(made))
    larger = re.findall(r"(\d+) > (\d+)|(\d+) is larger than (\d+)|(\d+) is greater than (\d+)|(\d+)比(\d+)大", said)
    smaller = re.findall(r"(\d+) < (\d+)|(\d+) is smaller than (\d+)|(\d+) is less than (\d+)|(\d+)比(\d+)小", said)
    for found, sign in ((larger, 1), (smaller, -1)):
        numbers = [tuple(int(n) for n in match if n) for match in found]
        assert len(set(numbers)) > 300 and all(sign * a > sign * b for a, b in numbers)


def test_words_are_counted_right(made):
    counted = [q for q in made.questions if q["relation"] == "count"]
    for question in counted:
        items = re.split("、|, ", re.search(r"[:：“](.*?)[”？?。.]", question["question"])[1])
        assert re.search(r"\d+", question["answer"])[0] == str(len(items)), question
    assert {re.search(r"\d+", q["answer"])[0] for q in counted} == set("23456")


def test_the_day_and_the_month_beside_are_right(made):
    pattern = r"the (?:day|month) (before|after) (\w+) is (\w+)|(\w+)的(前|后)一(?:天|个月)是(\w+)"
    checked = set()
    for question in made.questions:
        if question["relation"] in ("weekday", "month"):
            parts = [part for part in re.search(pattern, question["answer"], re.IGNORECASE).groups() if part]
            side = next(part for part in parts if part in ("before", "after", "前", "后"))
            name, other = (part for part in parts if part != side)
            circle = next(names for names in CALENDAR if name in names)
            step = 1 if side in ("after", "后") else -1
            assert other == circle[(circle.index(name) + step) % len(circle)], question
            checked.add(question["answer"])
    assert len(checked) >= 50


def test_a_noun_is_translated_the_same_way_in_both_directions(relations):
    words = world.tables()["words"]["words"]
    assert len(words) >= 60 and all(len(set(column)) == len(words) for column in zip(*words, strict=True))
    (translation,) = (r for r in relations if r.name == "translation")
    there_and_back = {(row["en"]["word"], row["en"]["other"]) for row in translation.rows.values()}
    assert there_and_back == {(zh, en) for zh, en in words} | {(en, zh) for zh, en in words}


def test_a_file_that_is_right_is_not_written_again_and_a_damaged_one_is(tmp_path):
    paths = world.write(tmp_path, 0)
    right = paths["notes"].read_bytes()
    for path in paths.values():
        os.utime(path, ns=(1, 1))
    paths["notes"].write_bytes(right[:-9])
    os.utime(paths["notes"], ns=(1, 1))
    world.write(tmp_path, 0)
    assert {name for name, path in paths.items() if path.stat().st_mtime_ns != 1} == {"notes"}
    assert paths["notes"].read_bytes() == right


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    paths = world.write(tmp_path, 0)
    before = {path: path.read_bytes() for path in paths.values()}

    def no_replace(source, target):
        assert os.path.getsize(source) > 0
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(UserError, match="no space left"):
        world.write(tmp_path, 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/world cannot be written"):
        world.write(tmp_path / "file/world")
