"""The comparison with TRL's own command is fair: it trains on the ids and labels that we do."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from tiny import tiny_conversations, tiny_model, tiny_tokenizer, write_jsonl
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from aquila_sft.data.rows import IGNORE, PackedRows

PATH = Path(__file__).parents[1] / "recipes/study/beside_trl.py"
spec = importlib.util.spec_from_file_location("beside_trl", PATH)
beside_trl = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = beside_trl
spec.loader.exec_module(beside_trl)


def test_trl_trains_on_our_ids_and_labels_in_both_languages(tmp_path):
    tiny_model(tmp_path / "tiny", tiny_tokenizer(tmp_path / "tok"))
    data = write_jsonl(tmp_path / "chat.jsonl", tiny_conversations(24))
    words = f"model.path={tmp_path / 'tiny'} data.files={data} train.max_length=256 train.tokens_per_step=512 "
    words += "train.max_steps=1 data.holdout_max=2 data.workers=1 data.clean.detector=script optim.lr=2e-3"
    about = beside_trl.prepare(words.split(), tmp_path)
    flags = beside_trl.trl_flags(about, beside_trl.packings(about)["bfd, 1 x 2 rows"], tmp_path / "trl", steps=1)
    _, settings, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(flags)
    is_bf16 = about["precision"] == "bf16"
    assert (settings.activation_checkpointing, settings.packing, settings.bf16) == (False, True, is_bf16)
    assert (settings.learning_rate, settings.optim, settings.weight_decay) == (2e-3, "adamw_torch_fused", 0)
    conversations = load_dataset(str(tmp_path / "conversations"), cache_dir=str(tmp_path / "datasets"))["train"]
    assert {"河" in str(c) or "请" in str(c) for c in conversations["messages"]} == {True, False}
    trainer = SFTTrainer(model=model.model_name_or_path, args=settings, train_dataset=conversations)
    batch = trainer.data_collator(list(trainer.train_dataset))

    rows = PackedRows(Path(about["prepared"]) / "train")
    ours = rows.batch(range(len(rows)), 256, trainer.processing_class.pad_token_id)
    assert about["rows"] == 2 < len(rows) and set(pieces(batch)) <= set(pieces(ours))
    assert len(pieces(batch)) == len(conversations) == about["conversations"]
    supervised = sum((label != IGNORE) for _, labels in pieces(batch) for label in labels)
    assert about["supervised"] == supervised / sum(len(ids) for ids, _ in pieces(batch))


def pieces(batch):
    """(ids, labels) of each conversation of a batch, padding among them."""
    ids, labels, positions = (batch[name].flatten().tolist() for name in ("input_ids", "labels", "position_ids"))
    starts = [i for i, position in enumerate(positions) if position == 0]
    return [(tuple(ids[a:b]), tuple(labels[a:b])) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def test_a_conversation_that_trl_would_tokenize_otherwise_stops_the_comparison(tmp_path):
    tiny_model(tmp_path / "tiny", tiny_tokenizer(tmp_path / "tok"))
    rows = tiny_conversations(2)
    rows[0]["conversations"][1]["value"] = "The mark is <|im_end|> there."
    data = write_jsonl(tmp_path / "chat.jsonl", rows)
    words = f"model.path={tmp_path / 'tiny'} data.files={data} train.max_length=256 train.tokens_per_step=256 "
    with pytest.raises(SystemExit, match="TRL would train on other tokens of this conversation"):
        beside_trl.prepare((words + "train.max_steps=1 data.holdout_fraction=0").split(), tmp_path)


def test_data_that_is_not_there_is_one_line(tmp_path):
    tiny_model(tmp_path / "tiny", tiny_tokenizer(tmp_path / "tok"))
    words = [f"model.path={tmp_path}/tiny", f"data.files={tmp_path}/none.jsonl", "train.max_steps=1"]
    done = subprocess.run([sys.executable, str(PATH), *words, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.startswith(f"error: data.files={tmp_path}/none.jsonl: no such file")
        and "\n" not in done.stderr[:-1]
    )
