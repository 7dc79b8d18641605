"""Shards: what is written is read, at any place; what is damaged is found, and where is said."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from shard_files import write_part

from aquila_sft import checkpoint
from aquila_sft.data import shards, text_rows
from aquila_sft.data.shards import BLOCK, Part, Prepared, Shard, ShardWriter, verify
from aquila_sft.data.text_rows import TextRows
from aquila_sft.errors import UserError

ABOUT = {"vocab_size": 70_000, "tokenizer_sha256": "f" * 64, "source": "wiki", "language": "zh"}


def some_documents(count: int, longest: int, *, vocab_size: int = 70_000, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=rng.integers(1, longest + 1)) for _ in range(count)]


def written(folder: Path, documents: list[np.ndarray], shard_tokens: int, **about) -> list[Path]:
    return write_part(folder, ((ids, 3 * len(ids)) for ids in documents), shard_tokens=shard_tokens, **(ABOUT | about))


def one_shard(path: Path, documents: list[np.ndarray], **about) -> Path:
    with ShardWriter(path, **(ABOUT | about)) as writer:
        for ids in documents:
            writer.add(ids, 3 * len(ids))
    return path


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    return some_documents(900, 300)


@pytest.fixture(scope="module")
def paths(documents, tmp_path_factory) -> list[Path]:
    return written(tmp_path_factory.mktemp("part"), documents, shard_tokens=10_000)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """A shard of several blocks of tokens and more than one of document ends."""
    documents = some_documents(9000, 8)
    return one_shard(tmp_path_factory.mktemp("large") / "00000.shard", documents), documents


def test_a_part_reads_as_one_stream_whatever_the_window(documents, paths):
    part = Part("wiki.zh", paths)
    stream = np.concatenate(documents)
    begins = np.zeros(len(stream), dtype=bool)
    begins[np.cumsum([0, *map(len, documents)])[:-1]] = True
    assert len(paths) > 10
    assert (part.tokens, part.documents, part.text_bytes) == (len(stream), len(documents), 3 * len(stream))
    assert (part.name, part.source, part.language) == ("wiki.zh", "wiki", "zh")
    rng = np.random.default_rng(1)
    windows = [sorted(rng.integers(0, len(stream) + 1, size=2).tolist()) for _ in range(300)]
    edges = np.cumsum([shard.tokens for shard in part.shards]).tolist()
    windows += [[max(0, e + a), min(len(stream), e + b)] for e in edges for a, b in ((-1, 1), (0, 1), (-1, 0), (0, 0))]
    for start, stop in [*windows, [0, len(stream)], [0, 0], [len(stream), len(stream)]]:
        tokens, starts = part.read(start, stop)
        assert tokens.dtype == np.int64 and starts.dtype == bool
        np.testing.assert_array_equal(tokens, stream[start:stop])
        np.testing.assert_array_equal(starts, begins[start:stop])
    for start, stop in ((0, len(stream) + 1), (-1, 5), (7, 3)):
        with pytest.raises(IndexError):
            part.read(start, stop)


def test_documents_never_span_shards_and_a_shard_closes_at_the_first_end_after_its_size(documents, paths):
    left = iter(documents)
    for number, path in enumerate(paths):
        shard = Shard(path)
        inside = [next(left) for _ in range(shard.documents)]
        np.testing.assert_array_equal(shard.ends, np.cumsum([len(d) for d in inside]))
        np.testing.assert_array_equal(shard.read(0, shard.tokens), np.concatenate(inside))
        assert path.name == f"{number:05d}.shard"
        assert shard.tokens - len(inside[-1]) < 10_000
        assert shard.tokens >= 10_000 or number == len(paths) - 1
    assert next(left, None) is None


@pytest.mark.parametrize("vocab_size, name", [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (2**31, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_allows(tmp_path, vocab_size, name):
    ids = [0, vocab_size - 1, 1]
    shard = Shard(one_shard(tmp_path / "a.shard", [np.array(ids)], vocab_size=vocab_size))
    assert shard.header["dtype"] == name and shard.dtype.itemsize == int(name[4:]) // 8
    assert shard.read(0, 3).tolist() == ids
    for wrong in ([vocab_size], [-1], []):
        with (
            pytest.raises(ValueError, match="a document of no tokens, or of ids outside"),
            ShardWriter(tmp_path / "b.shard", **(ABOUT | {"vocab_size": vocab_size})) as writer,
        ):
            writer.add(wrong, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.shard"]


def test_the_bytes_are_those_the_format_says(tmp_path):
    """Read here without the reader: a shard outlives the program that wrote it."""
    path = one_shard(tmp_path / "a.shard", [np.array([1, 2, 300]), np.array([69_999])])
    content = path.read_bytes()
    magic, version, size, crc32 = struct.unpack_from("<8sIII", content)
    header = content[20 : 20 + size]
    assert (magic, version, zlib.crc32(header)) == (b"AQSHARD\0", 1, crc32)
    assert (20 + size) % 64 == 0
    body = content[20 + size : -4 - 32]
    assert body == struct.pack("<4I2Q", 1, 2, 300, 69_999, 3, 4)
    assert content[-36:-32] == struct.pack("<I", zlib.crc32(body))
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()
    assert json.loads(header) == ABOUT | {
        "dtype": "uint32",
        "block_bytes": 65536,
        "tokens": 4,
        "documents": 2,
        "text_bytes": 12,
        "checks_crc32": zlib.crc32(content[-36:-32]),
    }


def test_odd_numbers_of_two_byte_tokens_keep_the_ends_aligned(tmp_path):
    for count in range(1, 10):
        ids = np.arange(count)
        shard = Shard(one_shard(tmp_path / f"{count}.shard", [ids, ids[:1]], vocab_size=100))
        assert shard.ends.tolist() == [count, count + 1] and shard.ends.flags.aligned
        assert shard.read(0, count + 1).tolist() == [*range(count), 0]


def regions(shard: Shard) -> dict[str, range]:
    footer_at = shard.checks_at + 4 * shard.num_blocks
    size = shard.dtype.itemsize * shard.tokens
    return {
        "prefix": range(0, 20),
        "header": range(20, shard.body_at, 13),
        "tokens": range(shard.body_at, shard.body_at + size, size // 40),
        "ends": range(shard.ends_at, shard.checks_at, 8 * shard.documents // 20),
        "checksums": range(shard.checks_at, footer_at),
        "footer": range(footer_at, footer_at + 32),
    }


@pytest.mark.parametrize("region", ["prefix", "header", "tokens", "ends", "checksums", "footer"])
def test_a_flipped_bit_is_found_wherever_it_is(large, tmp_path, region):
    path, documents = large
    content, whole = path.read_bytes(), Shard(path)
    assert whole.num_blocks > 3 and whole.ends_at // BLOCK < whole.checks_at // BLOCK
    verify(path)
    copy = tmp_path / "copy.shard"
    for place in regions(whole)[region]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        copy.write_bytes(damaged)
        with pytest.raises(UserError, match="copy.shard"):
            verify(copy)
        if region in ("prefix", "header", "checksums"):
            with pytest.raises(UserError, match="copy.shard.*recipe=prepare"):
                Shard(copy)
        elif region in ("tokens", "ends"):
            block = (place - whole.body_at) // BLOCK
            said = rf"copy.shard is damaged at byte {whole.body_at + block * BLOCK} \(block {block} of "
            with pytest.raises(UserError, match=said):
                verify(copy)
            with pytest.raises(UserError, match=said):
                Part("a", [copy]).read(0, whole.tokens)


def test_a_damaged_block_costs_only_what_lies_in_it_and_is_told_every_time(large, tmp_path):
    path, documents = large
    stream, copy = np.concatenate(documents), tmp_path / "copy.shard"
    content = bytearray(path.read_bytes())
    content[Shard(path).body_at + BLOCK + 5] ^= 4
    copy.write_bytes(content)
    shard, in_a_block = Shard(copy), BLOCK // 4
    np.testing.assert_array_equal(shard.read(0, in_a_block), stream[:in_a_block])
    for start, stop in ((in_a_block - 1, in_a_block + 1), (in_a_block, in_a_block + 1), (0, shard.tokens)) * 2:
        with pytest.raises(UserError, match="block 1 of"):
            shard.read(start, stop)
    np.testing.assert_array_equal(shard.read(2 * in_a_block, 2 * in_a_block + 9), stream[2 * in_a_block :][:9])


@pytest.mark.parametrize("place", ["token", "end"])
def test_rows_that_touch_a_damaged_block_are_blank_by_option_and_said_and_counted(large, tmp_path, place, capsys):
    path, _ = large
    whole, length = TextRows(Part("a", [path, path]), 100), 100
    content, shard = bytearray(path.read_bytes()), Shard(path)
    content[shard.body_at + BLOCK + 5 if place == "token" else shard.checks_at - 3] ^= 4
    (tmp_path / "copy.shard").write_bytes(content)
    strict, lenient = (
        TextRows(Part("a", [path, tmp_path / "copy.shard"]), length, leave_out_damaged=leave_out)
        for leave_out in (False, True)
    )
    unreadable = set()
    for row in range(len(whole)):
        try:
            text_rows.batch([(strict, row)], length, 0)
        except shards.DamagedBlock as error:
            assert "copy.shard is damaged at byte" in str(error)
            unreadable.add(row)
            assert (text_rows.batch([(lenient, row)], length, 0)["targets"] == text_rows.IGNORE).all()
        else:
            left, right = (text_rows.batch([(rows, row)], length, 0) for rows in (whole, lenient))
            assert all((left[key] == right[key]).all() for key in left)
    in_a_block = BLOCK // 4
    assert len(unreadable) >= (in_a_block if place == "token" else shard.tokens) // length
    assert lenient.damaged == unreadable and not whole.damaged
    (line,) = capsys.readouterr().out.splitlines()  # once a block, not once a row
    assert f"a: the rows that touch a damaged block are left out: {tmp_path}/copy.shard is damaged at byte" in line


def test_a_block_is_checked_once(large, monkeypatch):
    path, _ = large
    sums = []
    monkeypatch.setattr(shards.zlib, "crc32", lambda data, crc32=zlib.crc32: sums.append(len(data)) or crc32(data))
    part = Part("a", [path])
    sums.clear()
    for _ in range(3):
        part.read(0, part.tokens)
        part.read(5, 9)
    shard = part.shards[0]
    assert len(sums) == shard.num_blocks and sum(sums) == shard.checks_at - shard.body_at


def test_a_file_that_was_not_copied_whole_is_refused(large, tmp_path):
    content, copy = large[0].read_bytes(), tmp_path / "copy.shard"
    for size in (0, 7, 19, 20, 100, len(content) // 2, len(content) - 33, len(content) - 1, len(content) + 1):
        copy.write_bytes((content + b"\0")[:size])
        for check in (Shard, verify):
            with pytest.raises(UserError, match="copy.shard"):
                check(copy)
    copy.write_bytes(b"PAR1" * 100)
    with pytest.raises(UserError, match="is not a shard"):
        Shard(copy)
    with pytest.raises(UserError, match="nothere.shard cannot be read"):
        Shard(tmp_path / "nothere.shard")
    with pytest.raises(UserError, match="version 2, this program reads 1"):
        copy.write_bytes(content[:8] + struct.pack("<I", 2) + content[12:])
        Shard(copy)


def test_what_is_interrupted_leaves_no_shard(tmp_path):
    one_shard(tmp_path / "00000.shard", [np.arange(12)])
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "00001.shard", **ABOUT) as writer:
        writer.add(np.arange(5), 1)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["00000.shard"]
    verify(tmp_path / "00000.shard")


def test_few_shards_stay_mapped_and_all_stay_readable(documents, paths, monkeypatch):
    """A corpus has more shards than a process may have files open."""
    monkeypatch.setattr(shards, "MOST_MAPPED", 3)
    monkeypatch.setattr(Shard, "mapped", shards.collections.deque())
    part, stream = Part("wiki.zh", paths), np.concatenate(documents)
    for start in np.random.default_rng(2).integers(0, len(stream) - 500, size=200).tolist():
        np.testing.assert_array_equal(part.read(start, start + 500)[0], stream[start : start + 500])
        assert sum(shard.bytes is not None for shard in part.shards) <= 3


def test_a_shard_of_another_vocabulary_is_no_part_of_this_one(tmp_path):
    first = one_shard(tmp_path / "00000.shard", [np.arange(3)])
    for key, value in (("tokenizer_sha256", "e" * 64), ("language", "en"), ("source", "web"), ("vocab_size", 5)):
        other = one_shard(tmp_path / "00001.shard", [np.arange(3)], **{key: value})
        with pytest.raises(UserError, match=f"00001.shard does not belong to wiki.zh: its {key} is {value}"):
            Part("wiki.zh", [first, other])


@pytest.fixture
def prepared(tmp_path, documents) -> Path:
    aside, final = tmp_path / "aside", tmp_path / "run" / "final"
    final.parent.mkdir()
    tables = {}
    for use, some in (("train", documents), ("held-back", documents[:5])):
        files = written(aside / use / "wiki.zh", some, shard_tokens=50_000)
        tables[use] = {
            "wiki.zh": {
                "tokens": sum(map(len, some)),
                "documents": len(some),
                "files": [str(f.relative_to(aside)) for f in files],
            }
        }
    (aside / "tokenizer").mkdir()
    (aside / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "<|extra_204|>"}')
    about = {"parts": tables["train"], "held_back": tables["held-back"], "tokenizer_sha256": "f" * 64}
    checkpoint.commit(aside, final, **about)
    return final


def test_a_prepared_folder_opens_with_all_its_parts(prepared, documents):
    for folder in (prepared, prepared.parent, str(prepared)):
        opened = Prepared(folder)
        assert list(opened.parts) == list(opened.held_back) == ["wiki.zh"]
        assert opened.tokenizer_folder == prepared / "tokenizer"
        assert opened.sha256 == hashlib.sha256((prepared / "MANIFEST.json").read_bytes()).hexdigest()
        np.testing.assert_array_equal(
            opened.parts["wiki.zh"].read(0, opened.parts["wiki.zh"].tokens)[0], np.concatenate(documents)
        )
        assert opened.held_back["wiki.zh"].documents == 5


def test_a_prepared_folder_that_is_not_whole_says_what_is_missing(prepared, tmp_path):
    with pytest.raises(UserError, match="no MANIFEST.json there; give the final/"):
        Prepared(tmp_path / "elsewhere")
    shard = prepared / "train/wiki.zh/00001.shard"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match="00001.shard is missing, or has not the"):
        Prepared(prepared)
    shard.unlink()
    with pytest.raises(UserError, match="00001.shard is missing"):
        Prepared(prepared)
    shard.write_bytes(content)
    config = prepared / "tokenizer/tokenizer_config.json"
    config.write_text(config.read_text().replace("204", "205"))
    with pytest.raises(UserError, match="tokenizer_config.json is damaged"):
        Prepared(prepared)
    config.write_text(config.read_text().replace("205", "204"))
    manifest = prepared / "MANIFEST.json"
    about = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(about | {"tokenizer_sha256": "e" * 64}))
    with pytest.raises(UserError, match="MANIFEST.json is damaged"):
        Prepared(prepared)
    del about["manifest_sha256"]
    about["tokenizer_sha256"] = "e" * 64
    manifest.write_text(json.dumps(about | {"manifest_sha256": checkpoint.digest(about)}))
    with pytest.raises(UserError, match="are not those of its MANIFEST"):
        Prepared(prepared)
    manifest.write_text("{}")
    with pytest.raises(UserError, match="is damaged or not that of a run of recipe=prepare"):
        Prepared(prepared)
