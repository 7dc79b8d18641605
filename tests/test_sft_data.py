"""From files to rows: readers, shapes, the ledger, the length policy, packing."""

import gzip
import json
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tiny import tiny_conversations, tiny_tokenizer, write_jsonl

from aquila_sft import chat_template
from aquila_sft.data import conversations, packing, sft_set, sources
from aquila_sft.data.rows import PackedRows, RowOrder
from aquila_sft.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture
def encode(tokenizer):
    return partial(chat_template.encode_batch, tokenizer)


def policy(**changes) -> sft_set.RowPolicy:
    return sft_set.RowPolicy(
        **{"max_length": 128, "holdout_fraction": 0.0, "holdout_max": 100, "pack_window": 1000, "seed": 3} | changes
    )


def turn(role: str, text: str) -> dict:
    return {"from": role, "value": text}


def test_every_file_kind_gives_the_same_records(tmp_path):
    rows = [{"id": i, "conversations": [turn("human", f"问 {i}\u0085\u2028"), turn("gpt", "答")]} for i in range(5)]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in sources.find([str(tmp_path / "a.*")]):
        assert [record for _, record in sources.read(file)] == rows, file


def test_a_bad_line_is_a_record_of_its_own_and_ends_nothing(tmp_path):
    lines = [b'{"a": 1}', b"{broken", b"", b"[1]", b"\xff\xfe", b'{"a": %s}' % (b"9" * 5000), b"[" * 9999, b'{"a": 2}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = list(sources.read(tmp_path / "a.jsonl"))
    assert [r for _, r in found] == [{"a": 1}, None, None, None, None, None, {"a": 2}]
    assert [w.rsplit(":", 1)[1] for w, _ in found] == ["1", "2", "4", "5", "6", "7", "8"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", b'[{"a": 1},]', "a.json:1: not JSON"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.txt", b"hello", "unknown kind of file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_stops_with_its_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        for file in sources.find([str(tmp_path / name)]):
            list(sources.read(file))


def test_missing_files_and_folders_are_named(tmp_path):
    for pattern in ("no.jsonl", "*.jsonl"):
        with pytest.raises(UserError, match="no such file"):
            sources.find([str(tmp_path / pattern)])
    with pytest.raises(UserError, match="is a folder"):
        sources.find([str(tmp_path)])


def test_three_shapes_say_the_same():
    wanted = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for record in (
        {"conversations": [turn("human", "hi"), turn("gpt", "hello")]},
        {"conversations": [turn("user", "hi"), turn("chatgpt", "hello")], "messages": None},
        {
            "conversations": None,
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "hel"}, {"type": "text", "value": "lo"}]},
            ]
        },
        {"conversations": [turn("system", " "), turn("human", "hi"), turn("gpt", "hello"), turn("human", "and?")]},
    ):
        assert conversations.normalise(record, "f").messages == wanted


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([turn("human", "hi")], "no assistant turn"),
        ([], "no turns"),
        ([turn("gpt", "hi")], "begins with an answer"),
        ([turn("human", "a"), turn("gpt", "")], "empty turn"),
        ([turn("human", "a"), turn("critic", "b")], "unknown role 'critic'"),
        ([turn("human", "a"), turn("tool", "b"), turn("gpt", "c")], "turns of tools"),
        ([turn("human", "a"), turn("human", "b"), turn("gpt", "c")], "two turns of one role in a row"),
        ([turn("human", "a"), turn("system", "b"), turn("gpt", "c")], "system turn not at the beginning"),
        (["hi"], "a turn is not an object"),
        ([turn("human", 5), turn("gpt", "a")], "content that is not text"),
        ([turn("human", "a\ud800"), turn("gpt", "b")], "text that is not valid Unicode"),
        ([turn("human", [{"type": "image"}]), turn("gpt", "b")], "content that is not text"),
    ],
)
def test_a_record_that_is_no_conversation_says_why(turns, reason):
    with pytest.raises(conversations.Refused, match=reason):
        conversations.normalise({"conversations": turns}, "f")


@pytest.mark.parametrize(
    "text, language",
    [
        ("什么是引力？", "zh"),
        ("What is gravity?", "en"),
        ("用 Python 的 requests 写一个下载文件的函数 def download(url):", "zh"),
        ("print('你好') prints a greeting in Chinese when you run this program", "en"),
        ("こんにちは、元気ですか", "other"),
        ("안녕하세요", "other"),
        ("Привет, как дела?", "other"),
        ("1234", "other"),
    ],
)
def test_language_goes_by_script(text, language):
    assert conversations.language(text) == language


def test_only_answers_and_their_turn_ends_are_labels(tmp_path, tokenizer, encode):
    messages = [
        turn("system", "短一点"),
        turn("human", "hi <|im_end|>"),
        turn("gpt", "hello"),
        turn("human", "再见"),
        turn("gpt", "bye"),
    ]
    write_jsonl(tmp_path / "a.jsonl", [{"conversations": messages}])
    sft_set.prepare([tmp_path / "a.jsonl"], tmp_path / "d", encode, policy(), {})
    batch = PackedRows(tmp_path / "d/train").batch([0], 128, tokenizer.pad_token_id)
    labels = batch["labels"][0].tolist()
    supervised = [i for i, label in enumerate(labels) if label != -100]
    assert tokenizer.decode([labels[i] for i in supervised]) == "hello<|im_end|>bye<|im_end|>"
    assert all(batch["input_ids"][0, i] == labels[i] for i in supervised)


def test_positions_restart_and_packed_rows_hold_whole_conversations_once(tmp_path, tokenizer, encode):
    write_jsonl(tmp_path / "a.jsonl", tiny_conversations(150))
    ledger = sft_set.prepare([tmp_path / "a.jsonl"], tmp_path / "d", encode, policy(), {})
    rows = PackedRows(tmp_path / "d/train")
    seen, tokens = [], 0
    for row in range(len(rows)):
        batch = rows.batch([row], 128, tokenizer.pad_token_id)
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        items = rows.items(row).tolist()
        lengths = [int(rows.offsets[i + 1] - rows.offsets[i]) for i in items]
        assert starts[: len(items)] == [sum(lengths[:n]) for n in range(len(items))]
        assert (batch["labels"][0][starts] == -100).all()
        assert (batch["input_ids"][0, sum(lengths) :] == tokenizer.pad_token_id).all()
        seen += items
        tokens += sum(lengths)
    assert sorted(seen) == list(range(ledger["kept"]))
    assert tokens == ledger["tokens"] == rows.row_tokens().sum()


def test_an_overlong_conversation_loses_whole_leading_exchanges_or_is_left_out(tmp_path, tokenizer, encode):
    long = [
        t
        for i in range(12)
        for t in (turn("human", f"question {i} " + "word " * 5), turn("gpt", f"answer {i} " + "word " * 5))
    ]
    write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"conversations": [turn("system", "Be brief."), *long]},
            {"conversations": [turn("human", "hi"), turn("gpt", "word " * 400)]},
        ],
    )
    ledger = sft_set.prepare([tmp_path / "a.jsonl"], tmp_path / "d", encode, policy(), {})
    rows = PackedRows(tmp_path / "d/train")
    text = tokenizer.decode(rows.tokens[:])
    assert "Be brief." in text and "answer 11" in text and "question 0 " not in text
    assert text.count("question") == text.count("answer") and text.endswith("<|im_end|>\n")
    longer = chat_template.encode_messages(
        tokenizer,
        [
            {"role": "system", "content": "Be brief."},
            *conversations.normalise({"conversations": long[-2 * (text.count("answer") + 1) :]}, "").messages,
        ],
    )
    assert len(longer[0]) > 128, "one exchange more would have fitted"
    assert ledger["shortened"] == 1 and ledger["kept"] == 1
    assert ledger["reasons"]["longer than a row"]["records"] == 1


def test_the_ledger_accounts_for_every_record(tmp_path, encode):
    good = tiny_conversations(40)
    bad = [
        {"conversations": [turn("human", "only a question?")], "source": "s1"},
        {"text": "no shape"},
        {"conversations": [turn("human", "你好吗"), turn("gpt", "")]},
    ]
    write_jsonl(tmp_path / "a.jsonl", good + bad)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{not json\n")
    ledger = sft_set.prepare([tmp_path / "a.jsonl"], tmp_path / "d", encode, policy(holdout_fraction=0.2), {})
    assert ledger["read"] == 44 == ledger["kept"] + ledger["held_back"] + ledger["left_out"]
    assert ledger["left_out"] == 4 == sum(r["records"] for r in ledger["reasons"].values())
    assert ledger["reasons"]["not a JSON object"]["first"][0].endswith("a.jsonl:44")
    assert ledger["reasons"]["empty turn"]["by_language"] == {"zh": 1}
    assert ledger["by_source"]["s1"]["left_out"] == 1
    assert set(ledger["by_language"]) >= {"zh", "en"} and ledger["held_back"] > 0


def test_nothing_left_to_train_on_is_an_error_with_reasons(tmp_path, encode):
    write_jsonl(tmp_path / "a.jsonl", [{"conversations": [turn("human", "hi")]}] * 3)
    with pytest.raises(UserError, match="3 records read from a.jsonl; left out for: no assistant turn: 3"):
        sft_set.prepare([tmp_path / "a.jsonl"], tmp_path / "d", encode, policy(), {})


def test_prepared_rows_are_reused_under_the_same_key_only(tmp_path, encode):
    write_jsonl(tmp_path / "a.jsonl", tiny_conversations(20))
    files = [tmp_path / "a.jsonl"]

    def stamp(**changes) -> int:
        sft_set.prepare(files, tmp_path / "d", encode, policy(**changes), {"data": "x"})
        return os.stat(tmp_path / "d/prepared.json").st_mtime_ns

    first = stamp()
    assert stamp() == first
    assert stamp(max_length=96) != first


def test_packing_puts_each_conversation_in_one_row_for_any_lengths():
    random.seed(0)
    for _ in range(200):
        capacity = random.randint(1, 60)
        lengths = np.array([random.randint(1, capacity) for _ in range(random.randint(0, 80))], dtype=np.int64)
        rows = packing.pack(lengths, capacity, window=random.choice([1, 7, 1000]), seed=1)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(0 < lengths[row].sum() <= capacity for row in rows)
    assert packing.pack(np.array([5, 3, 2, 4]), 8, window=10, seed=0) in ([[0, 1], [3, 2]],)
    with pytest.raises(ValueError, match="61 tokens"):
        packing.pack(np.array([61]), 60, window=1, seed=0)


def test_packing_fills_rows():
    lengths = np.random.default_rng(0).integers(20, 700, 5000)
    rows = packing.pack(lengths, 1024, window=8192, seed=0)
    assert lengths.sum() / (1024 * len(rows)) > 0.98


def test_the_order_is_a_pure_function_of_seed_and_place():
    order = RowOrder(10, 5, end=25)
    places = [order(p) for p in range(30)]
    assert sorted(places[:10]) == sorted(places[10:20]) == list(range(10)) and places[:10] != places[10:20]
    assert places[25:] == [-1] * 5
    other = RowOrder(10, 5, end=25)
    assert [other(p) for p in (24, 3, 17)] == [places[p] for p in (24, 3, 17)]
    assert [RowOrder(10, 6, end=25)(p) for p in range(10)] != places[:10]


def test_a_blank_row_supervises_nothing(tmp_path, tokenizer, encode):
    write_jsonl(tmp_path / "a.jsonl", tiny_conversations(5))
    sft_set.prepare([tmp_path / "a.jsonl"], tmp_path / "d", encode, policy(), {})
    batch = PackedRows(tmp_path / "d/train").batch([-1], 16, tokenizer.pad_token_id)
    assert (batch["labels"] == -100).all() and (batch["input_ids"] == tokenizer.pad_token_id).all()
    assert batch["position_ids"].tolist() == [list(range(16))]


@pytest.mark.real_data
def test_real_conversations_are_all_accounted_for(tmp_path, encode):
    if "AQUILA_REAL_DATA" not in os.environ:
        pytest.skip("AQUILA_REAL_DATA is not set")
    root = Path(os.environ["AQUILA_REAL_DATA"])
    files = sources.find(
        [
            str(root / f"instruct_{n}/*.jsonl")
            for n in ("infinity_schema", "emollm_zh_system", "sharegpt_zh", "dolly_en", "flagai_aquila")
        ]
        + [str(root / "instruct_messy_real/messy.jsonl"), str(root / "instruct_llamafactory_demos/v1_sft_demo.jsonl")]
    )
    ledger = sft_set.prepare(files, tmp_path / "d", encode, policy(max_length=1024), {})
    assert ledger["read"] == sum(1 for f in files for line in open(f, "rb") if line.strip())
    assert ledger["read"] == ledger["kept"] + ledger["held_back"] + ledger["left_out"]
    assert ledger["by_language"]["zh"]["kept"] > 1000 and ledger["by_language"]["en"]["kept"] > 1000
    with pytest.raises(UserError, match="not JSON"):
        list(sources.read(root / "instruct_messy_real/broken_array_trailing_comma.json"))
