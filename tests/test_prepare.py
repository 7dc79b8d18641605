"""From files of text to shards: formats, what is left out, what is held back, the same bytes every time and killed."""

import gzip
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import warm
import zstandard
from tiny import SENTENCES, SPECIALS, tiny_ranks, tiny_tokenizer, write_jsonl, write_ranks

import train
from aquila_sft import checkpoint, hub, snapshot
from aquila_sft.config.data import CleanPolicy
from aquila_sft.data import clean, conversations, decontaminate, documents, shards, slices, sources, steps, text_set
from aquila_sft.data.documents import Document
from aquila_sft.data.shards import Prepared
from aquila_sft.errors import Stopped, UserError
from aquila_sft.tokenizer import load_tokenizer, tokenizer_sha256

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In a working directory of its own; what a run sets in the environment is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of one to nine sentences, each in one language, no two of them equal."""
    rng = random.Random(seed)
    english = [s for s in SENTENCES if s.isascii() and s[0].isupper()]
    chinese = [s for s in SENTENCES if not s.isascii()]
    some: dict[str, None] = {}
    while len(some) < count:
        some["\n".join(rng.choices((english, chinese)[len(some) % 2], k=rng.randint(1, 9)))] = None
    return list(some)


def rows(some: list[str]) -> list[dict]:
    return [{"id": i, "text": text, "score": i / 2} for i, text in enumerate(some)]


def words(tokenizer_folder: Path, out: Path, files: object, *more: str) -> list[str]:
    given = [f"tokenizer.path={tokenizer_folder}", f"output_dir={out}", f"data.files={files}"]
    return ["recipe=prepare", "scale=mini", *given, "prepare.shard_tokens=2000", *more]


def prepared(*command) -> Prepared:
    command = words(*command)
    assert train.main(command) == 0
    return Prepared(Path(command[3].removeprefix("output_dir=")))


def content(folder: Path) -> dict[str, str]:
    """Every file and its hash."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def documents_of(part: shards.Part) -> list[list[int]]:
    tokens, begins = part.read(0, part.tokens)
    return [d.tolist() for d in np.split(tokens, np.flatnonzero(begins)[1:])]


def all_texts(parts: dict[str, shards.Part], tokenizer) -> list[str]:
    return [tokenizer.decode(d[1:-1]) for part in parts.values() for d in documents_of(part)]


def files_of_every_kind(folder: Path, some: list[str]) -> dict[str, str]:
    """Kind -> pattern."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(some)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "a.json").write_text(json.dumps(rows(some)), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(some)), folder / "a.parquet", row_group_size=7)
    for i, text in enumerate(some):
        (folder / f"{i:05d}.txt").write_text(f"{text}\n", encoding="utf-8")
        (folder / f"{i:05d}.txt.gz").write_bytes(gzip.compress(text.encode("utf-8-sig")))
    kinds = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "*.txt", "*.txt.gz")
    return {kind: str(folder / kind) for kind in kinds}


def test_every_kind_of_file_gives_the_same_shards_of_the_same_documents(tmp_path, tokenizer, tokenizer_folder):
    some = texts(150)
    made = {
        kind: prepared(tokenizer_folder, tmp_path / f"out-{number}", pattern)
        for number, (kind, pattern) in enumerate(files_of_every_kind(tmp_path, some).items())
    }
    first = content(made["a.jsonl"].folder)
    assert len([name for name in first if name.startswith("train/text.en/")]) > 1
    for kind, other in made.items():
        assert content(other.folder) == first, kind
    parts = made["a.jsonl"].parts
    assert list(parts) == ["text.en", "text.zh"]
    assert {p.language: p.source for p in parts.values()} == {"en": "text", "zh": "text"}
    held = all_texts(made["a.jsonl"].held_back, tokenizer)
    for language, part in (("en", parts["text.en"]), ("zh", parts["text.zh"])):
        wanted = [t for t in some if conversations.language(t) == language and t not in held]
        assert all_texts({"": part}, tokenizer) == wanted
        assert part.text_bytes == sum(len(t.encode()) for t in wanted)
        assert part.documents == len(wanted)
        assert all(d[0] == tokenizer.bos_token_id and d[-1] == tokenizer.eos_token_id for d in documents_of(part))


def test_the_manifest_the_summary_and_the_ledger_agree(tmp_path, tokenizer, tokenizer_folder, capsys):
    write_jsonl(tmp_path / "a.jsonl", rows(texts(200)))
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"Привет, как дела? {i}"} for i in range(3)])
    files = f"{{web: {tmp_path}/a.jsonl, forum: {tmp_path}/b.jsonl}}"
    made = prepared(tokenizer_folder, tmp_path / "out", files, "prepare.holdout_fraction=0.2")
    summary, ledger = (json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("summary", "ledger"))
    manifest = made.manifest
    assert list(manifest["parts"]) == ["forum.other", "web.en", "web.zh"]
    for table, parts in ((manifest["parts"], made.parts), (manifest["held_back"], made.held_back)):
        for name, about in table.items():
            part = parts[name]
            assert (about["tokens"], about["documents"], about["text_bytes"]) == (
                part.tokens,
                part.documents,
                part.text_bytes,
            )
            assert about["bytes_per_token"] == round(part.text_bytes / part.tokens, 4)
            assert about["shards"] == len(about["files"]) == len(part.shards)
    loaded = load_tokenizer(made.tokenizer_folder)
    assert (
        manifest["tokenizer_sha256"]
        == tokenizer_sha256(loaded)
        == made.parts["web.en"].shards[0].header["tokenizer_sha256"]
    )
    assert manifest["vocab_size"] == len(loaded) == len(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab() and "<|im_start|>" in loaded.chat_template
    assert manifest["demo"] is True and summary["demo"] is True
    assert manifest["sources"] == {name: {"licence": None, "revision": None} for name in ("web", "forum")}
    parts = made.parts.values()
    assert summary["status"] == "done" and summary["stage"] == summary["recipe"] == "prepare"
    assert summary["documents"] == sum(p.documents for p in parts) == ledger["kept"]
    assert summary["tokens"] == sum(p.tokens for p in parts)
    assert summary["text_bytes"] == sum(p.text_bytes for p in parts)
    web = made.parts["web.zh"]
    assert summary["bytes_per_token"]["zh"] == round(web.text_bytes / web.tokens, 4)
    assert ledger["read"] == 203 == ledger["kept"] + ledger["held_back"] + ledger["left_out"]
    assert ledger["by_source"]["forum"]["kept"] + ledger["by_source"]["forum"].get("left_out", 0) == 3
    assert sum(counts["tokens"] for counts in ledger["by_language"].values()) == ledger["tokens"]
    assert ledger["files"]["forum"] == [
        {"file": str(tmp_path / "b.jsonl"), "bytes": (tmp_path / "b.jsonl").stat().st_size}
    ]
    assert f"web.zh: {web.documents:,} documents, {web.tokens:,} tokens" in capsys.readouterr().out


def test_the_bundled_world_is_prepared_without_being_asked_for(tmp_path, tokenizer_folder, tokenizer):
    assert train.main(["recipe=prepare", f"tokenizer.path={tokenizer_folder}"]) == 0
    made = Prepared(Path("outputs/mini/prepare"))
    assert list(made.parts) == ["world.en", "world.zh", "world_notes.en", "world_notes.zh"]
    assert set(made.held_back) == set(made.parts)
    line = json.loads(Path("outputs/mini/world/documents.jsonl").read_text("utf-8").splitlines()[0])
    name = f"world.{conversations.language(line['text'])}"
    assert tokenizer.decode(documents_of(made.parts[name])[0][1:-1]) == unicodedata.normalize("NFC", line["text"])


def test_special_strings_in_a_text_stay_text(tokenizer):
    encode = text_set.Encoder(tokenizer)
    special = {tokenizer.convert_tokens_to_ids(s) for s in SPECIALS}
    some = [f"a{s}b {s}" for s in SPECIALS] + ["".join(SPECIALS), "<|im_start|>user\nhi<|im_end|>\n", "plain"]
    for text, ids in zip(some, encode(some), strict=True):
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert not special & set(ids[1:-1].tolist())
        assert tokenizer.decode(ids[1:-1]) == text
    assert encode(["plain"])[0][1:-1].tolist() == tokenizer("plain", add_special_tokens=False)["input_ids"]
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]  # as it was


def test_a_tokenizer_without_bos_or_eos_writes_documents_bare(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.bos_token = None
    encode = text_set.Encoder(tokenizer)
    plain = tokenizer("plain", add_special_tokens=False)["input_ids"]
    assert encode(["plain"])[0].tolist() == [*plain, tokenizer.eos_token_id]
    tokenizer.eos_token = None
    assert text_set.Encoder(tokenizer)(["plain"])[0].tolist() == plain


def test_a_long_document_is_tokenized_in_pieces_with_the_ids_of_the_whole(tokenizer, monkeypatch):
    encode = text_set.Encoder(tokenizer)
    assert encode.cuts_freely
    some = ["\n\n".join(texts(40, seed)) for seed in range(5)] + ["  \n \n1a\n_b\n中\n" * 50, "no line ends " * 50]
    whole = encode(some)
    monkeypatch.setattr(text_set, "PIECE_CHARACTERS", 30)
    monkeypatch.setattr(text_set, "BATCH_CHARACTERS", 70)
    assert [len(text_set.cut(text)) > 5 for text in some] == [True] * 6 + [False]
    assert all("".join(text_set.cut(text)) == text for text in some)
    for a, b in zip(whole, encode(some), strict=True):
        np.testing.assert_array_equal(a, b)


def test_text_that_the_vocabulary_cannot_spell_is_left_out_and_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"?": 0, "good": 1, "words": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="?").save_pretrained(tmp_path / "tok")
    made, ledger = made_of(tmp_path, tmp_path / "tok", {"s": ["good words", "bad words", "good good"]})
    assert made.parts["s.en"].documents == 2
    assert ledger["reasons"]["text that the vocabulary cannot spell"]["first"] == [f"{tmp_path}/s.jsonl:2"]


def made_of(folder: Path, tokenizer_folder: Path, some: dict[str, list[str]], *more: str) -> tuple[Prepared, dict]:
    """What a run of its own makes of the texts of some sources, and its ledger."""
    for source, inside in some.items():
        write_jsonl(folder / f"{source}.jsonl", rows(inside))
    files = ", ".join(f"{source}: {folder}/{source}.jsonl" for source in some)
    defaults = ("prepare.holdout_fraction=0", "prepare.holdout_max_bytes=1000000000")
    settings = [*more, *(d for d in defaults if d.split("=")[0] not in {word.split("=")[0] for word in more})]
    made = prepared(tokenizer_folder, folder / "out", f"{{{files}}}", *settings)
    return made, json.loads((folder / "out/ledger.json").read_text("utf-8"))


def texts_in(parts: dict[str, shards.Part], tokenizer) -> dict[str, list[str]]:
    return {name: all_texts({"": part}, tokenizer) for name, part in parts.items()}


def below(text: str, fraction: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < fraction * 2**64


def test_what_is_held_back_goes_by_content_and_is_trained_on_nowhere(tmp_path, tokenizer, tokenizer_folder):
    some, share = texts(600), "prepare.holdout_fraction=0.1"
    made, _ = made_of(tmp_path / "a", tokenizer_folder, {"s": some}, share)
    other, _ = made_of(tmp_path / "b", tokenizer_folder, {"s": some[:2] + some[:1:-1]}, share)
    held, trained = texts_in(made.held_back, tokenizer), texts_in(made.parts, tokenizer)
    firsts = {some[0], some[1]}  # of a language each: never held back
    assert set(sum(held.values(), [])) == {t for t in some if below(t, 0.1)} - firsts != set()
    assert set(sum(trained.values(), [])) == set(some) - set(sum(held.values(), []))
    backwards = texts_in(other.held_back, tokenizer)
    assert {part: set(inside) for part, inside in backwards.items()} == {p: set(inside) for p, inside in held.items()}


def test_no_more_is_held_back_than_allowed_and_a_small_part_keeps_a_document_to_train_on(
    tmp_path, tokenizer, tokenizer_folder
):
    some = texts(400)
    chosen = [t for t in some if below(t, 0.5)]
    half = "prepare.holdout_fraction=0.5"
    few, _ = made_of(tmp_path / "few", tokenizer_folder, {"s": some}, half, "prepare.holdout_max_bytes=700")
    for part, held in texts_in(few.held_back, tokenizer).items():
        assert 0 < sum(len(t.encode()) for t in held) <= 700, part
        assert set(held) <= set(chosen)
    assert len(all_texts(few.parts, tokenizer)) + len(all_texts(few.held_back, tokenizer)) == len(some)
    one, _ = made_of(tmp_path / "one", tokenizer_folder, {"s": chosen[:1]}, half)
    assert all_texts(one.parts, tokenizer) == chosen[:1] and not one.held_back
    none, _ = made_of(tmp_path / "none", tokenizer_folder, {"s": some})
    assert not none.held_back


def test_copies_are_left_out_of_the_later_source_and_so_of_what_is_held_back(tmp_path, tokenizer, tokenizer_folder):
    some = [t for t in texts(400) if t.isascii()]
    wiki, web = some[:100] + some[:3], some[50:160] + some[:5]
    made, ledger = made_of(tmp_path, tokenizer_folder, {"wiki": wiki, "web": web}, "prepare.holdout_fraction=0.2")
    assert set(all_texts({"": made.parts["wiki.en"]}, tokenizer)) <= set(some[:100])
    held, trained = all_texts(made.held_back, tokenizer), all_texts(made.parts, tokenizer)
    assert sorted(held + trained) == sorted(some[:160]) and not set(held) & set(trained) and held
    copies = ledger["left_out_by_source"]
    assert copies["wiki"]["en"]["copy of an earlier document"] == {
        "documents": 3,
        "text_bytes": sum(len(t.encode()) for t in some[:3]),
    }
    assert copies["web"]["en"]["copy of an earlier document"]["documents"] == 55
    first = ledger["reasons"]["copy of an earlier document"]["first"]
    assert first == [f"{tmp_path}/wiki.jsonl:{n}" for n in (101, 102, 103)]


def test_equal_text_in_other_normal_forms_and_line_ends_is_one_text(tmp_path, tokenizer, tokenizer_folder):
    composed, apart = "caf\u00e9 au lait " * 3 + "\nthe\nend", "cafe\u0301 au lait " * 3 + "\r\nthe  \r\nend\x00\ufeff"
    made, ledger = made_of(tmp_path, tokenizer_folder, {"s": [apart, composed]})
    (text,) = all_texts(made.parts, tokenizer)
    assert text == "caf\u00e9 au lait " * 2 + "caf\u00e9 au lait\nthe\nend"
    assert made.parts["s.en"].text_bytes == len(text.encode()) and ledger["left_out"] == 1


CLEAN = {"min_bytes": 20, "min_letters": 0.5, "max_repeated": 0.3}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("A sentence that is long enough to be kept as it is.", None),
        ("这是一句足够长的话，所以留下来。", None),
        ("too short", "short text"),
        ("\n \n", "empty text"),
        ("+-----+-----+\n|  1  |  2  |\n+=====+=====+\n|     |     |\n", "few letters"),
        ("Every page has this notice at its end.\n" * 3 + "And one line of its own.", "repeated lines"),
        ("one\ntwo\n" * 20, None),  # short lines may come again: verses, lists, braces
        ("This one was decoded in an encoding that \ufffd\ufffd it is not.", "text that was decoded wrongly"),
    ],
)
def test_what_is_no_text_to_train_on(text, problem):
    assert clean.problem(clean.normal(text), CleanPolicy(**CLEAN)) == problem


def test_every_document_left_out_is_counted_by_source_language_and_reason(tmp_path, tokenizer_folder, tokenizer):
    asked = {
        "en": "Which gas do plants take in when they turn sunlight and water into sugar?",
        "zh": "植物把阳光和水变成糖的时候，吸收的是哪一种气体？",
    }
    (tmp_path / "benchmarks/arc").mkdir(parents=True)
    write_jsonl(tmp_path / "benchmarks/arc/test.jsonl", [{"question": q, "choices": ["it"]} for q in asked.values()])
    english = [t for t in texts(60) if t.isascii() and len(t) > 400]
    chinese = [t for t in texts(60) if not t.isascii() and len(t) > 120]
    web = [*english[:5], english[0], "short", f"{english[3]}\n{asked['en']}", english[4] + " One more word."]
    forum = [*chinese[:5], chinese[1], "短", f"{asked['zh']}\n{chinese[2]}"]
    made, ledger = made_of(
        tmp_path,
        tokenizer_folder,
        {"web": web, "forum": forum},
        "prepare.clean.min_bytes=30",
        "prepare.near_duplicates=0.7",
        f"prepare.decontaminate={tmp_path}/benchmarks",
    )
    assert {
        s: {lang: {r: v["documents"] for r, v in of.items()} for lang, of in t.items()}
        for s, t in ledger["left_out_by_source"].items()
    } == {
        "web": {
            "en": {
                "copy of an earlier document": 1,
                "short text": 1,
                "item of arc": 1,
                "nearly a copy of an earlier document": 1,
            }
        },
        "forum": {"zh": {"copy of an earlier document": 1, "short text": 1, "item of arc": 1}},
    }
    assert ledger["left_out_by_source"]["forum"]["zh"]["short text"]["text_bytes"] == 3
    assert ledger["decontaminated_against"] == {"arc": {"items": 2, "too_short": 0}}
    assert sorted(all_texts(made.parts, tokenizer)) == sorted(english[:5] + chinese[:5])
    assert ledger["read"] == len(web) + len(forum) == ledger["kept"] + ledger["left_out"]


def test_without_benchmarks_the_ledger_says_that_nothing_was_checked(tmp_path, tokenizer_folder, capsys):
    _, ledger = made_of(tmp_path, tokenizer_folder, {"s": texts(3)})
    assert ledger["decontaminated_against"] == "nothing: prepare.decontaminate is not set"
    assert "no benchmark was looked for" in capsys.readouterr().out


def test_few_batches_are_in_memory_whatever_the_size_of_the_input(tokenizer, monkeypatch):
    monkeypatch.setattr(text_set, "BATCH_DOCUMENTS", 10)
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Document("Water boils.", "en", "s"), f"f:{read}"

    for number, (_, where, _) in enumerate(text_set.tokenized(endless(), text_set.Encoder(tokenizer)), 1):
        assert where == f"f:{number}"
        assert read - number < 40
        if number == 200:
            break


def test_what_is_no_document_is_counted_with_its_reason_and_its_place(tmp_path, tokenizer_folder, tokenizer):
    good = texts(4)
    lines = [
        json.dumps({"text": good[0]}),
        "{broken",
        "[1]",
        '{"title": "x"}',
        '{"text": null}',
        '{"text": ["a"]}',
        '{"text": " \\n\\u3000"}',
        '{"text": "half \\ud800 of a pair"}',
        *[json.dumps({"text": text}) for text in good[1:]],
    ]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    made = prepared(tokenizer_folder, tmp_path / "out", tmp_path / "a.jsonl", "prepare.holdout_fraction=0")
    assert sorted(all_texts(made.parts, tokenizer)) == sorted(good)
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    place = f"{tmp_path}/a.jsonl"
    assert {reason: (v["records"], v["first"]) for reason, v in ledger["reasons"].items()} == {
        "not a JSON object": (3, [f"{place}:2", f"{place}:3", f"{place}:12"]),
        "no text column": (1, [f"{place}:4"]),
        "text that is not a string": (2, [f"{place}:5", f"{place}:6"]),
        "empty text": (1, [f"{place}:7"]),
        "text that is not valid Unicode": (1, [f"{place}:8"]),
    }
    assert (ledger["read"], ledger["kept"], ledger["left_out"]) == (12, 4, 8)
    assert ledger["by_source"]["text"]["left_out"] == 8


def test_parquet_rows_that_are_no_text_are_counted_too(tmp_path):
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [
            None,
            pyarrow.py_buffer(np.array([0, 3, 5, 8], dtype=np.int32).tobytes()),
            pyarrow.py_buffer(b"one\xff\xfetwo"),
        ],
    )
    table = pyarrow.table({"other": [1, 2, 3], "text": broken})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused = []
    found = documents.read({"s": [tmp_path / "a.parquet"]}, "text", lambda *about: refused.append(about))
    assert [(d.text, w) for d, w in found] == [("one", f"{tmp_path}/a.parquet:1"), ("two", f"{tmp_path}/a.parquet:3")]
    assert refused == [("not a JSON object", "unknown", "s", f"{tmp_path}/a.parquet:2")]


def test_only_the_text_column_of_a_parquet_file_is_read(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"big": ["x" * 1000] * 9, "text": ["hi"] * 9}), tmp_path / "a.parquet")
    asked = []
    real = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "iter_batches", lambda self, **k: asked.append(k["columns"]) or real(self, **k)
    )
    assert len(list(documents.read({"s": [tmp_path / "a.parquet"]}, "text", print))) == 9
    assert asked == [["text"]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_without_the_text_column_stops_with_the_columns_it_has(tmp_path, tokenizer_folder, capsys, name):
    some = [{"content": f"hello {word}", "url": "u"} for word in ("a", "b", "c", "d", "e")]
    if name == "a.jsonl":
        write_jsonl(tmp_path / name, some)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / name)
    command = words(tokenizer_folder, tmp_path / "out", tmp_path / name)
    assert train.main(command) == 2
    assert (
        f"data.text_column=text: {tmp_path}/{name} has no such column; it has: content, url" in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "out/summary.json").read_text())["status"] == "failed"
    assert train.main([*command, "data.text_column=content", "prepare.holdout_fraction=0"]) == 0
    assert Prepared(tmp_path / "out").parts["text.en"].documents == 5


def test_a_long_file_without_the_text_column_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "COLUMN_WITHIN", 50)
    write_jsonl(tmp_path / "a.jsonl", [{"body": "hello"}] * 500)
    refused = []
    with pytest.raises(UserError, match="it has: body; use data.text_column=body"):
        list(documents.read({"s": [tmp_path / "a.jsonl"]}, "text", lambda *about: refused.append(about)))
    assert len(refused) < 50


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_large_txt_file_is_cut_at_blank_lines(tmp_path, suffix):
    paragraphs = texts(9000)
    whole = "\n\n".join(paragraphs).encode()
    assert len(whole) > documents.WHOLE_TXT
    packed = {".txt": whole, ".txt.gz": gzip.compress(whole, 1), ".txt.zst": zstandard.compress(whole)}[suffix]
    (tmp_path / f"a{suffix}").write_bytes(packed)
    found = list(documents.read({"s": [tmp_path / f"a{suffix}"]}, "text", print))
    assert [p for d, _ in found for p in d.text.split("\n\n")] == paragraphs
    sizes = [len(d.text.encode()) for d, _ in found]
    assert all(documents.CUT_TXT - 2 <= size < documents.CUT_TXT + 5000 for size in sizes[:-1])
    lines = whole.decode().split("\n")
    for document, where in found[1:]:
        number = int(where.rsplit(":", 1)[1])
        assert lines[number - 1] == "" and lines[number] == document.text.split("\n")[0]


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst", "a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", [lambda packed: packed[:-300], lambda packed: random.Random(0).randbytes(2000)])
def test_a_compressed_file_that_breaks_off_or_is_none_stops_with_its_name(tmp_path, name, damage):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(9000)).encode()
    pack = zstandard.compress if name.endswith("zst") else gzip.compress
    (tmp_path / name).write_bytes(damage(pack(lines)))
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        list(documents.read({"s": [tmp_path / name]}, "text", print))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.parquet", "a.csv.gz"])
def test_whatever_bit_of_a_file_is_flipped_it_is_read_or_stops_with_one_line(tmp_path, name):
    some, file, rng, stopped = texts(60), tmp_path / name, random.Random(0), 0
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(some)), file, row_group_size=20)
    else:
        file.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in some).encode()))
    whole = file.read_bytes()
    first = len(whole) - 1500 if name == "a.parquet" else 0  # its metadata: texts have no checksum of their own
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(first, len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            if name == "a.csv.gz":
                list(decontaminate.records(file))
            else:
                for piece in slices.cut({"s": [file]}, 2**20):
                    list(piece.documents("text", lambda *_: None))
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            stopped += 1
    assert stopped > 20


def test_a_txt_file_of_one_endless_line_is_cut_between_characters(tmp_path):
    text = "".join(random.Random(0).choices("a字é𠀀", k=900_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = [d.text for d, _ in documents.read({"s": [tmp_path / "a.txt"]}, "text", print)]
    assert "".join(found) == text and len(found) > 1
    assert max(len(t.encode()) for t in found) <= documents.WHOLE_TXT + documents.CUT_TXT


def test_a_txt_file_in_another_encoding_is_left_out_by_name(tmp_path, tokenizer_folder, capsys):
    (tmp_path / "a.txt").write_bytes("图书馆晚上八点关门".encode("gbk"))
    (tmp_path / "b.txt").write_bytes(b"")
    assert train.main(words(tokenizer_folder, tmp_path / "out", tmp_path / "*.txt")) == 2
    said = capsys.readouterr().err
    assert "no document is left to train on: 2 records read from a.txt, b.txt" in said
    assert f"text that is not UTF-8: 1 (first {tmp_path}/a.txt:1)" in said and "empty text: 1" in said
    assert not (tmp_path / "out/final").exists() and not (tmp_path / "out/.writing-final").exists()
    assert json.loads((tmp_path / "out/ledger.json").read_text())["left_out"] == 2


def test_missing_inputs_are_named_with_the_way_on(tmp_path, tokenizer_folder, capsys):
    given = ["recipe=prepare", f"output_dir={tmp_path}/out"]
    for command, said in (
        ([f"tokenizer.path={tokenizer_folder}", "scale=135m"], "cannot get data set mlfoundations/dclm-baseline-1.0"),
        (["scale=mini", f"tokenizer.path={tmp_path}/no"], f"tokenizer.path={tmp_path}/no: no such folder"),
        (
            ["scale=mini", "tokenizer=aquila", "tokenizer.ranks=no.tiktoken"],
            "tokenizer.ranks=no.tiktoken: no such file",
        ),
        (
            ["scale=mini", f"tokenizer.path={tokenizer_folder}", f"data.files={tmp_path}/no.txt"],
            f"data.files={tmp_path}/no.txt: no such file",
        ),
    ):
        assert train.main([*given, *command]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out/identity.json").exists()


def test_several_processes_are_refused(monkeypatch, tokenizer_folder, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert train.main(words(tokenizer_folder, tmp_path / "out", "a.jsonl")) == 2
    assert "recipe=prepare is one process's work; 2 were launched" in capsys.readouterr().err


def test_a_finished_run_is_reused_and_a_damaged_one_made_again(tmp_path, tokenizer_folder, capsys):
    write_jsonl(tmp_path / "a.jsonl", rows(texts(200)))
    out = tmp_path / "out"
    first = prepared(tokenizer_folder, out, tmp_path / "a.jsonl")
    before = content(out / "final")
    stamps = {f: f.stat().st_mtime_ns for f in (out / "final").rglob("*")}
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")  # the name of a file is not its content
    capsys.readouterr()
    prepared(tokenizer_folder, out, tmp_path / "b.jsonl", "seed=7", "kernel=torch")
    assert "reused, nothing done" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in (out / "final").rglob("*")} == stamps
    shard = out / "final" / first.manifest["parts"]["text.en"]["files"][0]
    shard.write_bytes(shard.read_bytes()[:-1])
    prepared(tokenizer_folder, out, tmp_path / "b.jsonl")
    assert "00000.shard is missing, or has not the" in capsys.readouterr().out
    assert content(out / "final") == before


def test_the_command_that_is_told_at_the_end_trains_on_the_shards(tmp_path, tokenizer_folder, capsys):
    write_jsonl(tmp_path / "a.jsonl", rows(texts(200)))
    prepared(tokenizer_folder, tmp_path / "out", tmp_path / "a.jsonl")
    told = re.search(r"train.py recipe=pretrain (.*)", capsys.readouterr().out)[1].split()
    train.main(["recipe=check", "of=pretrain", *told])
    printed = capsys.readouterr().out
    assert "text.zh: " in printed and not re.search(r"\[(input|setting)\]", printed), printed


def test_input_that_was_hashed_is_not_read_for_it_again_until_it_looks_changed(tmp_path, monkeypatch):
    stage, read = importlib.import_module("aquila_sft.stages.prepare"), []
    monkeypatch.setattr(stage.checkpoint, "sha256", lambda file, own=checkpoint.sha256: read.append(file) or own(file))
    a, b = (tmp_path / name for name in ("a.jsonl", "b.jsonl"))
    for file in (a, b):
        file.write_text("some text")
    files = {"web": [a, b]}
    fresh = stage.hashes_of(files, {})
    assert [about["look"] for about in fresh.values()] == [None, None] and len(read) == 2  # could change this instant
    monkeypatch.setattr(stage.time, "time_ns", lambda own=time.time_ns: own() + 10**10)  # ten seconds later
    settled = stage.hashes_of(files, fresh)
    assert len(read) == 4 and stage.hashes_of(files, settled) == settled and len(read) == 4
    before = b.stat()
    b.write_text("SOME TEXT")
    os.utime(b, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size, and dated back
    changed = stage.hashes_of(files, settled)
    assert read[4:] == [b] and changed[str(a)] == settled[str(a)]
    assert changed[str(b)]["sha256"] == hashlib.sha256(b"SOME TEXT").hexdigest()


def test_other_text_or_settings_are_another_run(tmp_path, tokenizer_folder, capsys):
    write_jsonl(tmp_path / "a.jsonl", rows(texts(200)))
    write_jsonl(tmp_path / "b.jsonl", rows(texts(201)))
    out = tmp_path / "out"
    prepared(tokenizer_folder, out, tmp_path / "a.jsonl")
    before = content(out / "final")
    for command, key in (
        ([tmp_path / "b.jsonl"], "data.files.text"),
        ([f"{{wiki: {tmp_path}/a.jsonl}}"], "data.files.wiki"),
        ([tmp_path / "a.jsonl", "prepare.holdout_fraction=0.2"], "prepare.holdout_fraction"),
    ):
        assert train.main(words(tokenizer_folder, out, *command)) == 2
        assert key in capsys.readouterr().err
    assert content(out / "final") == before
    made = prepared(tokenizer_folder, out, tmp_path / "b.jsonl", "overwrite=true", "prepare.holdout_fraction=0")
    assert sum(part.documents for part in made.parts.values()) == 201 and not made.held_back


def test_an_overwriting_run_that_is_stopped_again_and_again_ends(tmp_path, tokenizer_folder, monkeypatch, capsys):
    """As prepare.executor=slurm is: it leaves with its jobs submitted, and the same command finishes."""
    write_jsonl(tmp_path / "a.jsonl", rows(texts(60)))
    write_jsonl(tmp_path / "b.jsonl", rows(texts(61)))
    prepared(tokenizer_folder, out := tmp_path / "out", tmp_path / "a.jsonl")
    command = words(tokenizer_folder, out, tmp_path / "b.jsonl", "overwrite=true", "prepare.slice_mb=0.002")
    command.append("prepare.workers=1")
    own, made, cut = steps.Step.run, [], []
    monkeypatch.setattr(sources, "CLOCKS_NS", -1)  # a file written this instant counts as settled
    monkeypatch.setattr(slices, "lines", lambda *of, own=slices.lines: cut.append(of[0]) or own(*of))

    def run(step, work, task):
        if step.target(work, task).exists():
            return
        own(step, work, task)
        made.append((step.name, task))
        if len(made) % 9 == 0:
            raise Stopped("SIGTERM")

    monkeypatch.setattr(steps.Step, "run", run)
    starts = 1
    while train.main(command) == 3:
        starts += 1
        assert starts < 30 and json.loads((out / "summary.json").read_text())["status"] == "stopped"
    assert starts > 2 and len(cut) == 1, "lines are counted at the first start alone"
    assert len(made) == len(set(made)) and not (out / ".previous").exists()
    made = Prepared(out)
    assert sum(part.documents for part in (*made.parts.values(), *made.held_back.values())) == 61


def test_of_two_workers_with_the_same_task_the_later_one_keeps_what_the_faster_one_made(tmp_path, monkeypatch):
    def make(work, task, folder):
        folder.mkdir()
        (folder / "made").write_text("the later one")

    def rename(aside, target, own=os.rename):
        target.mkdir()  # in the last instant
        (target / "made").write_text("the faster one")
        own(aside, target)

    monkeypatch.setattr(os, "rename", rename)
    steps.Step("read", None, make).run(SimpleNamespace(folder=tmp_path, is_durable=True), "000000")
    assert (tmp_path / "read/000000/made").read_text() == "the faster one"
    assert [path.name for path in (tmp_path / "read").iterdir()] == ["000000"]


def test_a_failure_is_recorded_and_leaves_nothing_that_looks_finished(tmp_path, tokenizer_folder, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", rows(texts(200)))
    command = words(tokenizer_folder, tmp_path / "out", tmp_path / "a.jsonl")

    def failing(*_, **__):
        raise RuntimeError("the plug was pulled")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "finish", failing)
        with pytest.raises(RuntimeError):
            train.main(command)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", "the plug was pulled")
    assert not (tmp_path / "out/final").exists() and not (tmp_path / "out/.writing-final").exists()
    assert train.main(command) == 0
    prepared(tokenizer_folder, tmp_path / "clean", tmp_path / "a.jsonl")
    assert content(tmp_path / "out/final") == content(tmp_path / "clean/final")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Files of several kinds, with copies, near copies and benchmark items, and what to call them by."""
    folder = tmp_path_factory.mktemp("corpus")
    some = texts(240, seed=9)
    write_jsonl(folder / "a.jsonl", rows(some[:120] + some[:9] + [f"{t}\nand more" for t in some[9:40]]))
    table = pyarrow.Table.from_pylist(rows(some[100:200]))
    pyarrow.parquet.write_table(table, folder / "b.parquet", row_group_size=10)
    for i, text in enumerate(some[200:]):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    write_jsonl(folder / "benchmarks/quiz.jsonl", [{"question": text} for text in some[50:60]])
    return folder


def corpus_words(corpus: Path, tokenizer_folder: Path, out: Path, *more: str) -> list[str]:
    files = f"{{web: [{corpus}/a.jsonl, {corpus}/b.parquet], notes: {corpus}/*.txt}}"
    size = () if any(word.startswith("prepare.slice_mb=") for word in more) else ("prepare.slice_mb=0.012",)
    more = ("prepare.near_duplicates=0.7", f"prepare.decontaminate={corpus}/benchmarks", *size, *more)
    return words(tokenizer_folder, out, files, "prepare.holdout_fraction=0.1", *more)


@pytest.fixture(scope="module")
def unbroken(corpus, tokenizer_folder, tmp_path_factory) -> dict[str, str]:
    """Hashes of what a run in one piece makes."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert train.main(corpus_words(corpus, tokenizer_folder, out)) == 0
    assert not (out / "data").exists()
    ledger = json.loads((out / "ledger.json").read_text("utf-8"))
    assert min(reason["records"] for reason in ledger["reasons"].values()) >= 9
    assert set(ledger["reasons"]) == {
        "copy of an earlier document",
        "nearly a copy of an earlier document",
        "item of quiz",
    }
    return results(out)


def results(out: Path) -> dict[str, str]:
    """Of the shards, the manifest and the ledger."""
    return content(out / "final") | {"ledger": hashlib.sha256((out / "ledger.json").read_bytes()).hexdigest()}


@pytest.mark.parametrize(
    "more", [["prepare.workers=3"], ["prepare.executor=datatrove", "prepare.workers=2", "prepare.tasks=3"]]
)
def test_any_number_and_kind_of_workers_makes_the_same_bytes(tmp_path, corpus, tokenizer_folder, unbroken, more):
    if "prepare.executor=datatrove" in more:
        pytest.importorskip("datatrove", reason="datatrove is not installed: pip install -e '.[corpus]'")
    assert train.main(corpus_words(corpus, tokenizer_folder, tmp_path / "out", *more)) == 0
    assert results(tmp_path / "out") == unbroken


def test_slices_of_any_size_make_the_same_shards(tmp_path, corpus, tokenizer_folder, unbroken, monkeypatch):
    monkeypatch.setattr(text_set, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(steps, "READ_DOCUMENTS", 7)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert train.main(corpus_words(corpus, tokenizer_folder, tmp_path / "out", "prepare.slice_mb=64")) == 0
    made = results(tmp_path / "out")
    assert {k: v for k, v in made.items() if k != "ledger"} == {k: v for k, v in unbroken.items() if k != "ledger"}


def test_a_run_that_is_stopped_while_it_deletes_what_tasks_left_ends_with_the_same_bytes(
    tmp_path, corpus, tokenizer_folder, unbroken, monkeypatch
):
    """In the middle of a folder of other slices, and again when all is done; half a folder is never taken up."""
    own, own_run, stopping = shutil.rmtree, steps.Step.run, []

    def rmtree(path, *args, **kwargs):
        if stopping and (tmp_path / "out" / "data") in (Path(path), *Path(path).parents):
            for file in [*Path(path).rglob("tokenize/*/ledger.json"), *Path(path).rglob("tokenize/*/*.en.*")]:
                file.unlink()
            raise Stopped(stopping.pop())
        own(path, *args, **kwargs)

    def run(step, work, task):
        if step.name == "plan" and stopping:
            raise Stopped(stopping.pop())
        own_run(step, work, task)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(steps.Step, "run", run)
    command = corpus_words(corpus, tokenizer_folder, tmp_path / "out", "prepare.workers=1")
    other = [word.replace("slice_mb=0.012", "slice_mb=64") for word in command]
    for words_, where in ((command, "when all is tokenized"), (other, "in the folder of the others")):
        stopping.append(where)
        assert train.main(words_) == 3 and not stopping
    stopping.append("at the end")
    assert train.main(command) == 3 and not stopping
    assert train.main(command) == 0
    assert results(tmp_path / "out") == unbroken and not (tmp_path / "out/data").exists()


KILLING = """
import os, sys
from aquila_sft import checkpoint
import train
left, real = int(sys.argv[1]), {name: getattr(os, name) for name in ("rename", "replace", "fsync")}
def counted(name):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return real[name](*args, **kwargs)
    return call
for name in real:
    setattr(os, name, counted(name))
code = train.main(sys.argv[2:])
print("left", left, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path, corpus, tokenizer_folder, unbroken):
    """kill -9 after so many file operations, then once more from there, until it comes through: every step is hit."""
    out = tmp_path / "out"
    command = corpus_words(corpus, tokenizer_folder, out)
    (tmp_path / "killing.py").write_text(KILLING)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    rng, ends, reached = random.Random(0), [], set()
    for _ in range(40):
        done = warm.run([rng.randint(25, 110), *command], script=tmp_path / "killing.py", env=env)
        ends.append(done.returncode)
        reached |= {path.name for path in out.glob("data/*/*")}
        if done.returncode != -signal.SIGKILL:
            break
        assert not (out / "final").exists() or shards.Prepared(out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(ends) >= 3 and reached >= {"read", "match", "copies", "tokenize"}, (ends, reached)
    assert results(out) == unbroken
    assert not (out / "data").exists()


@pytest.mark.slow
def test_a_killed_worker_stops_the_run_a_killed_run_its_workers_and_the_same_command_goes_on(
    tmp_path, corpus, tokenizer_folder, unbroken
):
    out = tmp_path / "out"
    command = corpus_words(corpus, tokenizer_folder, out, "prepare.workers=2")
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    for whom in ("worker", "run"):
        run = warm.Process(command, env=env)
        workers = wait_for(lambda pid=run.pid: children(pid, "spawn_main"))
        os.kill(workers[0] if whom == "worker" else run.pid, signal.SIGKILL)
        run.wait(timeout=100)
        if whom == "worker":
            assert run.returncode == 2 and "a process of the step read was killed" in run.stderr
        else:
            assert run.returncode == -signal.SIGKILL
        wait_for(lambda pids=workers: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        assert not (out / "final").exists()
    assert train.main(command) == 0
    assert results(out) == unbroken


def children(pid: int, name: str) -> list[int]:
    """Process ids of its children with that in their command line; none until there are two."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [int(child) for child in found if name in Path(f"/proc/{child}/cmdline").read_text()]
    return found if len(found) > 1 else []


def wait_for(condition):
    for _ in range(600):
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def test_the_published_form_of_vocabulary_is_converted(tmp_path, tokenizer):
    ranks = tmp_path / "qwen.tiktoken"
    write_ranks(ranks, tiny_ranks(tokenizer))
    write_jsonl(tmp_path / "a.jsonl", rows(texts(50)))
    given = [
        "tokenizer=aquila",
        f"tokenizer.ranks={ranks}",
        f"data.files={tmp_path}/a.jsonl",
        f"output_dir={tmp_path}/out",
    ]
    assert train.main(["recipe=prepare", "scale=mini", *given]) == 0
    made = Prepared(tmp_path / "out")
    loaded = load_tokenizer(made.tokenizer_folder)
    ids = documents_of(made.parts["text.en"])[0]
    assert loaded.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<|extra_203|>", "<|extra_204|>"]
    assert loaded.decode(ids[1:-1]) == texts(1)[0]


@pytest.mark.slow
@pytest.mark.real_data
def test_real_text_of_both_languages_with_the_published_vocabulary(tmp_path):
    """Every document comes back from its tokens; special strings and CRLF of real pages included."""
    if "AQUILA_REAL_DATA" not in os.environ:
        pytest.skip("AQUILA_REAL_DATA is not set")
    root = Path(os.environ["AQUILA_REAL_DATA"])
    command = [
        *("recipe=prepare", "scale=135m", "tokenizer=aquila", f"output_dir={tmp_path}/out"),
        f"tokenizer.ranks={root.parent / 'aquila_tokenizer' / 'qwen.tiktoken'}",
        "prepare.shard_tokens=500000",
        f"data.files={{wiki: {root}/raw_*_wiki/*.jsonl, d2l: {root}/raw_*_d2l/*.jsonl, play: {root}/raw_*peare/*.txt}}",
    ]
    assert train.main(command) == 0
    made = Prepared(tmp_path / "out")
    assert set(made.parts) == {"wiki.en", "wiki.zh", "d2l.en", "d2l.zh", "play.en"}
    for name in made.manifest["files"]:
        if name.endswith(".shard"):
            shards.verify(made.folder / name)
    tokenizer = load_tokenizer(made.tokenizer_folder)
    written = sorted(all_texts(made.parts | {f"held {n}": p for n, p in made.held_back.items()}, tokenizer))
    files = {
        s: documents.sources.find([str(root / g)], documents.TXT + documents.sources.SUFFIXES)
        for s, g in (("wiki", "raw_*_wiki/*.jsonl"), ("d2l", "raw_*_d2l/*.jsonl"), ("play", "raw_*peare/*.txt"))
    }
    read = [clean.normal(d.text) for d, _ in documents.read(files, "text", print)]
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    assert len(read) == len(written) + ledger["left_out"] and set(written) <= set(read)
    assert len(set(written)) == len(written) > 0.97 * len(read), ledger["reasons"]
    for part in made.parts.values():
        assert 3 < part.text_bytes / part.tokens < 5, part.name
        assert part.read(0, 1)[0][0] == 151_849 and part.read(part.tokens - 1, part.tokens)[0][0] == 151_850


def test_corpora_share_what_is_downloaded_by_language_and_then_by_weight(monkeypatch):
    asked = {}

    def dataset_files(name, subset, at_most_bytes):
        asked[name] = (subset, at_most_bytes)
        return hub.DatasetFiles([], name, "0" * 40, subset, "cc")

    monkeypatch.setattr(hub, "dataset_files", dataset_files)
    stage = importlib.import_module("aquila_sft.stages.prepare")
    given = ["recipe=prepare", "scale=135m", "tokenizer.path=x"]
    assert set(stage.fetch(train.compose_run(given).data)) == set(asked) and set(asked) == {
        "dclm_baseline",
        "fineweb_edu",
        "smollm_corpus",
        "cci3_hq",
    }
    assert sum(size for _, size in asked.values()) == pytest.approx(50e9)
    assert asked["cci3_hq"] == ("all", pytest.approx(15e9))
    assert asked["smollm_corpus"] == ("cosmopedia-v2", pytest.approx(7e9))
    asked.clear()
    words = ["data.languages={en: 1, zh: 1}", "data.corpora={fineweb_edu: 3, cci3_hq: 1}", "data.download_gb=2"]
    stage.fetch(train.compose_run([*given, *words]).data)
    assert asked == {"fineweb_edu": ("sample-10BT", 1e9), "cci3_hq": ("all", 1e9)}
    with pytest.raises(UserError, match="data.corpora=nothere is not one of .*cci3_hq"):
        stage.fetch(train.compose_run([*given, "data.corpora={nothere: 1}"]).data)
    with pytest.raises(UserError, match="data.corpora=infinity_instruct: BAAI/Infinity-Instruct holds conversations"):
        stage.fetch(train.compose_run([*given, "data.corpora={infinity_instruct: 1}"]).data)
    with pytest.raises(UserError, match="leave no corpus"):
        stage.fetch(train.compose_run([*given, "data.languages={fr: 1}"]).data)


def test_the_first_files_up_to_a_size_are_chosen_and_asked_for_once(monkeypatch, tmp_path):
    sizes = {f"data/{i}.jsonl": 10 for i in range(5)}
    monkeypatch.setattr(snapshot, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(snapshot, "probe", lambda wanted: ("0" * 40, sizes))
    wanted = snapshot.Wanted("a/b", "dataset", None, ("data/*",))

    def interrupted(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # while the choice is written
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hub.first_files(wanted, 35)
    assert hub.first_files(wanted, 35) == ("data/0.jsonl", "data/1.jsonl", "data/2.jsonl")
    assert hub.first_files(wanted, 1) == ("data/0.jsonl",)
    monkeypatch.setattr(snapshot, "probe", None)
    assert hub.first_files(wanted, 35) == ("data/0.jsonl", "data/1.jsonl", "data/2.jsonl")


def test_slurm_is_told_every_step_in_order_with_what_the_recipe_says(tmp_path, monkeypatch, corpus, tokenizer_folder):
    """The example's settings reach datatrove; jobs are submitted, nothing is waited for, the same command finishes."""
    executors = pytest.importorskip(
        "datatrove.executor", reason="datatrove is not installed: pip install -e '.[corpus]'"
    )
    made = []

    class Submitted:
        def __init__(self, pipeline, **about):
            self.step, self.about = pipeline[0].step, about
            made.append(self)

        def run(self):
            ready = []
            job = self
            while job is not None:
                ready, job = [job, *ready], job.about["depends"]
            assert ready == made
            for job in ready:  # what the nodes would do, task by task
                for rank in range(job.about["tasks"]):
                    list(datatrove_step.DatatroveStep(job.step, works[0]).run(rank=rank, world_size=job.about["tasks"]))

    from aquila_sft.data import datatrove_step, workers

    works = []
    real = workers.with_datatrove
    monkeypatch.setattr(workers, "with_datatrove", lambda work, policy: works.append(work) or real(work, policy))
    monkeypatch.setattr(executors, "SlurmPipelineExecutor", Submitted)
    example = (ROOT / "recipes/cluster/prepare_slurm.sh").read_text()
    (slurm,) = re.findall(r"(prepare\.slurm=)'([^']*)'", example)
    command = corpus_words(
        corpus, tokenizer_folder, tmp_path / "out", "prepare.executor=slurm", "prepare.tasks=3", "".join(slurm)
    )
    assert train.main(command) == 3
    assert [job.step for job in made] == ["index", "read", "match", "copies", "tokenize", "plan", "shards"]
    about = made[1].about
    assert (about["partition"], about["time"], about["workers"]) == ("cpu", "24:00:00", 128)
    assert about["env_command"] == "source .venv/bin/activate" and about["skip_completed"] is False
    assert train.main(command) == 0 and len(made) == 7
    assert Prepared(tmp_path / "out").parts
