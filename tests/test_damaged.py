"""A damaged shard block stops a run with file and offset; by option its rows are left out, and the ledger says so."""

import json

import warm
from test_prepare import rows, texts, words
from tiny import tiny_tokenizer, write_jsonl

import train
from aquila_sft.data.shards import BLOCK, Prepared


def test_pretraining_stops_at_a_damaged_block_or_leaves_its_rows_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer(tmp_path / "tok")
    english = [t for t in texts(1200) if t.isascii()]
    write_jsonl(
        tmp_path / "a.jsonl",
        rows([f"{a} {b} {i}" for i, (a, b) in enumerate(zip(english, english[::-1], strict=True))]),
    )
    command = words(tmp_path / "tok", tmp_path / "out", tmp_path / "a.jsonl")
    assert train.main([word for word in command if "shard_tokens" not in word]) == 0
    made = Prepared(tmp_path / "out")
    shard = max((shard for shard in made.parts["text.en"].shards), key=lambda shard: shard.tokens)
    offset = shard.body_at + BLOCK * ((shard.num_blocks - 1) // 2)
    content = bytearray(shard.path.read_bytes())
    content[offset + 7] ^= 1
    shard.path.write_bytes(content)
    command = [
        *("recipe=pretrain", "scale=mini", f"data.shards={made.folder}", f"output_dir={tmp_path}/run"),
        *("train.max_steps=4", "train.max_length=64", "train.tokens_per_step=2048", "data.languages=null"),
        *("data.sources=null", "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16"),
        *("data.max_epochs=1000", "seed=3"),
    ]
    stopped = warm.run(command)
    assert stopped.returncode == 2, stopped.stderr
    assert f"{shard.path} is damaged at byte {offset} (block " in stopped.stderr
    done = warm.run([*command, "data.damaged_blocks=leave_out"])
    assert done.returncode == 0, done.stderr
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    entry, part = ledger["damaged"]["text.en"], ledger["parts"]["text.en"]
    assert entry["tokens"] == 64 * entry["rows"] and 0 < entry["rows"] < part["rows"]
    assert part["targets"] <= 64 * (part["rows"] - entry["rows"])
    assert f"text.en: the rows that touch a damaged block are left out: {shard.path} is damaged at" in done.stdout
