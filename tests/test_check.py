"""recipe=check: what is wrong is found by checks that know no single case, what is sound is left in peace."""

import copy
import functools
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from omegaconf.errors import OmegaConfBaseException
from tiny import SENTENCES, tiny_conversations, tiny_model, tiny_tokenizer, write_jsonl
from transformers import AutoTokenizer

from aquila_sft import checkpoint, cli, schedule
from aquila_sft.config.model import Schedule, ScheduleKind
from aquila_sft.doctor import findings
from aquila_sft.doctor.curve import Curve, Phase, plot
from aquila_sft.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
program = importlib.import_module("train")


compose = program.compose


@functools.cache
def composed_once(words: tuple[str, ...]):
    return compose(list(words))


def compose_less(words: list[str]):
    """program.compose takes half a second, most of these tests: what they have in common is composed once.

    Settings of the form group.key=value are then set; what cannot be set that way goes the whole way.
    """
    cli.prepare_overrides(words)
    apart = ("data.languages", "data.sources", "data.files")
    plain = [w for w in words if re.match(r"[a-z]+\.\w+=", w) and not w.startswith((*apart, "machine."))]
    if "recipe=check" in words:
        own = [w for w in words if w.startswith(("recipe=check", "of=", "scale=", "machine.", "sample="))]
        cfg = copy.deepcopy(composed_once(tuple(own)))
        others = [w for w in words if w not in own or w.startswith(("of=", "scale="))]
        cfg.words = [w.replace("of=", "recipe=", 1) if w.startswith("of=") else w for w in others]
        return cfg
    cfg = copy.deepcopy(composed_once(tuple(w for w in words if w not in plain)))
    lengths = [w for w in plain if w.split("=")[0] in cli.RUN_LENGTHS]
    if len(lengths) == 1:
        plain = [*(f"{name}=null" for name in cli.RUN_LENGTHS), *plain]
    try:
        cfg.merge_with_dotlist(plain)
    except OmegaConfBaseException:
        return compose(words)
    return cfg


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    if "as_typed" not in request.node.name:
        monkeypatch.setattr(program, "compose", compose_less)


def check(*words, capsys) -> tuple[int, str]:
    """Exit status and what is printed."""
    with mock.patch.dict(os.environ):
        status = program.main(["recipe=check", *map(str, words)])
    return status, capsys.readouterr().out


def found(printed: str) -> dict[str, str]:
    """The findings by code: their line."""
    lines = (re.fullmatch(r"(?:error|warning) +(.*) \[([\w-]+)\]", line) for line in printed.split("\n"))
    return {line[2]: line[0] for line in lines if line}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a vocabulary, shards, conversations, and bases in several states."""
    folder = tmp_path_factory.mktemp("check")
    tokenizer = tiny_tokenizer(folder / "tok")
    records = []
    for lines in ([s for s in SENTENCES if s.isascii()], [s for s in SENTENCES if not s.isascii()]):
        records += [{"text": f"{i}. {' '.join((lines[i % 20 :] + lines)[:8])}"} for i in range(80)]
    write_jsonl(folder / "wiki.jsonl", records)
    write_jsonl(folder / "chat.jsonl", tiny_conversations(60))
    write_jsonl(folder / "bad.jsonl", [*tiny_conversations(20), *({"conversations": []} for _ in range(9))])
    write_jsonl(folder / "none.jsonl", [{"conversations": []}])
    twice = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "<|im_start|>assistant\nHello.<|im_end|>"}]
    write_jsonl(folder / "rendered.jsonl", [*tiny_conversations(20), {"conversations": twice}])
    with mock.patch.dict(os.environ):
        status = program.main(
            [
                "recipe=prepare",
                "scale=mini",
                f"data.files={{wiki: {folder}/wiki.jsonl}}",
                f"tokenizer.path={folder}/tok",
                f"output_dir={folder}/shards",
                "prepare.holdout_fraction=0.1",
            ]
        )
    assert status == 0
    for name, rate in (("stable", 4e-3), ("decayed", 2e-6)):  # runs of recipe=pretrain, as far as a check looks
        base = folder / name / "checkpoints" / "step-000100"
        tiny_model(base, tokenizer)
        (base / "optimizer.pt").touch()
        rates = [{"step": step, "lr": lr, "tokens_per_s": 500.0} for step, lr in ((50, 4e-3), (100, rate))]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in rates))
    tiny_model(folder / "published", tokenizer)
    zeroed = tiny_model(folder / "zeroed", tokenizer)  # the marks of the template
    zeroed.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])] = 0
    zeroed.save_pretrained(folder / "zeroed")
    shutil.copytree(folder / "published", folder / "pickled")
    os.rename(folder / "pickled/model.safetensors", folder / "pickled/pytorch_model.bin")
    for name, file in (("half", "model.safetensors"), ("no-json", "config.json")):
        shutil.copytree(folder / "published", folder / name)
        content = (folder / name / file).read_bytes()
        (folder / name / file).write_bytes(content[: len(content) // 2])
    plain = AutoTokenizer.from_pretrained(folder / "tok")
    state = json.loads((folder / "tok/tokenizer.json").read_text("utf-8"))
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<|im_")]
    save_tokenizer(plain, folder / "no-chat")
    (folder / "no-chat/tokenizer.json").write_text(json.dumps(state), "utf-8")
    shutil.copytree(folder / "shards/final", folder / "swapped")  # shards, and a vocabulary that is not theirs
    other = folder / "swapped/tokenizer/tokenizer.json"
    other.write_text(other.read_text("utf-8").replace('"<|extra_203|>"', '"<|extra_205|>"'), "utf-8")
    manifest = json.loads((folder / "swapped/MANIFEST.json").read_text("utf-8"))
    manifest["files"]["tokenizer/tokenizer.json"] = {"size": other.stat().st_size, "sha256": checkpoint.sha256(other)}
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = checkpoint.digest(manifest)
    (folder / "swapped/MANIFEST.json").write_text(json.dumps(manifest))
    return folder


PRETRAIN = "of=pretrain scale=mini data.shards={here}/shards data.sources=null data.max_epochs=1000"
BIG = "of=pretrain scale=135m machine.device=cuda machine.memory_gb=80 machine.disk_gb=5000"
ANNEAL = "of=anneal scale=mini data.shards={here}/shards data.sources=null data.max_epochs=1000"
STABLE = ANNEAL + " model.path={here}/stable/checkpoints/step-000100"
SFT = "of=sft scale=mini model.path={here}/published data.files={here}/chat.jsonl train.max_length=256"
LORA = SFT.replace("of=sft", "of=sft_lora")

BROKEN = [
    # other people's mistakes, as far as they can be made here
    # smollm#105: the first phase decays to 0, the next goes on at the full rate
    (ANNEAL + " model.path={here}/decayed/checkpoints/step-000100", "rate-jumps-up", "fallen to 2e-06"),
    (PRETRAIN + " schedule=cosine schedule.min_lr_ratio=1.0", "rate-never-falls", "0.004"),  # TinyLlama#27
    (PRETRAIN + " schedule.decay_steps=0.2 schedule.min_lr_ratio=1.0", "rate-never-falls", "schedule.min_lr_ratio"),
    # the learning rate
    (PRETRAIN + " optim.lr=0", "rate-zero", "100% of the run"),
    (PRETRAIN + " schedule.warmup_steps=2000", "rate-below-peak", "schedule.warmup_steps"),
    (PRETRAIN + " schedule.warmup_steps=0.6", "warmup-long", "rises for 60%"),
    (PRETRAIN + " schedule.warmup_steps=0", "no-warmup", "schedule.warmup_steps=0"),
    (PRETRAIN + " schedule.decay_steps=5000", "no-stable-phase", "schedule.decay_steps=5000"),
    (PRETRAIN + " schedule.decay_steps=0.01", "decay-short", "1.0% of the run"),
    (PRETRAIN + " schedule.decay_steps=0.8", "decay-long", "80% of the run"),
    (PRETRAIN + " schedule=cosine schedule.min_lr_ratio=0.7", "rate-hardly-falls", "70%"),
    (STABLE + " schedule=constant", "anneal-without-decay", "schedule.kind=constant"),
    (STABLE + " optim.lr=1e-4", "rate-jumps-down", "0.004"),
    (PRETRAIN + " optim.lr=0.5", "rate-large", "optim.lr=0.5"),
    (PRETRAIN + " optim.lr=1e-9", "rate-small", "optim.lr=1e-09"),
    # the optimizer
    (PRETRAIN + " optim.eps=0", "eps-zero", "optim.eps=0"),
    (PRETRAIN + " optim.eps=1e-3", "eps-large", "optim.eps=0.001"),
    (PRETRAIN + " optim.betas=[0.95,0.9]", "betas-swapped", "[0.95, 0.9]"),
    (PRETRAIN + " optim.betas=[0.9,0.9999]", "beta-long", "10,000 steps"),
    (PRETRAIN + " optim.weight_decay=50", "decay-eats-weights", "20% of every matrix"),
    (PRETRAIN + " optim.weight_decay=1", "weight-decay-large", "optim.weight_decay=1"),
    (PRETRAIN + " optim.max_grad_norm=0", "no-clipping", "optim.max_grad_norm=0"),
    # lengths and portions
    (BIG + " train.total_tokens=1000000", "one-step", "train.tokens_per_step=1,179,648"),
    (PRETRAIN + " train.max_steps=1000 train.save_steps=900", "saved-rarely", "90%"),
    (PRETRAIN + " train.keep_checkpoints=1", "one-checkpoint", "train.keep_checkpoints=1"),
    (PRETRAIN + " train.logging_steps=500", "logged-never", "train.logging_steps=500 of 196"),
    (PRETRAIN + " train.eval_steps=500", "evaluated-never", "train.eval_steps=500"),
    (PRETRAIN + " train.micro_batch_rows=3", "portions", "train.micro_batch_rows=3"),
    (PRETRAIN + " machine.processes=3", "portions", "not a multiple of processes"),
    (PRETRAIN + " train.tokens_per_step=1000", "setting", "896 or 1024"),
    (PRETRAIN + " train.max_steps=5 train.num_epochs=1", "setting", "exactly one"),
    (PRETRAIN + " optim.lrr=1e-4", "setting", "did you mean optim.lr?"),
    # the model
    (PRETRAIN + " train.max_length=1024", "rows-too-long", "512 positions"),
    (PRETRAIN + " model.sliding_window=32", "window-bites", "model.sliding_window=32"),
    (PRETRAIN + " model.initializer_range=0.9", "init-off", "0.0884"),
    (PRETRAIN + " model.rope_theta=2", "theta-small", "model.rope_theta=2"),
    (PRETRAIN + " model.rms_norm_eps=0.1", "norm-eps", "model.rms_norm_eps=0.1"),
    (LORA + " lora.r=512", "rank-too-large", "lora.r=512"),
    (LORA + " lora.alpha=0", "adapter-off", "lora.alpha=0"),
    (LORA + " lora.alpha=1024", "adapter-scale", "multiplied by 64"),
    # what it takes
    ("of=pretrain scale=135m machine.device=cpu machine.memory_gb=4", "memory", "train.micro_batch_rows"),
    (BIG + " machine.disk_gb=3", "disk", "train.save_steps"),
    (PRETRAIN + " machine.measured_by={here}/shards", "input", "no tokens_per_s"),
    # shards, vocabulary and base
    (PRETRAIN + " data.max_epochs=1", "epochs", "data.max_epochs=1"),
    (PRETRAIN + " data.languages={{fr:1}}", "input", "data.languages.fr=1"),
    (PRETRAIN + " data.languages={{en:9999,zh:1}}", "input", "less than one row"),
    (PRETRAIN + " data.shards=/no/where", "input", "data.shards=/no/where"),
    (PRETRAIN + " model.vocab_size=300", "vocabulary-small", "model.vocab_size=300"),
    (PRETRAIN + " model.vocab_size=50000", "vocabulary-large", "model.vocab_size=50,000"),
    (PRETRAIN.replace("/shards ", "/swapped "), "tokenizer-changed", "recorded"),
    (ANNEAL + " model.path={here}/published", "no-moments", "optimizer.pt"),
    (ANNEAL + " model.path={here}/pickled", "input", "no *.safetensors"),
    (ANNEAL + " model.path={here}/shards", "input", "holds no model"),
    (PRETRAIN + " output_dir={here}", "input", "no run directory"),
    # conversations
    (SFT + " data.files=/no/where.jsonl", "input", "data.files=/no/where.jsonl"),
    (SFT + " data.files={here}/none.jsonl", "input", "no conversation is left"),
    (SFT + " data.files={here}/bad.jsonl", "left-out", "9 of 29"),
    (SFT + " train.max_length=70 train.tokens_per_step=1050", "left-out", "longer than a row"),
    (SFT + " train.max_length=93 train.tokens_per_step=1023", "shortened", "train.max_length=93"),
    (SFT + " data.holdout_fraction=0", "nothing-held-back", "data.holdout_fraction=0"),
    (SFT + " data.files={here}/rendered.jsonl", "special-text", "<|im_end|>"),
    (SFT + " train.max_length=70 train.tokens_per_step=1050", "answers-lost", "train.max_length=70"),
    (SFT + " tokenizer.system=Kurz.", "template-of-base", "tokenizer.system="),
    (LORA + " model.path={here}/zeroed", "untrained-ids", "its row is zero"),
    (SFT + " model.path={here}/zeroed", "untrained-ids", "full tuning trains them"),
    (SFT + " train.num_epochs=50", "many-epochs", "50 times"),
    (SFT + " train.num_epochs=1 train.tokens_per_step=131072", "blank-rows", "131,072"),
    (SFT + " tokenizer.path={here}/no-chat", "input", "<|im_start|>"),
    (LORA + " tokenizer.path={here}/no-chat tokenizer.add_chat_tokens=true", "input", "never be trained"),
    (SFT + " data.text.share=0.2 data.text.shards=/no/where", "input", "data.text.shards="),
    (SFT + " data.text.share=0.2 data.text.shards={here}/swapped", "input", "another vocabulary"),
    (
        SFT + " data.text.share=0.2 data.text.shards={here}/shards data.text.sources={{x:1}}",
        "input",
        "data.text.sources.x",
    ),
    (SFT + " data.text.share=1", "setting", "data.text.share=1"),
    (ANNEAL + " model.path={here}/half", "input", "not fully covered"),
    (ANNEAL + " model.path={here}/no-json", "input", "cannot be loaded"),
    # text
    ("of=tokenizer scale=mini data.files={here}/wiki.jsonl bpe.vocab_size=100", "input", "bpe.vocab_size=100"),
    ("of=tokenizer scale=mini data.files={here}/wiki.jsonl bpe.vocab_size=9000", "little-text", "9,000"),
    ("of=tokenizer scale=135m tokenizer.ranks=/no/ranks", "input", "/no/ranks"),
    ("of=prepare scale=mini data.files={here}/wiki.jsonl tokenizer.path=/no/tok", "input", "tokenizer.path=/no/tok"),
    ("of=prepare scale=mini data.files={here}/wiki.jsonl data.text_column=txt", "input", "data.text_column=txt"),
    ("of=prepare scale=mini data.files={here}/wiki.jsonl tokenizer.ranks={here}/wiki.jsonl", "input", "tiktoken rank"),
    ("of=prepare scale=mini prepare.decontaminate=/no/items", "input", "prepare.decontaminate=/no/items"),
    ("of=prepare scale=mini prepare.holdout_fraction=0", "nothing-held-back", "prepare.holdout_fraction=0"),
]


@pytest.mark.parametrize("words, code, part", BROKEN, ids=[f"{i}-{case[1]}" for i, case in enumerate(BROKEN)])
def test_a_broken_configuration_is_found(words, code, part, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = dict(word.split("=", 1) for word in words.format(here=here).split())  # a later word replaces an earlier
    status, printed = check(*(f"{key}={value}" for key, value in given.items()), capsys=capsys)
    assert code in found(printed), printed
    assert part in found(printed)[code]
    assert status == (2 if re.search(r"^error ", printed, re.MULTILINE) else 0)
    assert not list(tmp_path.iterdir())


# ---- sound ones ----

SMOLLM = {  # smollm, text/pretraining, commit a0417598, after their learning rates were corrected
    "smollm1-135m": (
        "hidden_size=576 intermediate_size=1536 num_hidden_layers=30 num_attention_heads=9 num_key_value_heads=3 "
        "initializer_range=0.0416",
        "max_steps=600000 tokens_per_step=1048576 micro_batch_rows=8",
        "lr=3e-3 warmup_steps=5000 decay_steps=100000 decay_kind=one_minus_sqrt",
    ),
    "smollm1-360m": (
        "hidden_size=960 intermediate_size=2560 num_hidden_layers=32 num_attention_heads=15 num_key_value_heads=5 "
        "initializer_range=0.03227",
        "max_steps=600000 tokens_per_step=1048576 micro_batch_rows=8",
        "lr=3e-3 warmup_steps=5000 decay_steps=100000 decay_kind=one_minus_sqrt",
    ),
    "smollm1-1.7b": (
        "hidden_size=2048 intermediate_size=8192 num_hidden_layers=24 num_attention_heads=32 num_key_value_heads=32 "
        "initializer_range=0.0221",
        "max_steps=500000 tokens_per_step=2097152 micro_batch_rows=4",
        "lr=5e-4 warmup_steps=2000 decay_steps=100000 decay_kind=one_minus_sqrt",
    ),
    "smollm2-135m": (
        "hidden_size=576 intermediate_size=1536 num_hidden_layers=30 num_attention_heads=9 num_key_value_heads=3 "
        "initializer_range=0.041666667",
        "max_steps=2000000 tokens_per_step=1048576 micro_batch_rows=8",
        "lr=3e-3 warmup_steps=2000 decay_steps=400000 decay_kind=linear",
    ),
    "smollm2-360m": (
        "hidden_size=960 intermediate_size=2560 num_hidden_layers=32 num_attention_heads=15 num_key_value_heads=5 "
        "initializer_range=0.03227",
        "max_steps=2600000 tokens_per_step=1572864 micro_batch_rows=6",
        "lr=3e-3 warmup_steps=2000 decay_steps=520000 decay_kind=linear",
    ),
    "smollm2-1.7b": (
        "hidden_size=2048 intermediate_size=8192 num_hidden_layers=24 num_attention_heads=32 num_key_value_heads=32 "
        "initializer_range=0.02",
        "max_steps=5240000 tokens_per_step=2097152 micro_batch_rows=4",
        "lr=5e-4 warmup_steps=2000 decay_steps=524000 decay_kind=linear",
    ),
    "smollm3-3b": (
        "hidden_size=2048 intermediate_size=11008 num_hidden_layers=36 num_attention_heads=16 num_key_value_heads=4 "
        "initializer_range=0.02 head_dim=128 vocab_size=128256 max_position_embeddings=4096 rope_theta=50000",
        "max_steps=4720000 tokens_per_step=2359296 max_length=4096 micro_batch_rows=1",
        "lr=2e-4 weight_decay=0.1 warmup_steps=2000 decay_steps=522000 decay_kind=linear",
    ),
}
SCHEDULED = ("warmup_steps", "decay_steps", "decay_kind")


def overrides(name: str) -> list[str]:
    model, length, rates = (part.split() for part in SMOLLM[name])
    settings = {
        "model.architecture": "llama",
        "model.sliding_window": "null",
        "model.vocab_size": "49152",
        "model.rope_theta": "10000",
        **{f"model.{key}": value for key, value in (word.split("=") for word in model)},
        **{f"train.{key}": value for key, value in (word.split("=") for word in length)},
        "schedule.min_lr_ratio": "0",
        **{
            f"{'schedule' if key in SCHEDULED else 'optim'}.{key}": value
            for key, value in (word.split("=") for word in rates)
        },
        "machine.processes": "64",
        "machine.device": "cuda",
        "machine.memory_gb": "141",
        "machine.disk_gb": "1e6",
    }
    return ["of=pretrain", "scale=135m", *(f"{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize("name", SMOLLM)
def test_a_corrected_smollm_configuration_raises_no_alarm(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = check(*overrides(name), capsys=capsys)
    assert status == 0 and not found(printed), printed
    steps = int(re.search(r"max_steps=(\d+)", SMOLLM[name][1])[1])
    assert f"{steps:,} of " in printed
    parameters = int(re.search(r"model +([\d,]+) parameters", printed)[1].replace(",", ""))
    told = {"135m": 134.5e6, "360m": 361.8e6, "1.7b": 1711e6, "3b": 3075e6}[name.split("-")[1]]  # of their model cards
    assert parameters == pytest.approx(told, rel=0.002)


@pytest.mark.parametrize("scale", cli.choices("scale"))
@pytest.mark.parametrize("recipe", cli.CHECKED)
def test_no_recipe_here_raises_an_alarm(recipe, scale, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = check(f"of={recipe}", f"scale={scale}", "machine.disk_gb=5000", capsys=capsys)
    assert status == 0 and not found(printed), printed
    assert not list(tmp_path.iterdir())  # nothing is written, nothing built


MIXED = SFT + " data.text.share=0.2 data.text.shards={here}/shards data.packing=false train.loss_per=answer"


@pytest.mark.parametrize(
    "words", [PRETRAIN, STABLE, SFT, LORA, MIXED], ids=["pretrain", "anneal", "sft", "sft_lora", "mixed"]
)
def test_a_sound_run_on_data_that_is_here_raises_no_alarm(words, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = check(*words.format(here=here).split(), capsys=capsys)
    assert status == 0 and not found(printed), printed
    assert "not here yet" not in printed


# ---- curves from elsewhere ----


def nanotron(peak, warmup, start, steps, style) -> object:
    """The schedule of the smollm configurations, in absolute steps."""

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        fallen = min(1.0, max(0, step - start) / steps)
        return peak * (1 - (math.sqrt(fallen) if style == "1-sqrt" else fallen))

    return rate


def warmdown(progress: float) -> float:
    """A constant rate and a linear fall in the second half, not held to 0 … 1."""
    return 1.0 if progress < 0.5 else 1 - (progress - 0.5) / 0.5


@pytest.mark.parametrize(
    "rate, total, peak, code",
    [
        # smollm#37: published with 600,000 steps and a decay from 250,000 over 50,000; here a decay always ends with
        # the run, because it is given from the end
        (nanotron(3e-3, 2500, 250_000, 50_000, "1-sqrt"), 600_000, 3e-3, "rate-zero"),
        (nanotron(3e-3, 5000, 500_000, 100_000, "1-sqrt"), 600_000, 3e-3, None),  # as corrected
        (nanotron(2e-4, 2000, 4_198_001, 522_000, "linear"), 4_720_000, 2e-4, None),  # SmolLM3, corrected
        # nanochat#816: progress runs to 112 %; here steps are counted once, by Plan, and progress is held to 0 … 1
        (lambda step: 0.02 * warmdown(1.12 * (step + 1) / 500), 500, 0.02, "rate-outside"),
        (lambda step: 0.02 * (step + 1) / 500, 500, 0.02, ["warmup-long", "rate-never-falls"]),  # nanochat#68
        (lambda step: 4e-4, 715_256, 4e-4, "rate-never-falls"),  # TinyLlama#27: least and largest are the same
        (lambda step: 4e-4 * max(0.1, 1 - step / 500), 1000, 4e-4, "decay-ends-early"),
        (lambda step: 1e-3 * (1 - (step % 500) / 501), 1000, 1e-3, "rate-rises-again"),
        (lambda step: math.nan if step == 700 else 1e-3 * (1 - step / 1000), 1000, 1e-3, "rate-outside"),
    ],
)
def test_a_curve_of_any_origin_is_judged(rate, total, peak, code):
    judged = list(findings.of_curve(Curve.of(rate, total), peak, falls=True))
    wanted = [code] if isinstance(code, str) else code or []
    assert [f.code for f in judged] == wanted


@pytest.mark.parametrize("kind", ["cosine", "linear", "one_minus_sqrt", "wsd"])
def test_no_schedule_here_can_end_early_or_leave_its_bounds(kind):
    for total in (2, 3, 7, 100, 999, 5000):
        for warmup in (0.0, 0.1, 1.0):
            for decay in (0.1, 0.5, float(total // 2 or 1)):
                cfg = Schedule(
                    kind=ScheduleKind(kind),
                    warmup_steps=warmup,
                    min_lr_ratio=0.0,
                    decay_steps=decay,
                    decay_kind=ScheduleKind.linear,
                )
                rates = Curve.of(lambda step, c=cfg, n=total: schedule.multiplier(step, c, n), total)
                assert not {"rate-outside", "rate-zero", "decay-ends-early", "rate-rises-again"} & {
                    f.code for f in findings.of_curve(rates, max(rates.rates), falls=True)
                }
                assert 0 < rates.rates[-1] <= 1


def test_a_long_curve_is_sampled_and_its_ends_are_whole():
    curve = Curve.of(lambda step: 1.0, 2_000_000)
    assert curve.steps[:200] == list(range(200)) and curve.steps[-200:] == list(range(1_999_800, 2_000_000))
    assert len(curve.steps) < 5000
    assert Curve.of(lambda step: step in (3, 7, 8, 9), 12).longest(bool) == (7, 10)


def test_the_plot_shows_each_phase_in_proportion():
    flat, fall = Curve.of(lambda step: 1.0, 300), Curve.of(lambda step: 1 - step / 100, 100)
    lines = plot([Phase("pretrain", flat, ""), Phase("anneal", fall, "")])
    assert lines[0].startswith(" 1.0e+00 |" + "█" * 48) and lines[-1].split() == ["└pretrain", "└anneal"]
    heights = [sum(line[10 + x : 11 + x] not in ("", " ") for line in lines[:-1]) for x in range(64)]
    assert heights[:48] == [6] * 48 and heights[48:] == sorted(heights[48:], reverse=True) and heights[-1] <= 1


# ---- figures and grammar ----


def test_figures_are_those_of_the_run(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = check(*PRETRAIN.format(here=here).split(), "machine.tokens_per_s=1000", capsys=capsys)
    assert status == 0
    told = json.loads((here / "shards/final/MANIFEST.json").read_text("utf-8"))["parts"]
    assert f"{sum(part['tokens'] for part in told.values()):,} tokens" in printed
    assert "196 of 1,024 tokens = 200,704 tokens" in printed
    rows = math.ceil(told["wiki.en"]["tokens"] / 128)
    epochs = float(re.search(r"wiki.en: 50.0% of the tokens, ([\d.]+) epoch", printed)[1])
    assert epochs == pytest.approx(196 * 8 / 2 / rows, rel=0.02)
    assert "3.3 minutes at 1,000 tokens/s, as stated" in printed
    _, printed = check(*PRETRAIN.format(here=here).split(), f"machine.measured_by={here}/stable", capsys=capsys)
    assert "6.7 minutes at 500 tokens/s, as measured by" in printed
    _, printed = check(*PRETRAIN.format(here=here).split(), capsys=capsys)
    assert re.search(r"time +not known", printed)


def test_conversations_are_counted_as_the_run_counts_them(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = SFT.format(here=here).split()
    _, printed = check(*words, capsys=capsys)
    with mock.patch.dict(os.environ):
        assert program.main(["recipe=sft", *words[1:], "train.max_steps=1", f"output_dir={tmp_path}/run"]) == 0
    ledger = json.loads((tmp_path / "run/ledger.json").read_text("utf-8"))
    assert f"{ledger['read']} records, {ledger['rows']['train']['rows']} rows" in printed
    assert f"{ledger['tokens']:,}, {ledger['answer_tokens']:,} of them supervised" in printed
    assert "system line 'You are a helpful assistant'" in printed
    _, printed = check(*words, "sample=20", capsys=capsys)
    assert "60 records" in printed and "estimated from the first 20" in printed


def test_a_run_directory_of_another_configuration_is_noticed(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from aquila_sft import run_dir

    words = PRETRAIN.format(here=here).split()
    run = program.compose_run(["recipe=pretrain", *words[1:]])
    out = Path(run.output_dir)
    (out / "final").mkdir(parents=True)
    claim = {"sha256": "", "has_begun": True, "identity": run_dir.identity_of(run) | {"data": "0"}}
    (out / "identity.json").write_text(json.dumps(claim))
    status, printed = check(*words, capsys=capsys)
    assert status == 0 and "unfinished, it would go on from its beginning" in printed
    (out / "summary.json").write_text('{"status": "done"}')
    status, printed = check(*words, "optim.weight_decay=0.05", capsys=capsys)
    assert status == 2 and "optim.weight_decay=0.05 (0.01 there)" in found(printed)["directory-taken"]
    status, printed = check(*words, "optim.weight_decay=0.05", "overwrite=true", capsys=capsys)
    assert status == 0


def test_the_command_of_a_finished_prepare_finds_its_own_run(here, capsys):
    command = ["of=prepare", "scale=mini", f"tokenizer.path={here}/tok", f"output_dir={here}/shards"]
    command += [f"data.files={{wiki: {here}/wiki.jsonl}}", "prepare.holdout_fraction=0.1"]
    status, printed = check(*command, capsys=capsys)
    assert status == 0 and "finished, it would be reused" in printed
    status, printed = check(*command, "prepare.near_duplicates=0.9", capsys=capsys)
    assert status == 2 and "prepare.near_duplicates=0.9" in found(printed)["directory-taken"]


def test_the_command_needs_a_recipe_that_can_be_checked(capsys):
    for words in ([], ["of=chat"], ["of=pretrian"], ["of=sft", "of=sft"]):
        assert program.main(["recipe=check", *words]) == 2
        assert "pretrain, anneal, sft, sft_lora" in capsys.readouterr().err


def test_every_override_reaches_the_recipe_as_typed():
    typed = ["scale=135m", "data.files={wiki_zh: 我的 数据/*.jsonl, en: [a=b.txt, c'd.txt]}", "run_name=x", "seed=7"]
    cfg = program.compose_run(["recipe=check", "of=prepare", *typed, "machine.processes=4"])
    assert cfg.words == ["recipe=prepare", *typed] and cfg.machine.processes == 4 and cfg.scale == "135m"
    run = program.compose_run(cfg.words)
    assert run.data.files["en"] == ["a=b.txt", "c'd.txt"] and run.seed == 7


def test_as_a_program_it_ends_with_2_and_one_line_when_something_is_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "recipe=check", "of=pretrain", "optim.lr=-1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "optim.lr=-1.0" in found(done.stdout)["setting"]
    assert re.fullmatch(r"error: recipe=pretrain .*1 error\(s\).*\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())
