"""A learnt vocabulary: the same from the same text, in the published form, within its bounds, measured honestly."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from tiny import SENTENCES, tiny_ranks, tiny_tokenizer, write_jsonl, write_ranks

from aquila_sft import bpe
from aquila_sft.config.data import Bpe
from aquila_sft.data import balance
from aquila_sft.data.documents import Document
from aquila_sft.errors import UserError
from aquila_sft.tokenizer import PATTERN, SPECIALS, from_backend, load_tokenizer, read_ranks, save_tokenizer

ROOT = Path(__file__).parents[1]
MINI = Bpe(vocab_size=1200, max_token_bytes=24, max_han_run=8, min_frequency=2)
ENGLISH = [s for s in SENTENCES if s.isascii()]
CHINESE = [s for s in SENTENCES if not s.isascii()]


def some_documents(count: int, seed: int = 0, language: str | None = None) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(ENGLISH, k=rng.randint(2, 6)))
        if (language or ("en", "zh")[i % 2]) == "en"
        else "".join(rng.choices(CHINESE, k=rng.randint(2, 6)))
        for i in range(count)
    ]


def learn(texts: list[str], **settings):
    return bpe.learn(iter([texts]), dataclasses.replace(MINI, **settings))


def spelt(entry: str) -> bytes:
    from aquila_sft.tokenizer import byte_letters

    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    return bytes(byte_of[letter] for letter in entry)


def learnt_entries(backend) -> dict[bytes, int]:
    return {spelt(entry): number for entry, number in backend.get_vocab(with_added_tokens=False).items()}


@pytest.fixture(scope="module")
def backend():
    return learn(some_documents(1500))


# Which text


def shelves_of(**texts: list[str]) -> dict[str, balance.Shelf]:
    return balance.survey(Document(text, language, "s") for language, listed in texts.items() for text in listed)


def numbered(prefix: str, count: int, size: int = 100) -> list[str]:
    return [f"{prefix} {i} ".ljust(size, ".") for i in range(count)]


def drawn_bytes(max_bytes: int | None = None, **texts: list[str]) -> dict[str, int]:
    return {name: d.used_bytes for name, d in balance.choose(shelves_of(**texts), max_bytes).items()}


def test_chinese_and_english_get_equal_bytes_and_other_no_more():
    given = dict(zh=numbered("zh", 1000), en=numbered("en", 5000), other=numbered("o", 3000))
    used = drawn_bytes(**given)
    assert 95_000 <= used["zh"] <= 100_000  # all but what is held back
    assert used["zh"] == used["en"] == used["other"]
    few = drawn_bytes(**(given | {"other": numbered("o", 10)}))
    assert few == used | {"other": few["other"]} and few["other"] <= 1000


def test_one_language_alone_is_used_whole_and_by_catch_balances_nothing():
    assert drawn_bytes(en=numbered("en", 1000))["en"] >= 95_000
    assert drawn_bytes(other=numbered("o", 1000))["other"] >= 95_000
    used = drawn_bytes(en=numbered("en", 40), zh=numbered("zh", 1000))  # 4 %: an English page on a Chinese site
    assert used["zh"] >= 95_000 and used["en"] >= 3_500
    used = drawn_bytes(en=numbered("en", 100), zh=numbered("zh", 1000))
    assert abs(used["zh"] - used["en"]) <= 100 and used["en"] >= 9_000


@pytest.mark.parametrize("max_bytes", [3_000, 30_000, 150_000])
def test_max_bytes_is_the_total_and_balanced(max_bytes):
    used = drawn_bytes(max_bytes, zh=numbered("zh", 1000), en=numbered("en", 5000), other=numbered("o", 50))
    assert max_bytes - 300 <= sum(used.values()) <= max_bytes
    assert used["zh"] == used["en"] >= used["other"]


def test_what_is_drawn_is_a_matter_of_content_alone():
    texts = numbered("en", 1000)
    some = balance.choose(shelves_of(en=texts, zh=numbered("zh", 200)), None)
    assert some == balance.choose(shelves_of(zh=numbered("zh", 200), en=texts[::-1]), None)
    assert balance.choose(shelves_of(en=texts * 2), None)["en"].held_below > 0
    # Equal parts share their fate: nothing that is held back is also learnt from.
    drawn = balance.choose(shelves_of(en=["same"] * 50 + ["other"] * 50), 300)["en"]
    keys = [balance.content_hash(text.encode()) for text in ("same", "other")]
    assert sum(drawn.held_below <= key < drawn.used_below for key in keys) == 1


def test_the_front_of_a_shelf_is_bounded_and_sorted():
    shelf = shelves_of(en=numbered("en", 30, size=500_000))["en"]
    texts = shelf.texts(0, balance.HASHES, 10**9)
    assert len(texts) <= 2 + (balance.KEPT_BYTES + balance.HELD_BACK_BYTES) / balance.PART_CHARACTERS
    keys = [balance.content_hash(text.encode()) for text in texts]
    assert keys == sorted(shelf.hashes)[: len(keys)]


def test_parts_of_a_long_text_have_the_pieces_of_the_whole():
    from aquila_sft.tokenizer import pre_tokenizer

    rng = random.Random(0)
    words = [
        *ENGLISH[:5],
        *CHINESE[:5],
        "\n",
        "\n\n",
        "\r\n",
        "  \n  \n",
        "\n\t",
        "==\n",
        "'s",
        "12",
        " ",
        "\n　",
        "\n\u0301",
    ]
    text = "".join(rng.choice(words) for _ in range(10_000))
    parts = list(balance.parts_of(text))
    assert "".join(parts) == text and 1 < len(parts) and max(map(len, parts)) <= balance.PART_CHARACTERS
    cut = [piece for part in parts for piece, _ in pre_tokenizer().pre_tokenize_str(part)]
    assert cut == [piece for piece, _ in pre_tokenizer().pre_tokenize_str(text)]
    one_line = "字" * 100_000
    assert "".join(balance.parts_of(one_line)) == one_line


# The form


def test_specials_stand_behind_what_is_learnt_and_padding_is_the_last(backend):
    tokenizer = from_backend(backend, bos="<|extra_203|>", eos="<|extra_204|>", pad=bpe.PAD, max_length=8192)
    assert len(tokenizer) == 1200 == len(tokenizer.get_vocab())
    ids = tokenizer.convert_tokens_to_ids([*SPECIALS, "<|pad|>"])
    assert ids == list(range(1200 - 209, 1200))
    assert tokenizer.pad_token_id == 1199 and tokenizer.unk_token is None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1197, 1198)
    assert tokenizer.decode(range(1200 - 209, 1200), skip_special_tokens=True) == ""


def test_what_is_saved_has_the_published_pre_tokenizer(backend):
    saved = json.loads(backend.to_str())
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    assert saved["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": [split, spell]}
    assert saved["normalizer"] == {"type": "NFC"}
    assert saved["decoder"]["type"] == "ByteLevel" and saved["post_processor"] is None
    model = saved["model"]
    assert (model["unk_token"], model["byte_fallback"], model["dropout"]) == (None, False, None)


@pytest.mark.parametrize("limit", [4, 6, 9, 24])
def test_no_entry_is_longer_than_the_limit_which_is_reached(limit):
    words = ["internationalization", "中华人民共和国", "characteristically", "人工智能实验室"]
    texts = [" ".join(random.Random(i).choices(words, k=5)) + " 中华人民共和国" * 3 for i in range(200)]
    entries = learnt_entries(learn(texts, max_token_bytes=limit, vocab_size=2000))
    assert max(map(len, entries)) == min(limit, 22)  # 22: seven characters and the blank before them


def test_runs_of_han_are_cut_while_learning_and_marks_stay_with_their_word():
    def pieces(text: str, run: int) -> list[str]:
        spans = bpe.learning_pre_tokenizer(run).pre_tokenize_str(text)
        return [text[start:end] for _, (start, end) in spans]

    assert pieces("他说，一二三四五六七八九十。The end", 4) == [
        "他说",
        "，一二三四",
        "五六七八",
        "九十",
        "。The",
        " end",
    ]
    assert pieces("使用Python编程", 4) == ["使用Python编程"]
    assert pieces("一二三四五六七八", 4) == ["一二三四", "五六七八"]
    assert pieces("一二三四", 4) == ["一二三四"]
    assert [len(piece) for piece in pieces("ACGT" * 200 + "一二三四五" + " " * 300 + "x", 4)] == [
        *(256, 256, 256, 32 + 4, 1),
        *(256, 43, 2),
    ]
    assert max(map(len, pieces("".join(CHINESE) * 3, 3))) == 4  # a mark and three characters


@pytest.mark.parametrize("run", [1, 2, 3, 8])
def test_no_entry_holds_a_longer_run_of_han(run):
    texts = ["".join(CHINESE[:4]) for _ in range(50)]
    entries = learnt_entries(learn(texts, max_han_run=run, max_token_bytes=60, vocab_size=3000))
    texts = [e.decode(errors="ignore") for e in entries]
    assert max(sum("一" <= c <= "鿿" for c in text) for text in texts) == run


def test_merging_alone_gives_the_ids_and_so_does_tiktoken(backend):
    """What makes ignore_merges a matter of speed, and other programs agree: see the module's argument."""
    tiktoken = pytest.importorskip("tiktoken")
    from tokenizers import Tokenizer

    entries = learnt_entries(backend)
    state = json.loads(backend.to_str())
    assert state["model"]["ignore_merges"] is True
    assert len(state["model"]["merges"]) == len(entries) - 256  # no entry was learnt twice
    state["model"]["ignore_merges"] = False
    merging = Tokenizer.from_str(json.dumps(state))
    ranks = tiktoken.Encoding("learnt", pat_str=PATTERN, mergeable_ranks=entries, special_tokens={})
    whole = [e.decode() for e in entries if is_text(e)]
    texts = [*whole, *(a + b for a, b in zip(whole, whole[1:], strict=False)), *some_documents(300, seed=7)]
    ids = [encoding.ids for encoding in backend.encode_batch(texts)]
    assert ids == [encoding.ids for encoding in merging.encode_batch(texts)]
    assert ids == ranks.encode_ordinary_batch(texts)


def test_the_entries_can_be_written_as_a_rank_file(backend, tmp_path):
    """read_ranks demands of every entry that ranks below it merge to its two parts."""
    entries = learnt_entries(backend)
    write_ranks(tmp_path / "learnt.tiktoken", sorted(entries, key=entries.get))
    tokens, pairs = read_ranks(tmp_path / "learnt.tiktoken")
    assert len(tokens) == len(entries) and len(pairs) == len(entries) - 256


def is_text(entry: bytes) -> bool:
    try:
        return unicodedata.is_normalized("NFC", entry.decode())
    except UnicodeDecodeError:
        return False


def test_any_text_comes_back_after_nfc(backend):
    rng = random.Random(3)
    characters = [chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000]
    texts = [
        "a\r\nb\r\n\r\n \t c\n",
        "🙂 👩‍👩‍👧‍👦 🇨🇳 e\u0301 \u1100\u1161\u11a8 Å \u0000\u0007\ufffd\u2028",
        "a<|endoftext|>b<|im_start|>user\n<|im_end|><|pad|> <|extra_7|> <|extra_205|> <|IM_END|>",
        " leading,  double   triple . 12345 ，。 Ｆｕｌｌ",
        "哈" * 500 + "a" * 500 + " " * 500,
        *("".join(rng.choices(characters, k=60)) for _ in range(300)),
    ]
    # NFC first: marks younger than the library's tables are the residue that tokenizer.py documents.
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    for text in texts:
        assert backend.decode(backend.encode(text).ids, skip_special_tokens=False) == text
    assert backend.encode("x<|pad|>").ids[-1] == 1199


# Memory


def test_the_pieces_of_a_small_text_are_counted_exactly_and_those_of_a_large_one_estimated(monkeypatch):
    texts = list({text for text in some_documents(4000)})
    documents = [Document(text, "zh" if text[0] > "z" else "en", "s") for text in texts]
    shelves = balance.survey(documents)
    drawn = balance.choose(shelves, None)
    used = [
        text
        for document in documents
        for text in [document.text]
        if (d := drawn[document.language]).held_below <= balance.content_hash(text.encode()) < d.used_below
    ]
    pieces = bpe.learning_pre_tokenizer(8).pre_tokenize_str
    distinct = {piece for text in used for piece, _ in pieces(unicodedata.normalize("NFC", text))}
    exact = bpe.estimate(shelves, drawn, 8)
    assert (exact.number, exact.num_bytes) == (len(distinct), sum(map(len, distinct)))
    assert exact.text_bytes == sum(len(text.encode()) for text in used)
    monkeypatch.setattr(bpe, "KEPT_BYTES", exact.text_bytes // 8)
    estimated = bpe.estimate(shelves, drawn, 8)
    assert estimated.text_bytes == exact.text_bytes
    assert exact.number / 1.5 < estimated.number < exact.number * 1.5


def test_memory_is_refused_with_the_text_that_would_fit(monkeypatch):
    monkeypatch.setattr(bpe, "resident_bytes", lambda: 300_000_000)  # not what other tests left in this process
    pieces = bpe.Pieces(60_000_000, 1_000_000, 18_000_000, 0.85, 0.93)
    assert bpe.check(pieces, 8.0) == pytest.approx(pieces.memory(), abs=2e9)
    with pytest.raises(
        UserError, match=r"needs about 2\.\d+ GB .* than bpe.memory_gb=1 allows; bpe.max_bytes="
    ) as caught:
        bpe.check(pieces, 1.0)
    assert "\n" not in str(caught.value)
    fits = int(str(caught.value).split("bpe.max_bytes=")[1].split()[0])
    bpe.check(pieces.of(fits), 1.0)
    assert 5_000_000 < fits < 30_000_000
    with pytest.raises(UserError, match="bpe.memory_gb=0.02 allows; no smaller text would fit either"):
        bpe.check(pieces, 0.02)
    with pytest.raises(UserError, match="32 bits"):
        bpe.check(pieces.of(3e9), None)


def test_a_machine_that_is_too_small_is_named(monkeypatch):
    monkeypatch.setattr(bpe, "free_bytes", lambda: 200_000_000)
    with pytest.raises(UserError, match="GB that this machine has free; bpe.max_bytes="):
        bpe.check(bpe.Pieces(60_000_000, 1_000_000, 18_000_000, 0.85, 0.93), 8.0)


def test_free_memory_is_known_on_linux():
    if not sys.platform.startswith("linux"):
        pytest.skip("no /proc here")
    assert 2**20 < bpe.free_bytes() < 2**50 and 2**20 < bpe.resident_bytes() < 2**40


# The recipe


def train(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "recipe=tokenizer", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Two thousand documents, three in four of them English, with some records that are none."""
    folder = tmp_path_factory.mktemp("text")
    rows = [{"text": t} for t in some_documents(1500, language="en") + some_documents(500, language="zh")]
    write_jsonl(folder / "a.jsonl", [*rows, {"text": ""}, {"text": 3}])
    return folder / "a.jsonl"


@pytest.fixture(scope="module")
def learnt(text, tmp_path_factory) -> Path:
    """The run directory of a small vocabulary."""
    folder = tmp_path_factory.mktemp("run")
    done = train("scale=mini", f"data.files={text}", "bpe.vocab_size=1000", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "2 records left out for empty text: 1 (first" in done.stdout
    assert "1,000 entries, learnt in" in done.stdout and "bytes a token: en" in done.stdout
    return folder / "outputs/mini/tokenizer"


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_the_run_directory_tells_what_was_done(learnt, text):
    summary = read(learnt / "summary.json")
    assert (summary["status"], summary["entries"], summary["demo"]) == ("done", 1000, True)
    assert abs(summary["text_bytes"]["en"] - summary["text_bytes"]["zh"]) < 500
    assert summary["peak_memory_bytes"] > 2**20 and summary["estimated_memory_bytes"] > 2**20 and summary["seconds"] > 0
    ledger = read(learnt / "ledger.json")
    assert ledger["read"] == 2002 == ledger["kept"] + ledger["held_back"] + ledger["left_out"]
    reasons = {reason: about["records"] for reason, about in ledger["reasons"].items()}
    assert reasons["empty text"] == reasons["text that is not a string"] == 1
    assert 300 < next(count for reason, count in reasons.items() if reason.startswith("not drawn")) < 1500
    for language in ("en", "zh"):
        assert ledger["by_language"][language]["used_bytes"] == summary["text_bytes"][language]
    total = sum(len(row["text"].encode()) for row in map(json.loads, text.open()) if isinstance(row["text"], str))
    assert sum(ledger[f"{key}_bytes"] for key in ("used", "held_back", "not_drawn")) == total
    assert ledger["by_source"]["text"]["used_bytes"] == ledger["used_bytes"]


def test_bytes_a_token_are_those_of_text_that_was_held_back(learnt, text):
    summary, tokenizer = read(learnt / "summary.json"), load_tokenizer(learnt / "final")
    assert summary["bytes_per_token_on"] == {"en": "held back", "zh": "held back"}
    rows = [row["text"] for row in map(json.loads, text.open()) if isinstance(row["text"], str) and row["text"]]
    for language in ("en", "zh"):
        mine = [row for row in rows if row.isascii() == (language == "en")]
        limit = balance.HELD_BACK_SHARE * balance.HASHES
        held = [row for row in mine if balance.content_hash(row.encode()) < limit]
        assert 0 < len(held) < len(mine) / 10
        tokens = sum(len(tokenizer(row)["input_ids"]) for row in held)
        assert summary["bytes_per_token"][language] == round(sum(len(row.encode()) for row in held) / tokens, 4)


def test_other_order_names_and_threads_give_the_same_bytes(learnt, text, tmp_path):
    lines = text.read_text("utf-8").splitlines(keepends=True)
    random.Random(5).shuffle(lines)
    (tmp_path / "one.jsonl").write_text("".join(lines[:700]), encoding="utf-8")
    (tmp_path / "two.jsonl").write_text("".join(lines[700:]), encoding="utf-8")
    files = "data.files={b: two.jsonl, a: one.jsonl}"
    done = train("scale=mini", files, "bpe.vocab_size=1000", "seed=7", cwd=tmp_path, TOKENIZERS_PARALLELISM="false")
    assert done.returncode == 0, done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        there = tmp_path / "outputs/mini/tokenizer/final" / name
        assert there.read_bytes() == (learnt / "final" / name).read_bytes()


def test_a_finished_run_is_reused_and_another_one_refused(learnt, text):
    folder, before = learnt.parents[2], (learnt / "final/tokenizer.json").stat().st_mtime_ns
    same = ("scale=mini", f"data.files={text}", "bpe.vocab_size=1000")
    for more in ((), ("bpe.memory_gb=7", "seed=3")):  # nothing that can change the vocabulary
        done = train(*same, *more, cwd=folder)
        assert done.returncode == 0 and "reused, nothing done" in done.stdout
    done = train("scale=mini", f"data.files={text}", "bpe.vocab_size=1001", cwd=folder)
    assert done.returncode == 2 and "bpe.vocab_size" in done.stderr and "overwrite=true" in done.stderr
    assert (learnt / "final/tokenizer.json").stat().st_mtime_ns == before


def test_a_killed_run_begins_again_and_ends_with_the_same_bytes(learnt, text, tmp_path):
    words = ("scale=mini", f"data.files={text}", "bpe.vocab_size=1000")
    for how, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 3)):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "recipe=tokenizer", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while line := process.stdout.readline():
            if "learning 1,000 entries" in line:
                break
        process.send_signal(how)
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode == status
        assert not (tmp_path / "outputs/mini/tokenizer/final").exists()
    done = train(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "outputs/mini/tokenizer"
    assert (again / "final/tokenizer.json").read_bytes() == (learnt / "final/tokenizer.json").read_bytes()
    assert not list(again.glob(".writing*"))


@pytest.mark.parametrize(
    "words, parts",
    [
        (["bpe.vocab_size=465"], ["bpe.vocab_size=465 is too small", "use 466 or more"]),
        (["bpe.memory_gb=0.01"], ["bpe.memory_gb=0.01 allows"]),
        (["tokenizer.ranks=x.tiktoken"], ["data.files=", "tokenizer.ranks=x.tiktoken", "keep one"]),
        (["data.text_column=body"], ["data.text_column=body"]),
    ],
)
def test_what_cannot_be_is_answered_in_one_line(words, parts, text, tmp_path):
    done = train("scale=mini", f"data.files={text}", *words, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert not list(tmp_path.rglob("final"))


def test_memory_is_refused_before_anything_is_learnt_and_the_earlier_run_stays(text, tmp_path, monkeypatch):
    words = ("scale=mini", f"data.files={text}", "bpe.vocab_size=600")
    assert train(*words, cwd=tmp_path).returncode == 0
    final = tmp_path / "outputs/mini/tokenizer/final/tokenizer.json"
    before = final.read_bytes()
    done = train(*words, "bpe.vocab_size=700", "bpe.memory_gb=0.01", "overwrite=true", cwd=tmp_path)
    assert done.returncode == 2  # vocab_size twice: Hydra's own slip, said in one line
    done = train(*words[:2], "bpe.vocab_size=700", "bpe.memory_gb=0.01", "overwrite=true", cwd=tmp_path)
    assert done.returncode == 2 and "memory" in done.stderr and "learning" not in done.stdout
    assert final.read_bytes() == before


def test_too_little_text_is_said_and_nothing_is_padded(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one small text"}, {"text": "一点点文字"}])
    code = (
        f"import sys, runpy; sys.argv = ['train.py', 'recipe=tokenizer', 'scale=mini', 'data.files=a.jsonl']\n"
        f"try: runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fewer than bpe.vocab_size=" in done.stdout
    summary = read(tmp_path / "outputs/mini/tokenizer/summary.json")
    tokenizer = load_tokenizer(tmp_path / "outputs/mini/tokenizer/final")
    assert 465 <= summary["entries"] == len(tokenizer) < 500
    assert summary["bytes_per_token_on"] == {"en": "learnt from", "zh": "learnt from"}
    assert tokenizer.pad_token_id == len(tokenizer) - 1


def test_no_text_at_all_is_one_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": " "}, {"text": None}])
    done = train("scale=mini", "data.files=a.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "no text to learn from" in done.stderr and "Traceback" not in done.stderr
    assert read(tmp_path / "outputs/mini/tokenizer/ledger.json")["left_out"] == 2


def test_a_rank_file_is_converted_whatever_the_text_settings_are(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tiny")
    write_ranks(tmp_path / "qwen.tiktoken", tiny_ranks(tokenizer))
    for more, says in (((), "not the published vocabulary"), (("bpe.vocab_size=900",), "reused, nothing done")):
        done = train("tokenizer=aquila", "tokenizer.ranks=qwen.tiktoken", *more, cwd=tmp_path)
        assert done.returncode == 0 and says in done.stdout, done.stderr
    out = tmp_path / "outputs/mini/tokenizer"
    converted = load_tokenizer(out / "final")
    assert read(out / "summary.json")["entries"] == len(converted) == len(tiny_ranks(tokenizer)) + 208
    assert converted.pad_token == converted.unk_token == "<|endoftext|>"
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".lock")) == [
        *("config.yaml", "env.json", "final", "identity.json", "summary.json")
    ]


# Who uses it

CHAT = [
    {"role": "user", "content": "你好 🙂"},
    {"role": "assistant", "content": "\n\n Hello <|im_end|> e\u0301."},
    {"role": "user", "content": " 1 + 1 = ?"},
    {"role": "assistant", "content": "2"},
]


def test_the_chat_template_is_that_of_the_settings_and_targets_are_the_answers(learnt):
    from aquila_sft.chat_template import DEFAULT_SYSTEM, encode_messages

    tokenizer = load_tokenizer(learnt / "final")
    ids, is_target = encode_messages(tokenizer, CHAT)
    assert tokenizer.decode(ids).startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\n你好")
    answers = tokenizer.decode([i for i, target in zip(ids, is_target, strict=True) if target])
    assert answers == "\n\n Hello <|im_end|> \u00e9.<|im_end|>2<|im_end|>"
    plain = [m | {"content": m["content"].replace("<|im_end|>", "")} for m in CHAT]
    theirs = tokenizer.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode_messages(tokenizer, plain)
    assert ours == (theirs["input_ids"], [bool(x) for x in theirs["assistant_masks"]])
    assert tokenizer.pad_token_id not in ids


IN_4_57 = """
import json, sys, transformers
from transformers import AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
given = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(given["folder"])
print(json.dumps({
    "ids": [tokenizer(text)["input_ids"] for text in given["texts"]],
    "chat": tokenizer.apply_chat_template(given["chat"]),
    "padded": tokenizer(given["texts"], padding=True)["input_ids"],
    "named": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id,
              len(tokenizer)],
}))
"""


def test_transformers_5_and_4_57_load_it_alike(learnt, tmp_path):
    tokenizer = load_tokenizer(learnt / "final")
    save_tokenizer(tokenizer, tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (learnt / "final/tokenizer.json").read_bytes()
    site = os.environ.get("AQUILA_TRANSFORMERS_4_57")
    if not site:
        pytest.skip("AQUILA_TRANSFORMERS_4_57 does not name a folder with transformers 4.57")
    texts = [*some_documents(20, seed=9), "a\r\n🙂 <|im_end|>"]
    ran = subprocess.run(
        [sys.executable, "-c", IN_4_57],
        input=json.dumps({"folder": str(learnt / "final"), "texts": texts, "chat": CHAT}),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": site, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    theirs = json.loads(ran.stdout)
    assert theirs["ids"] == [tokenizer(text)["input_ids"] for text in texts]
    assert theirs["chat"] == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert theirs["padded"] == tokenizer(texts, padding=True)["input_ids"]
    assert theirs["named"] == [997, 998, 999, None, 1000]


# Real text


@pytest.mark.real_data
@pytest.mark.slow
def test_fifteen_megabytes_of_real_text_take_the_memory_that_was_estimated(tmp_path):
    """60 MB take 2.1 GB: recipes/RESULTS.md. The peak is that of the process, as it and as the system report it."""
    folder = os.environ.get("AQUILA_REAL_DATA")
    if not folder:
        pytest.skip("AQUILA_REAL_DATA does not name a data folder")
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "recipe=tokenizer", "scale=135m"]
        + [f"data.files={folder}/raw_*/docs.jsonl", "bpe.memory_gb=2", "bpe.max_bytes=15000000"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    summary = read(tmp_path / "outputs/135m/tokenizer/summary.json")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{time.monotonic() - began:.0f} s, {peak / 1e9:.2f} GB, {summary}")
    assert peak < 1e9
    assert peak / 1.5 < summary["estimated_memory_bytes"] < peak * 1.5
    assert summary["peak_memory_bytes"] == pytest.approx(peak, rel=0.02)
    assert summary["entries"] == 49152
    assert abs(summary["text_bytes"]["en"] / summary["text_bytes"]["zh"] - 1) < 0.01
    assert sum(summary["text_bytes"].values()) == pytest.approx(15e6, rel=0.01)
    assert summary["bytes_per_token"]["en"] > 3.9 and summary["bytes_per_token"]["zh"] > 4.0
