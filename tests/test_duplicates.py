"""Copies and near copies: what is found, what is not, and in how much memory."""

import itertools
import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny import SENTENCES

from aquila_sft.data import conversations, duplicates
from aquila_sft.data.units import ngram_hashes, unit_hashes

THRESHOLD = 0.7


def invented(count: int, seed: int = 0) -> list[str]:
    """Texts of both languages that share words and phrases but are no copies."""
    rng = random.Random(seed)
    english = sorted({w.strip(".,;:'") for s in SENTENCES if s.isascii() for w in s.split()})
    chinese = sorted({s[i : i + 2] for s in SENTENCES if not s.isascii() for i in range(0, len(s) - 1, 2)})
    some = []
    for i in range(count):
        stock = rng.choice([s for s in SENTENCES if s.isascii() == (i % 2 == 0)])  # a sentence that many have
        length = rng.randint(60, 200)
        words = rng.choices(english, k=length) if i % 2 == 0 else rng.choices(chinese, k=length)
        some.append(stock + "\n" + (" " if i % 2 == 0 else "").join(words))
    return some


def changed(text: str, rng: random.Random) -> str:
    """Nearly the same, by 0.8 and more: some words are others, a line before, other signs, other case."""
    joint = "" if conversations.language(text) == "zh" else " "
    words = text.split(joint) if joint else list(text)
    for changes in range(len(words) // 50, -1, -1):
        out = list(words)
        for _ in range(changes):
            out[rng.randrange(len(words))] = rng.choice(["other", "something"]) if joint else rng.choice("另外")
        out = joint.join(out)
        out = rng.choice(["", "Home > Page\n" if joint else "首页\n"]) + (
            out.upper() if rng.random() < 0.3 else out + "!"
        )
        if overlap(text, out) >= 0.8:
            return out
    raise AssertionError("too short a text")


def overlap(a: str, b: str) -> float:
    x, y = (set(duplicates.shingles(text, unit_hashes(text)).tolist()) for text in (a, b))
    return len(x & y) / len(x | y)


def written(folder: Path, texts: list[str], slices: int = 1) -> list[Path]:
    folders = []
    for number, some in enumerate(np.array_split(np.array(texts, dtype=object), slices)):
        made = folder / f"{number:06d}"
        made.mkdir(parents=True)
        keys = duplicates.KeyWriter(made, near=True)
        for start in range(0, len(some), 1000):
            batch = some[start : start + 1000].tolist()
            keys.add(batch, [unit_hashes(text) for text in batch])
        keys.finish()
        folders.append(made)
    return folders


def found(folders: list[Path], threshold: float = THRESHOLD) -> list[int]:
    """Places of the documents with an earlier one like them."""
    counts = [np.load(folder / "keys.npy").shape[1] for folder in folders]
    before = [0, *itertools.accumulate(counts)]
    numbers = set()
    for band in range(1 + duplicates.BANDS):
        for first, last in duplicates.ranges(sum(counts)):
            with_threshold = None if band == duplicates.EXACT else threshold
            numbers |= set(duplicates.search(folders, band, first, last, with_threshold).tolist())
    return sorted(before[n >> duplicates.ROW_BITS] + (n & 2**duplicates.ROW_BITS - 1) for n in numbers)


def test_a_unit_is_a_word_or_a_chinese_character_whatever_its_width_and_case():
    assert len(unit_hashes("GPU上的Mixed-precision训练 don't")) == 9
    plain, wide = unit_hashes("GPU上的 mixed precision 训练"), unit_hashes("“ｇｐｕ”上，的：Mixed-Precision　训练！")
    np.testing.assert_array_equal(plain, wide)
    assert len(np.unique(unit_hashes("ab a b ba 中 国 中国"))) == 6
    assert len(unit_hashes("…!?")) == len(unit_hashes("")) == 0
    assert len(unit_hashes("한국어 텍스트 とてもよい слово")) == 2 + 5 + 1


def test_an_n_gram_has_the_same_hash_wherever_it_stands():
    units = unit_hashes(" ".join(SENTENCES))
    for n in (1, 5, 13):
        grams = ngram_hashes(units, n)
        assert len(grams) == len(units) - n + 1
        for place in (0, 7, len(grams) - 1):
            assert ngram_hashes(units[place : place + n], n).tolist() == [grams[place]]
        assert len(np.unique(grams)) == len({tuple(units[i : i + n]) for i in range(len(grams))})
    assert len(ngram_hashes(units[:4], 5)) == 0


def test_the_signature_estimates_the_overlap_of_5_grams():
    rng, texts = random.Random(3), invented(60)
    for text in texts:
        words = text.split(" ") if text.isascii() else list(text)
        cut = rng.randrange(10, len(words))
        joint = " " if text.isascii() else ""
        texts.append(joint.join(words[:cut])) if len(texts) < 120 else None
    units = [unit_hashes(text) for text in texts]
    of = duplicates.signatures(texts, units)
    errors = []
    for a, b in zip(range(60), range(60, 120), strict=True):
        errors.append(np.mean(of[a] == of[b]) - overlap(texts[a], texts[b]))
    assert np.abs(errors).max() < 4 * 0.5 / duplicates.PERMUTATIONS**0.5  # four standard deviations at the widest
    assert abs(np.mean(errors)) < 4 * 0.5 / (60 * duplicates.PERMUTATIONS) ** 0.5


def planted(texts: list[str], copies: int, seed: int) -> tuple[list[str], set[int]]:
    """Texts among which near copies of some stand, behind those; and the places of the copies."""
    rng = random.Random(seed)
    out = list(texts)
    for text in rng.sample(texts, copies):
        at = rng.randint(out.index(text) + 1, len(out))
        out.insert(at, changed(text, rng))
    known = set(texts)
    return out, {i for i, text in enumerate(out) if text not in known}


def shares(found: list[int], planted: set[int]) -> tuple[float, float]:
    """Recall, precision."""
    return len(planted & set(found)) / len(planted), len(planted & set(found)) / max(1, len(found))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_near_copies_are_found_and_nothing_else(tmp_path, language):
    texts = [t for t in invented(1200) if t.isascii() == (language == "en")]
    texts, copies = planted(texts, 150, seed=1)
    recall, precision = shares(found(written(tmp_path, texts, slices=3)), copies)
    assert recall >= 0.99 and precision >= 0.99


def test_what_is_found_does_not_depend_on_slices_or_ranges(tmp_path, monkeypatch):
    texts, _ = planted(invented(100), 30, seed=2)
    texts += texts[:20]
    whole = found(written(tmp_path / "a", texts))
    assert set(range(len(texts) - 20, len(texts))) <= set(whole)
    assert found(written(tmp_path / "b", texts, slices=7)) == whole
    monkeypatch.setattr(duplicates, "RECORDS", 32)
    monkeypatch.setattr(duplicates, "PAIRS", 5)
    assert found(written(tmp_path / "c", texts, slices=3)) == whole


def test_one_key_with_more_documents_than_fit_in_memory(tmp_path, monkeypatch):
    """The same text a hundred times, sixteen records at a time."""
    monkeypatch.setattr(duplicates, "RECORDS", 16)
    texts = invented(10) + ["the same text again and again, as a notice on every page of a site"] * 60
    assert found(written(tmp_path, texts, slices=3)) == list(range(11, 70))


def test_texts_too_short_for_a_5_gram_are_copies_only_of_equal_ones(tmp_path):
    texts = ["你好", "你好！", "!!!", "???", "!!!", "one two", "one three"]
    assert found(written(tmp_path, texts)) == [1, 4]


@pytest.mark.slow
def test_the_search_takes_the_same_memory_for_five_times_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "RECORDS", 2**12)
    monkeypatch.setattr(duplicates, "PAIRS", 2**10)
    rng = np.random.default_rng(0)
    peaks = []
    for count in (20_000, 100_000):
        folders = []
        for number in range(count // 20_000):  # signatures without their texts: what the search reads
            folder = tmp_path / f"{count}/{number:06d}"
            folder.mkdir(parents=True)
            of = rng.integers(0, 2**32, size=(20_000, duplicates.PERMUTATIONS), dtype=np.uint32)
            of[1::10] = of[::10]
            with open(folder / "signatures.bin", "wb") as file:
                file.write(of.tobytes())
            keys = np.concatenate([of[:, :2].copy().view(np.uint64).T, duplicates.band_keys(of)])
            order = np.argsort(keys, axis=1, kind="stable")
            np.save(folder / "keys.npy", np.take_along_axis(keys, order, axis=1))
            np.save(folder / "rows.npy", order.astype(np.uint32))
            folders.append(folder)
        tracemalloc.start()
        seen = set()
        for band in (0, 1):
            for first, last in duplicates.ranges(count):
                seen |= {len(duplicates.search(folders, band, first, last, THRESHOLD if band else None))}
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert max(seen) > 10
    assert peaks[1] < 1.15 * peaks[0], peaks


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("names", [("raw_en_web_c4", "raw_en_pydocs"), ("raw_zh_wiki", "raw_zh_tidbdocs")])
def test_near_copies_planted_in_real_text_are_found_and_nothing_else(tmp_path, names):
    if "AQUILA_REAL_DATA" not in os.environ:
        pytest.skip("AQUILA_REAL_DATA is not set")
    lines = [
        line
        for name in names
        for line in (Path(os.environ["AQUILA_REAL_DATA"]) / name / "docs.jsonl").read_text("utf-8").split("\n")
        if line
    ]
    texts = [t for t in dict.fromkeys(json.loads(line)["text"][:4000] for line in lines) if len(unit_hashes(t)) >= 50]
    own = set(found(written(tmp_path / "own", texts)))  # copies that the real text has of itself
    texts = [text for i, text in enumerate(texts) if i not in own]
    assert len(texts) > 500 and len(own) < 0.05 * len(texts)
    texts, copies = planted(texts, 200, seed=4)
    recall, precision = shares(found(written(tmp_path / "planted", texts, slices=3)), copies)
    assert recall >= 0.99 and precision >= 0.99


def test_a_slice_finds_its_copies_of_all_ranges_in_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "GROUP", 2)
    random, of = np.random.default_rng(0), {"00": set(), "01": set(), "02": set()}
    for folder in ("match", "copies"):
        (tmp_path / folder).mkdir()
    for band, chosen in of.items():
        for part in ("0", "1"):
            numbers = {(int(s) << duplicates.ROW_BITS) + int(r) for s, r in random.integers(0, (5, 9), (6, 2))}
            np.save(tmp_path / f"match/{band}-{part}.npy", np.array(sorted(numbers), dtype=np.uint64))
            chosen |= numbers
    for task in duplicates.group_tasks(5):
        duplicates.gather(tmp_path / "match", task, tmp_path / "copies" / task)
    opened = []
    monkeypatch.setattr(np, "load", lambda *given, own=np.load, **how: opened.append(given) or own(*given, **how))
    for number in range(5):
        equal, like = duplicates.copies(tmp_path / "copies", number, 9)
        assert [(number << duplicates.ROW_BITS) + row in of["00"] for row in range(9)] == equal.tolist()
        assert [(number << duplicates.ROW_BITS) + row in of["01"] | of["02"] for row in range(9)] == like.tolist()
    assert len(opened) == 5


def test_keys_that_are_looked_through_are_in_memory_once_and_while_they_are_sorted(tmp_path):
    count, draw = 50_000, np.random.default_rng(0)
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
        np.save(folder / "keys.npy", np.sort(draw.integers(0, 200 * count, (1, count)).astype(np.uint64)))
        np.save(folder / "rows.npy", np.arange(count, dtype=np.uint32)[None])
    tracemalloc.start()
    found = duplicates.search(folders, 0, 0, 2**64 - 1, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) > 1000 and peak < 45 * count * len(folders), "data/README.md says 40 bytes each"
