"""Benchmark items in documents: found when they are there, in both languages, and not where they are not."""

import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from test_duplicates import invented

from aquila_sft.data import decontaminate
from aquila_sft.data.decontaminate import Index, Item
from aquila_sft.data.units import unit_hashes
from aquila_sft.errors import UserError

# One item in the form in which each benchmark of recipe=eval is published.
FORMS = {
    "arc.jsonl": '{"id": "1", "question": {"stem": "Which Q of these?", "choices": [{"text": "one", "label": "A"}]}}',
    "hellaswag.jsonl": '{"ind": 0, "activity_label": "Canoeing", "ctx": "A man Q ", "endings": ["falls.", "swims."]}',
    "piqa.jsonl": '{"goal": "Q", "sol1": "with a spoon", "sol2": "with a fork"}',
    "siqa.jsonl": '{"context": "Q", "question": "Why?", "answerA": "for fun", "answerB": "no idea", "label": "1"}',
    "winogrande.jsonl": '{"sentence": "Q because _ was late.", "option1": "Ann", "option2": "Eve", "answer": "2"}',
    "triviaqa.jsonl": '{"Question": "Q", "Answer": {"Value": "Onion", "Aliases": ["Onions"]}}',
    "gsm8k.jsonl": '{"question": "Q", "answer": "She has 3 + 4 = 7.\\n#### 7"}',
    "agieval.jsonl": '{"passage": null, "question": "Q", "options": ["(A)一", "(B)二"], "label": "A", "answer": null}',
    "ceval.csv": "id,question,A,B,C,D,answer,explanation\n0,Q,甲方,乙方,丙方,丁方,C,\n",
    "cmmlu.csv": ",Question,A,B,C,D,Answer\n0,Q,甲方,乙方,丙方,丁方,C\n",
    "mmlu.csv": 'Q,"yes, it is",no,maybe,never,A\n',
    "infinity.json": '[{"question": "Q", "answer": "yes"}]',
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_of_benchmark_is_read(tmp_path, name, packed):
    (tmp_path / "some").mkdir()
    asked = "这里有一个很长的问题，长得足够被找到？"
    content = FORMS[name].replace("Q ", f"{asked} ").replace('"Q"', f'"{asked}"').replace("Q,", f"{asked},").encode()
    if packed and not name.endswith(".json"):
        (tmp_path / f"some/{name}.gz").write_bytes(gzip.compress(content))
    else:
        (tmp_path / f"some/{name}").write_bytes(content)
    (tmp_path / "some/LICENSE.txt").write_text("not an item")
    (item,) = decontaminate.read(tmp_path)
    assert item.benchmark == "some" and asked in item.question and item.answers
    assert not {"A", "B", "1", "2", "C"} & set(item.answers)
    index = Index([item], 13, 13)
    assert index.figures == {"some": {"items": 1, "too_short": 0}}
    answer = item.answers[-1]
    document = f"考试题：\n1、{item.question.replace('_', answer)}\nA. {item.answers[0]}\n以上。" * 2
    assert index(unit_hashes(document)) == "some"
    assert index(unit_hashes("这里有一个很长的文章，里面没有问题。" * 3)) is None


def test_our_own_instructions_are_looked_for_like_any_benchmark(tmp_path):
    """Those of nothing but ordinary words are too short, and counted."""
    for name in ("instruct_zh", "instruct_en"):
        shutil.copy(Path(__file__).parents[1] / f"data/{name}.jsonl", tmp_path)
    items = decontaminate.read(tmp_path)
    index = Index(items, 13, 13)
    assert {name: figures["items"] for name, figures in index.figures.items()} == {
        "instruct_en": 110,
        "instruct_zh": 109,
    }
    for item in items:
        found = index(unit_hashes(f"Here we go: {item.question}"))
        assert found == item.benchmark or not decontaminate.texts_of(item, 13, alone=True)
    assert all(figures["too_short"] < 0.3 * figures["items"] for figures in index.figures.values())


def test_a_folder_that_is_no_set_of_benchmarks_is_named(tmp_path):
    for folder, said in ((tmp_path / "no", "no such folder"), (tmp_path, "holds no files of")):
        with pytest.raises(UserError, match=said):
            decontaminate.read(folder)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="a.jsonl: no item of a benchmark is recognized"):
        decontaminate.read(tmp_path)


def test_links_are_followed_once_around_and_one_to_nothing_is_named(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_text(json.dumps({"question": "Why is it so?"}))
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, target in (("linked", "../elsewhere"), ("b.jsonl", "../elsewhere/a.jsonl"), ("round", "../benchmarks")):
        (folder / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert [item.benchmark for item in decontaminate.read(folder)] == ["b", "linked"]
    (folder / "gone").symlink_to("../nowhere")
    with pytest.raises(UserError, match="gone cannot be read: .*No such file"):
        decontaminate.read(folder)


def test_an_item_is_found_whatever_its_signs_width_case_and_layout():
    item = Item("b", "Which gas do plants take in when they turn sunlight into sugar, and what do they release?", ())
    index = Index([item], 13, 13)
    for text in (
        item.question,
        f"Quiz!\n(3) {item.question.upper()} (A) oxygen",
        item.question.replace(" ", "\n  ").replace(",", " --"),
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in item.question),
    ):
        assert index(unit_hashes(f"before. {text} after")) == "b"
    assert index(unit_hashes("Plants take in a gas when they turn sunlight into sugar, and release another.")) is None


def test_a_question_that_several_items_share_is_looked_for_with_its_answers():
    asked = "Which of the following statements about the structure of the atom is correct?"
    items = [
        Item("b", asked, ("Protons are negative", "It has a nucleus")),
        Item("b", asked, ("Electrons weigh most",)),
    ]
    index = Index(items, 13, 13)
    assert index(unit_hashes(f"{asked} Discuss in groups of three, and write down what you find.")) is None
    assert index(unit_hashes(f"{asked}\nA. Electrons weigh most\nB. none")) == "b"


def test_half_of_an_item_has_to_be_there():
    words = [f"word{i}" for i in range(100)]
    index = Index([Item("b", " ".join(words), ())], 13, 13)
    grams = len(words) - 12
    assert index(unit_hashes(" ".join(words[: 12 + grams // 2]))) == "b"
    assert index(unit_hashes(" ".join(words[: 11 + grams // 2]))) is None


def test_what_is_too_short_to_be_found_is_counted():
    index = Index(
        [Item("a", "Why?", ("yes", "no")), Item("a", "为什么？", ()), Item("b", "one two three " * 5, ())], 13, 13
    )
    assert index.figures == {"a": {"items": 2, "too_short": 2}, "b": {"items": 1, "too_short": 0}}


def test_a_saved_index_finds_the_same(tmp_path):
    index = Index(BUNDLED, 13, 13)
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    documents, _ = planted(invented(60), BUNDLED, 20, seed=1)
    assert [again(unit_hashes(d)) for d in documents] == [index(unit_hashes(d)) for d in documents]
    assert again.figures == index.figures


def bundled() -> list[Item]:
    """Invented items in both languages."""
    rng = random.Random(5)
    names, things = ["Alma", "Ben", "Chen", "Dora", "Emil"], ["apples", "stamps", "shells", "coins", "books"]
    items = []
    for i in range(150):
        a, b, c = rng.sample(names, 3)
        x, y = rng.sample(things, 2)
        items.append(
            Item(
                "en", f"{a} has {i} {x} and gives {b} {i % 7} of them for {y}; how many {x} does {a} keep, {c}?", ("9",)
            )
        )
        items.append(
            Item(
                "zh",
                f"第{i}题：{a}有{i}个苹果，送给{b}{i % 7}个，又买了{i % 11}本书，请问{c}最后还剩下多少？",
                ("九个", "十个"),
            )
        )
    return items


BUNDLED = bundled()


def planted(texts: list[str], items: list[Item], count: int, seed: int) -> tuple[list[str], set[int]]:
    """Texts, and in some of them an item; the places of those."""
    rng = random.Random(seed)
    out, places = list(texts), set(rng.sample(range(len(texts)), count))
    for place, item in zip(sorted(places), rng.sample(items, count), strict=True):
        lines = out[place].split("\n")
        letters = [f"{letter}. {answer}" for letter, answer in zip("ABCDE", item.answers, strict=False)]
        asked = decontaminate.BLANK.sub("____", item.question)
        at = rng.randrange(len(lines) + 1)
        lines[at:at] = [rng.choice(["Question: ", "", "1. ", "题目："]) + asked, *letters]
        out[place] = "\n".join(lines)
    return out, places


def shares(index: Index, documents: list[str], places: set[int]) -> tuple[float, float]:
    """Recall, precision."""
    found = {i for i, document in enumerate(documents) if index(unit_hashes(document))}
    return len(found & places) / len(places), len(found & places) / max(1, len(found))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_items_are_found_and_nothing_else(language):
    items = [item for item in BUNDLED if item.benchmark == language]
    documents, places = planted(invented(600), items, 100, seed=2)
    recall, precision = shares(Index(items, 13, 13), documents, places)
    assert recall >= 0.99 and precision >= 0.99


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    "sets, text",
    [
        (("eval_arc_easy", "eval_hellaswag", "eval_piqa", "eval_gsm8k", "eval_openbookqa"), "raw_en_pydocs"),
        (("eval_siqa", "eval_winogrande", "eval_triviaqa", "eval_commonsenseqa"), "raw_en_web_c4"),
        (("eval_ceval", "eval_cmmlu", "eval_agieval_zh"), "raw_zh_wiki"),
    ],
)
def test_items_of_real_benchmarks_planted_in_real_text_are_found_and_nothing_else(sets, text):
    if "AQUILA_REAL_DATA" not in os.environ:
        pytest.skip("AQUILA_REAL_DATA is not set")
    root = Path(os.environ["AQUILA_REAL_DATA"])
    rng = random.Random(0)
    found = [item for name in sets for item in rng.sample(decontaminate.read(root / name), 300)]
    index = Index(found, 13, 13)
    assert sum(f["too_short"] for f in index.figures.values()) < 0.1 * len(set(found))
    long_enough = [item for item in dict.fromkeys(found) if decontaminate.texts_of(item, 13, alone=False)]
    lines = (root / text / "docs.jsonl").read_text("utf-8").split("\n")
    documents = [json.loads(line)["text"] for line in lines if line]
    documents, places = planted(documents, long_enough, 200, seed=3)
    recall, precision = shares(index, documents, places)
    assert recall >= 0.99 and precision >= 0.99, (recall, precision)
