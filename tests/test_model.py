"""Models in and out, and LoRA's way back into the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from aquila_sft import chat_template, lora, model
from aquila_sft.config.model import Architecture, Lora, Model
from aquila_sft.errors import UserError

AQUILA = dict(
    architecture=Architecture.mistral,
    vocab_size=151851,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    max_position_embeddings=2048,
    sliding_window=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    tie_word_embeddings=True,
)
SMALL = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture
def base(tmp_path, tokenizer):
    tiny_model(tmp_path / "base", tokenizer)
    return tmp_path / "base"


def test_aquila_has_193_669_632_parameters(tokenizer):
    with torch.device("meta"):
        net = model.build(Model(**AQUILA), tokenizer, attention="sdpa", seed=0)
    assert type(net).__name__ == "MistralForCausalLM"
    assert sum(p.numel() for p in net.parameters()) == 193_669_632


def test_fresh_weights_are_reproducible_and_fit_the_tokenizer(tokenizer):
    cfg = Model(**AQUILA | SMALL | {"vocab_size": None})
    a, b, c = (model.build(cfg, tokenizer, attention="sdpa", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.model.embed_tokens.weight, c.model.embed_tokens.weight)
    assert a.config.vocab_size == len(tokenizer) and a.config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(UserError, match="model.vocab_size=100"):
        model.build(Model(**AQUILA | SMALL | {"vocab_size": 100}), tokenizer, attention="sdpa", seed=0)


@pytest.mark.parametrize("architecture", list(Architecture))
def test_saved_models_load_in_stock_transformers_with_equal_logits(tmp_path, tokenizer, architecture):
    cfg = Model(**AQUILA | SMALL | {"vocab_size": None, "architecture": architecture, "rope_theta": 50000.0})
    net = model.build(cfg, tokenizer, attention="sdpa", seed=1)
    model.fit_to_tokenizer(net, tokenizer)
    net.config.use_cache = False  # as training leaves it
    model.save(net, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(again(ids).logits, net(ids).logits)
    assert again.config.use_cache and again.generation_config.eos_token_id == chat_template.stop_ids(tokenizer)
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 50000.0  # for transformers 4.57
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert stock.chat_template == tokenizer.chat_template
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == tokenizer.chat_template
    assert (tmp_path / "out/chat_template.jinja").read_text() == tokenizer.chat_template
    assert not [f for f in (tmp_path / "out").iterdir() if f.suffix in (".bin", ".pt", ".pth", ".py", ".pkl")]


def test_a_redundant_equal_head_loads_tied(base):
    weights = load_file(base / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    net = model.load(base)
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert torch.equal(net.lm_head.weight, weights["model.embed_tokens.weight"])


def test_a_stored_head_that_contradicts_the_tie_is_refused(base):
    weights = load_file(base / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1},
        base / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="lm_head.weight is another matrix"):
        model.load(base)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "1 missing .*layers.1.mlp.up_proj"),
        (
            lambda w: w.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}),
            "1 unexpected .*layers.9.mlp.up_proj",
        ),
        (lambda w: w.update({"model.norm.weight": torch.zeros(2)}), "1 mismatched .*model.norm.weight"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_with_counts(base, change, said):
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=said):
        model.load(base)


def test_cut_weights_and_impossible_configurations_are_one_line(base):
    os.truncate(base / "model.safetensors", 5000)
    with pytest.raises(UserError, match="cannot be loaded"):
        model.load(base)


def test_a_folder_that_holds_no_model_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="no model: config.json is missing"):
        model.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="a LoRA adapter"):
        model.load(tmp_path)


def attached(base, **changes):
    settings = dict(
        r=4, alpha=8, dropout=0.0, targets=["all-linear"], use_dora=False, use_rslora=False, merge_tolerance=1e-4
    )
    cfg = Lora(**settings | changes)
    net = lora.attach(model.load(base), cfg, seed=3)
    torch.manual_seed(0)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # as trained: a fresh adapter changes nothing
    return net, cfg


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}, {"targets": ["q_proj", "v_proj"]}])
def test_merged_and_unmerged_logits_agree_and_the_tie_is_kept(base, tokenizer, changes):
    net, cfg = attached(base, **changes)
    plain = lora.prompt_logits(model.load(base), tokenizer, "s")
    merged, difference = lora.merge(net, tokenizer, cfg, "s")
    assert difference < 5e-6  # fp32 rounding; the gate allows 1e-4
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert (
        max((a - b).abs().max() for a, b in zip(plain, lora.prompt_logits(merged, tokenizer, "s"), strict=True)) > 1e-3
    )


def test_the_gate_refuses_a_merge_that_changes_the_model(base, tokenizer, monkeypatch):
    net, cfg = attached(base)
    whole = net.base_model.merge_and_unload

    def wrong(**kwargs):
        merged = whole(**kwargs)
        merged.model.layers[0].mlp.up_proj.weight.data *= 1.1
        return merged

    monkeypatch.setattr(net.base_model, "merge_and_unload", wrong, raising=False)
    with pytest.raises(UserError, match="merge gate: .*not saved"):
        lora.merge(net, tokenizer, cfg, "s")


@pytest.mark.parametrize(
    "target, said",
    [
        ("lm_head", "one matrix"),
        ("embed_tokens", "one matrix"),
        ("q_porj", "did you mean q_proj"),
        ("norm", "no linear layer norm"),
    ],
)
def test_targets_that_cannot_be_merged_are_refused_with_the_reason(base, target, said):
    with pytest.raises(UserError, match=said):
        attached(base, targets=[target])


def test_a_saved_model_loads_in_transformers_4_57(base, tmp_path, tokenizer):
    folder = os.environ.get("AQUILA_TRANSFORMERS_4_57")
    if not folder:
        pytest.skip("AQUILA_TRANSFORMERS_4_57 names no folder with that version")
    net = model.load(base)
    model.fit_to_tokenizer(net, tokenizer)
    model.save(net, tokenizer, tmp_path / "out")
    code = (
        "import sys, torch, transformers as t\nassert t.__version__.startswith('4.57')\n"
        "m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); k = t.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(k('你好 hello')['input_ids'], m(torch.tensor([[5, 6, 7]])).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"},
        cwd=Path(folder),
    )
    assert done.returncode == 0, done.stderr
    ids, total = done.stdout.strip().rsplit(" ", 1)
    assert ids == str(tokenizer("你好 hello")["input_ids"])
    assert float(total) == pytest.approx(net(torch.tensor([[5, 6, 7]])).logits.double().sum().item(), rel=1e-5)


def test_begin_and_end_of_a_published_configuration_are_the_vocabulary_s_afterwards(tmp_path, capsys):
    tokenizer = tiny_tokenizer(tmp_path / "tok")
    net = tiny_model(tmp_path / "base", tokenizer)
    net.config.bos_token_id, net.config.eos_token_id = 1, 2
    model.fit_to_tokenizer(net, tokenizer)
    assert (net.config.bos_token_id, net.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert capsys.readouterr().out.count("corrected") == 2
