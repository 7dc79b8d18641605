"""The reference's rules and their traps, the readers, the table: no model is loaded."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from aquila_sft.errors import UserError
from aquila_sft.evaluation import benchmarks, bits, constraints, items, results, rules
from aquila_sft.evaluation.engine import Outcome
from aquila_sft.evaluation.items import Item

ROOT = Path(__file__).parents[1]
OWN = ROOT / "tests/eval_reference/items"


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def merging(text: str) -> list[int]:
    """Characters, but `: ` is one token: a context that ends in a blank would be cut elsewhere than the whole."""
    return [ord(c) for c in text.replace(": ", "\ue000")]


def test_blanks_at_the_end_of_a_context_move_to_the_continuation():
    assert rules.encode_pair(letters, "ctx  ", " a") == (letters("ctx"), letters("   a"))
    assert rules.encode_pair(letters, "ctx", " a") == (letters("ctx"), letters(" a"))


def test_what_is_behind_the_contexts_own_length_is_the_continuation():
    context, continuation = rules.encode_pair(merging, "Answer:", " yes")
    assert context == letters("Answer:")
    assert continuation == letters("yes")  # ": " became one token: the context's length cuts behind it


def test_a_choice_is_divided_by_characters_not_bytes_without_one_leading_blank():
    assert [rules.characters(text) for text in (" 北京", "北京", "  two", " é", "a b")] == [2, 2, 4, 1, 3]
    # by bytes the Chinese choice (6) would win, by characters (2) the English one does
    assert rules.chosen([-6.0, -8.0], [" 北京", " abcdef"]) == {"acc": 0, "acc_norm": 1}


def test_the_first_of_equal_choices_is_taken():
    assert rules.chosen([-2.0, -1.0, -1.0], [" a", " b", " c"]) == {"acc": 1, "acc_norm": 1}


def test_hellaswag_is_cleaned_once():
    assert rules.clean_hellaswag("a [title] b [step] c") == "a. b c"
    assert rules.clean_hellaswag("a   b") == "a  b"  # a second cleaning would make one blank of them


def test_hellaswag_keeps_one_blank_at_its_end_and_capitalizes_the_second_half_as_the_reference_does():
    record = {"activity_label": "X", "ctx_a": "One.", "ctx_b": "the IBM man", "endings": ["e"], "label": 0}
    assert items.hellaswag(record)["query"] == "X: One. The ibm man "
    assert items.hellaswag(record | {"ctx_b": ""})["query"] == "X: One. "


@pytest.mark.parametrize(
    "written, right",
    [
        ("paris", True),
        (" PARIS! ", True),
        ("Pa-ris", True),  # ASCII punctuation is taken out, not replaced
        ("the paris", False),  # articles stay
        ("“Paris”", False),  # only ASCII punctuation goes
        ("", False),
    ],
)
def test_triviaqa_normalizes_like_the_reference(written, right):
    assert rules.is_right("trivia", written, rules.trivia_golds(["Paris"])) == right


def test_triviaqa_leaves_out_aliases_that_begin_with_another_one():
    assert rules.trivia_golds(["Onion skins", "Onion", "onions"]) == ["onion", "onions"]
    assert not rules.is_right("trivia", "Onion skins", rules.trivia_golds(["Onion skins", "Onion"]))


@pytest.mark.parametrize(
    "written, gold, right",
    [
        ("so\n#### 1,234", "#### 1234", True),
        ("#### -3.", "#### -3.", True),
        ("#### 3.", "#### 3", False),  # a full stop behind the number belongs to it
        ("The answer is 60", "#### 60", False),  # without the mark there is no number
        ("####60", "#### 60", False),
    ],
)
def test_gsm8k_reads_the_number_behind_its_mark_only(written, gold, right):
    assert rules.is_right("gsm8k", written, [gold]) == right


def test_a_written_answer_ends_before_the_first_stop_of_any_kind():
    assert rules.before_stop("a, b. c\nd", ["\n", ".", ","]) == "a"


# ---- definitions and readers ----


def test_the_card_has_twelve_rows_and_their_parts():
    rows = {name: benchmarks.load(name) for name in benchmarks.GROUPS["card"]}
    assert len(rows) == 12 and [r.row for r in rows.values()] == list(results.card()["rows"])[:12]
    assert {n: len(r.parts) for n, r in rows.items() if len(r.parts) > 1} == {
        "arc": 2,
        "mmlu": 57,
        "ceval": 52,
        "cmmlu": 67,
    }
    assert {r.score for n, r in rows.items() if r.form == "choices" and n != "commonsenseqa"} == {"acc_norm"}
    assert rows["commonsenseqa"].score == "acc" and rows["gsm8k"].shots == 5


def test_groups_and_names_are_put_in_the_cards_order_and_a_slip_is_one_line():
    assert benchmarks.asked(["cmmlu", "arc", "arc"]) == ["arc", "cmmlu"]
    assert benchmarks.asked(["chinese"]) == ["ceval", "cmmlu"]
    with pytest.raises(UserError, match="eval.tasks=helaswag is not one of .*did you mean hellaswag"):
        benchmarks.asked(["helaswag"])


def read_own(name: str, limit: int | None = None, data: Path = OWN) -> list[Item]:
    return own_parts(name, data, limit)[1]


def own_parts(name: str, data: Path = OWN, limit: int | None = None):
    """The benchmark with the parts that the small folder has, and all their items."""
    import dataclasses

    benchmark = benchmarks.load(name)
    there = {
        part: source
        for part, source in benchmark.parts.items()
        if any((data / part.partition(":")[0] / pattern).is_file() for pattern in source.local) or ":" not in part
    }
    benchmark = dataclasses.replace(benchmark, parts=there)
    found = items.read(benchmark, str(data), Path("unused"), limit)
    return benchmark, [item for listed in found.values() for item in listed]


def test_u0085_inside_a_json_line_ends_no_line():
    assert any("\u0085" in choice for item in read_own("hellaswag") for choice in item.choices)
    assert any("\u0085" in item.prompt for item in read_own("triviaqa"))
    assert len(read_own("triviaqa")) == 4


def test_the_published_shapes_of_a_record_read_alike():
    nested = {
        "question": {"stem": "q", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
        "answerKey": "B",
    }
    flat = {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    assert items.question(nested) == items.question(flat) == items.question({"question_stem": "q"} | flat)
    csv_row = {"question": "q", "A": "x", "B": "y", "C": "z", "D": "w", "answer": "C"}
    hub_row = {"question": "q", "choices": ["x", "y", "z", "w"], "answer": 2, "subject": "s"}
    assert items.exam(csv_row) == items.exam(hub_row)
    assert items.trivia({"Question": "q", "Answer": {"Aliases": ["B", "A"]}}) == items.trivia(
        {"question": "q", "answer": {"aliases": ["A", "B"]}}
    )


def test_items_come_in_the_references_order_and_each_has_its_own_examples():
    questions = [json.loads(line)["question"] for line in (OWN / "gsm8k/test.jsonl").read_text().splitlines()]
    draw = random.Random(42)
    draw.shuffle(questions)
    found = read_own("gsm8k")
    assert [item.prompt.rsplit("Question: ")[-1].removesuffix("\nAnswer:") for item in found] == questions
    assert [item.prompt.count("Question: ") for item in found] == [6] * 3
    assert len({item.prompt[:200] for item in found}) > 1
    assert read_own("gsm8k", limit=2) == found[:2]


def test_a_limit_of_a_row_is_shared_by_its_parts():
    benchmark, found = own_parts("cmmlu", limit=2)
    assert [item.part for item in found] == list(benchmark.parts)


@pytest.mark.parametrize(
    "name, file, change, told",
    [
        ("piqa", "valid-labels.lst", lambda t: "0\n1\n", "valid-labels.lst has 2 answers for the 3 items"),
        ("siqa", "dev.jsonl", lambda t: t.replace('"answerB"', '"answer_b"', 1), "dev.jsonl:1 .*no column 'answerB'"),
        ("siqa", "dev.jsonl", lambda t: t.replace('"label": "1"', '"label": "7"'), "number 7 of 3 choices"),
        ("openbookqa", "dev.jsonl", lambda t: t[:-20], "dev.jsonl:3: not a JSON object"),
        ("winogrande", "dev.jsonl", lambda t: t.replace(" _ ", " it ", 1), "dev.jsonl:1 is no item of winogrande"),
        ("cmmlu", "test/chinese_history.csv", lambda t: t.replace(",长安", "", 1), "row 3 has 6 columns, expected 7"),
        ("cmmlu", "test/chinese_history.csv", lambda t: "", "chinese_history.csv holds no item of cmmlu"),
        ("cmmlu", "test/chinese_history.csv", lambda t: t + '"' + "x" * 200_000, "is no table: field larger"),
        ("hellaswag", "hellaswag_val.jsonl", lambda t: t.replace('"label": 0', '"label": 4'), "number 5 of 4 choices"),
        ("hellaswag", "hellaswag_val.jsonl", lambda t: t.replace('"label": 0', '"label": -1'), "number 0 of 4 choices"),
        (
            "triviaqa",
            "triviaqa.jsonl",
            lambda t: t.replace('"Question": "', '"Question": null, "": "', 1),
            "None in its que",
        ),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_one_line(name, file, change, told, tmp_path):
    shutil.copytree(OWN / name, tmp_path / name)
    path = tmp_path / name / file
    path.write_text(change(path.read_text("utf-8")), "utf-8")
    with pytest.raises(UserError, match=told) as error:
        read_own(name, data=tmp_path)
    assert "\n" not in str(error.value)


def test_labels_that_are_no_text_are_one_line(tmp_path):
    shutil.copytree(OWN / "piqa", tmp_path / "piqa")
    (tmp_path / "piqa/valid-labels.lst").write_bytes(b"\xff\n1\n0\n")
    with pytest.raises(UserError, match="valid.jsonl:1 is no item of piqa: invalid literal"):
        read_own("piqa", data=tmp_path)


def test_an_exam_without_its_answer_is_no_item():
    row = {"question": "q", "A": "x", "B": "y", "C": "z", "D": "w"}
    for answer in ("", "AB", "E"):
        with pytest.raises(ValueError, match="not in list"):
            items.exam(row | {"answer": answer})


def test_one_file_is_not_both_parts_of_a_row(tmp_path):
    shutil.copy(OWN / "arc_easy/test.jsonl", tmp_path)
    with pytest.raises(UserError, match="test.jsonl would be arc_challenge and another part of arc"):
        items.read(benchmarks.load("arc"), str(tmp_path), tmp_path, None)


def test_a_folder_without_a_benchmark_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="has no file for hellaswag: none of hellaswag_val.jsonl in"):
        read_own("hellaswag", data=tmp_path)
    with pytest.raises(UserError, match="eval.data=.*: no such folder"):
        items.read(benchmarks.load("arc"), str(tmp_path / "no"), tmp_path, None)


# ---- the table ----


def test_the_averages_of_every_whole_column_of_the_card_are_its_own():
    card = results.card()
    rows = list(card["rows"])
    assert len(card["columns"]) == 14 and len(rows) == 15
    whole = 0
    for column, name in enumerate(card["columns"]):
        values = {row: card["rows"][row]["values"][column] for row in rows}
        assert all(len(card["rows"][row]["values"]) == 14 for row in rows)
        if None in values.values():
            continue
        whole += 1
        english, chinese = (results.mean(values[row] for row in part) for part in (rows[:10], rows[10:12]))
        expected = dict(zip(rows[12:], (english, chinese, (english + chinese) / 2), strict=True))
        for row, value in expected.items():
            assert abs(values[row] - value) < 0.0101, (name, row)  # printed with two digits, of rounded rows
    assert whole >= 4


def outcome(**scores):
    from types import SimpleNamespace

    return SimpleNamespace(scores=scores)


def test_a_row_is_the_plain_mean_over_its_parts_with_the_references_standard_error():
    parts = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0]]
    variance = 1 / 3  # of the first, with n - 1; the second has none
    assert math.isclose(results.standard_error(parts), math.sqrt(variance / 4) / 2)
    assert results.standard_error([[1.0]]) is None
    benchmark, _ = own_parts("arc")
    listed = {part: [Item(part, "p", (" a", " b"), 0)] * n for part, n in (("arc_easy", 4), ("arc_challenge", 2))}
    found = {
        "arc_easy": [outcome(acc_norm=v, bits_per_byte=2.0) for v in parts[0]],
        "arc_challenge": [outcome(acc_norm=v, bits_per_byte=1.0) for v in parts[1]],
    }
    score = results.row(benchmark, listed, found)
    assert (score.value, score.chance, score.items, score.bits_per_byte) == (75.0, 50.0, 6, 1.5)
    assert math.isclose(score.error, 100 * math.sqrt(variance / 4) / 2)


def test_averages_are_of_whole_sets_of_rows_only():
    scores = {name: results.Score(name, 10.0, 1.0, 25.0, 4) for name in benchmarks.CHINESE}
    assert list(results.averages(scores)) == ["Average-Chinese"]
    scores |= {name: results.Score(name, 20.0, 1.0, 25.0, 4) for name in benchmarks.ENGLISH}
    found = results.averages(scores)
    assert {name: score.value for name, score in found.items()} == {
        "Average-English": 20.0,
        "Average-Chinese": 10.0,
        "Average": 15.0,
    }
    assert math.isclose(found["Average-Chinese"].error, math.sqrt(2) / 2)


def test_a_difference_within_error_is_marked_and_one_beyond_is_not():
    near, far = (results.Score("PIQA", value, 1.0, 50.0, 1838) for value in (66.0, 60.0))
    assert results.within_error(near, 66.38, 1838) and not results.within_error(far, 66.38, 1838)
    none_right = results.Score("GSM8K (5-shot)", 0.0, 0.0, 0.0, 8)
    assert results.within_error(none_right, 2.12, 1319)  # 0 of 8 says little
    lines = results.table([near], "mine")
    assert lines[1][:7] == ["PIQA", "66.00", "1.00", "50.0", "1838", "–", "66.38 ≈"]


def test_results_are_written_as_markdown_csv_and_json_with_the_third_party_apart(tmp_path):
    score = results.Score("PIQA", 66.0, 1.0, 50.0, 1838, 1.25)
    text = results.write(tmp_path, "mine", [score], {"Other": [["a"], ["b"]]}, {"limit": "all items"})
    assert text == (tmp_path / "results.md").read_text()
    assert "| ceval-valid | 25.19 | 24.44 |" in text and "minimind" in text and "| PIQA | 66.00 | 1.00 |" in text
    assert (tmp_path / "results.csv").read_text().split("\n")[1].startswith("PIQA,66.00,1.00,50.0,1838,1.250,66.38")
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["rows"][0]["bits_per_byte"] == 1.25 and told["other"]["Other"] == [{"a": "b"}]


# ---- bits per byte ----


def test_an_interval_is_that_of_a_ratio_of_sums_and_the_same_every_time():
    """Beside the delta method's standard error, for items of unequal length."""
    chosen = np.random.default_rng(1)
    size = chosen.integers(20, 200, 400).astype(float)
    spent = size * chosen.normal(2.0, 0.5, 400)
    ratio = spent.sum() / size.sum()
    error = math.sqrt(((spent - ratio * size) ** 2).sum()) / size.sum()
    low, high = bits.interval(spent, size)
    assert (low, high) == bits.interval(spent, size)
    assert low == pytest.approx(ratio - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(ratio + 1.96 * error, abs=0.2 * error)
    assert bits.interval(spent[:1], size[:1]) is None


def text(language: str, source: str, nats: float, size: int) -> Outcome:
    return Outcome({"nats": nats * math.log(2), "bytes": float(size)}, about={"language": language, "source": source})


def test_bits_per_byte_are_told_by_language_and_by_source_where_there_are_several():
    of_one = bits.table("answers", [text("en", "a", 8, 4), text("en", "a", 1, 5), text("zh", "a", 6, 3)])
    assert [row[:5] for row in of_one[1:]] == [["en", "all", "2", "9", "1.0000"], ["zh", "all", "1", "3", "2.0000"]]
    assert of_one[1][5:] == ["0.2000", "2.0000"] and of_one[2][5:] == ["–", "–"]
    of_two = bits.table("answers", [text("en", "a", 8, 4), text("en", "Z", 1, 5), text("zh", "a", 6, 3)])
    assert [row[:3] for row in of_two[1:]] == [
        ["en", "all", "2"],
        ["en", "Z", "1"],
        ["en", "a", "1"],
        ["zh", "all", "1"],
        ["zh", "a", "1"],
    ]


def test_a_change_is_drawn_with_both_models_texts_in_pairs():
    """All texts differ, their change does not: its interval has no width."""
    before = [text("en", "a", nats, 10) for nats in (5, 20, 60, 9)]
    after = [text("en", "a", nats + 1, 10) for nats in (5, 20, 60, 9)]
    (header, row) = bits.table("documents", after, before)
    assert float(row[6]) - float(row[5]) > 1
    assert row[7:] == ["2.3500", "+0.1000", "+0.1000", "+0.1000"] and len(header) == len(row)


# ---- instructions whose obedience a program can tell ----


def test_both_sets_have_at_least_100_prompts_and_use_every_check_and_no_other():
    kinds = set()
    for language in ("zh", "en"):
        records = items.json_lines(ROOT / f"data/instruct_{language}.jsonl")
        assert len(records) >= 100 and len({r["prompt"] for r in records}) == len(records)
        kinds |= {name for record in records for name, *_ in record["checks"]}
    assert kinds == set(constraints.CHECKS)


def test_every_english_prompt_can_be_obeyed_and_not_by_the_answer_to_another():
    """By answers written by hand, all shorter than 64 tokens; those to other prompts obey few."""
    records = items.json_lines(ROOT / "data/instruct_en.jsonl")
    answers = items.json_lines(ROOT / "tests/instruct_en_answers.jsonl")
    assert [record["prompt"] for record in records] == [record["prompt"] for record in answers]
    obeyed = 0
    for record, answer in zip(records, answers, strict=True):
        assert all(constraints.followed(record["checks"], answer["answer"])), answer
        assert len(constraints.words(answer["answer"])) <= 40
        obeyed += sum(all(constraints.followed(record["checks"], other["answer"])) for other in answers)
    assert obeyed < 0.3 * len(records) ** 2
    assert any(len(record["checks"]) > 1 for record in records)


@pytest.mark.parametrize(
    "text, count",
    [
        ("One. Two! Three?", 3),
        ("It costs 3.50 euros. That is 0.5 less than on Feb. 3.", 2),
        ("Dr. Li and Mr. J. K. Stone live in the U.S. with their cat.", 1),
        ("He left at 5 p.m. and came back. She left at 6 p.m. Then it rained.", 3),
        ("Fruit, e.g. apples, is healthy. See No. 4 of the list.", 2),
        ("Is it far? No. It is not.", 3),
        ("It was he and I. Nobody else came.", 2),
        ("Well... maybe. Or not... Who knows?!", 3),
        ('"Stop!" he cried. "Why?"', 2),
        ("He said: “Go home.” We went.", 2),
        ("1. Wash it.\n2. Dry it.", 2),
        ("you can write like this. it is still two.", 2),
        ("no full stop at all", 1),
        ("Read it at www.example.org today.", 1),
        ("他说：“好。”然后走了！", 2),
        ("1.5公里不远。版本是3.2。", 2),
    ],
)
def test_sentences_are_counted_as_a_reader_counts_them(text, count):
    assert len(constraints.sentences(text)) == count, constraints.sentences(text)


def test_words_are_counted_as_a_reader_counts_them():
    assert constraints.words("Don't — it's 3.5 km, a well-known - and long--way…") == [
        "Don't", "it's", "3.5", "km,", "a", "well-known", "and", "long", "way…",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "check, obeyed, not_obeyed",
    [
        (["max_characters", 4], "北 京 好\n大", "北京好大了"),
        (["min_characters", 4], "北京好大", "北 京 好"),
        (["sentences", 2], "好。很好！", "好，很好。"),
        (["lines", 2], "一\n\n二", "一二"),
        (["numbered", 2], "1. 一\n2、二", "一\n二"),
        (["bulleted", 2], "- 一\n- 二", "-一二"),
        (["contains", "猫", "狗"], "猫和狗", "猫"),
        (["without", "猫", "狗"], "鸟", "猫"),
        (["times", "月", 2], "月月", "月"),
        (["begins", "也许"], " 也许吧", "我也许"),
        (["ends", "完。"], "说完。\n", "完。吗"),
        (["json"], '```json\n{"name": "北京"}\n```', "{name: 北京}"),
        (["quoted"], "“好”", "好"),
        (["chinese"], "光合作用，2 次", "photosynthesis 是光合作用"),
        (["english"], "It is big.", "It is 大"),
        (["no_digits"], "三点", "3点"),
        (["title"], "《春》\n花", "春\n花"),
        (["max_words", 3], "It's well-known — really.", "one two three four"),
        (["min_words", 3], "one two - three", "one — two"),
        (["sentences", 2], "Dr. Li ran 3.5 km. She won.", "Dr. Li ran 3.5 km, and won."),
        (["numbered", 2], "1) a\n2. b", "1.5 km\n2. b"),
        (["bulleted", 1], "* a", "**a**"),
        (["paragraphs", 2], "a\nb\n\nc\n", "a\nb"),
        (["comma_separated", 3], "red, dark green, blue.", "red, green and blue"),
        (["comma_separated", 2], "red, blue", "I like the colour red, blue"),
        (["contains", "fire", "ice"], "Fire and ice!", "The fireman likes ice"),
        (["without", "the", ","], "Other people gathered.", "At The end"),
        (["without", ","], "a; b", "a, b"),
        (["times", "rain", 2], "Rain, rain.", "Rain, rainy."),
        (["begins", "Dear customer"], " dear Customer, hello", "Hello, dear customer"),
        (["ends", "love"], "with all my love.", "with all my glove box"),
        (["ends", "?"], "Are you well? ", "Are you? Well."),
        (["one_of", "yes", "no"], "Yes.", "Yes, it is."),
        (["acrostic", "CAT"], "Cold\n\n*all\nTo", "Cold\nall"),
        (["heading"], "# A\nb", "#A\nb"),
        (["lower"], "it's 5 o'clock", "It's five"),
        (["upper"], "WET FLOOR, 5 M!", "WET Floor"),
        (["json", "a", "b"], '{"b": 1, "a": [], "c": {}}', '{"a": 1}'),
        (["json", "a"], '{"a": 1}', '["a"]'),
        (["quoted"], '"Hello," he said, "and bye."', '"Hello," he said.'),
        (["english"], "It means friend.", "12"),
        (["no_digits"], "eight legs", "8 legs"),
    ],
)
def test_a_constraint_tells_obedience_from_the_lack_of_it(check, obeyed, not_obeyed):
    assert constraints.followed([check], obeyed) == [True]
    assert constraints.followed([check], not_obeyed) == [False]
    assert constraints.followed([check], " ") == [False]


# ---- from the Hub ----


def test_an_archive_from_the_hub_reads_like_the_folder_that_is_in_it(tmp_path, monkeypatch):
    import dataclasses
    import zipfile

    from aquila_sft import snapshot

    folder = tmp_path / "snapshot"
    folder.mkdir()
    with zipfile.ZipFile(folder / "ceval-exam.zip", "w") as archive:
        for file in sorted((OWN / "ceval/val").glob("*.csv")):
            archive.write(file, f"val/{file.name}")
    monkeypatch.setattr(snapshot, "fetch", lambda wanted: folder)
    benchmark, local = own_parts("ceval")
    killed = tmp_path / "cache/ceval--ceval-exam.partial/val"  # while it was unpacked
    killed.mkdir(parents=True)
    (killed / "logic_val.csv").write_text("id,question", "utf-8")
    again = items.read(dataclasses.replace(benchmark), "hub", tmp_path / "cache", None)
    assert [item for listed in again.values() for item in listed] == local
    assert not killed.exists()


def test_parquet_from_the_hub_with_all_subjects_in_one_file_reads_like_the_original_files(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    from aquila_sft import snapshot

    benchmark, local = own_parts("mmlu")
    rows = []
    for part, source in benchmark.parts.items():
        for _, record in items.records(OWN / "mmlu" / source.local[0], benchmark.columns):
            choices, answer = [record[letter] for letter in "ABCD"], "ABCD".index(record["answer"])
            subject = part.partition(":")[2]
            rows.append({"question": record["question"], "subject": subject, "choices": choices, "answer": answer})
    (tmp_path / "all/test").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all/test/0000.parquet")
    monkeypatch.setattr(snapshot, "fetch", lambda wanted: tmp_path)
    again = items.read(benchmark, "hub", tmp_path / "cache", None)
    assert [item for listed in again.values() for item in listed] == local


def test_items_are_written_for_another_harness_as_they_are_scored_here(tmp_path):
    from aquila_sft.evaluation import export

    listed = read_own("gsm8k")
    export.write(tmp_path / "gsm8k.gsm8k/validation.jsonl", listed)
    lines = items.json_lines(tmp_path / "gsm8k.gsm8k/validation.jsonl")
    assert [line["prompt"] for line in lines] == [item.prompt for item in listed]
    assert export.main(["only one"]) == 2
