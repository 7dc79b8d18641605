"""What recipe=check says of memory and disk, against what autograd keeps and what runs take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SENTENCES, tiny_conversations, tiny_tokenizer, write_jsonl
from transformers import MistralConfig, MistralForCausalLM

from aquila_sft import lora, swap
from aquila_sft.config.model import Lora
from aquila_sft.doctor.estimate import Portion, Shape, disk, kept_in_layer, memory

ROOT = Path(__file__).parents[1]
SHAPE = dict(
    hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=80, vocab_size=100
)
AQUILA = Shape(151851, 576, 30, 9, 3, 64, 1536, True, 2048)


def adapter(dropout: float, targets: list[str]) -> Lora:
    return Lora(r=4, alpha=4, dropout=dropout, targets=targets, use_dora=False, use_rslora=False, merge_tolerance=1e-4)


def kept_by_autograd(layers: int, cfg: Lora | None, bf16: bool) -> int:
    """Bytes of all storages that a forward pass keeps, the model's own left out; two packed rows of 32 tokens."""
    model = MistralForCausalLM(MistralConfig(num_hidden_layers=layers, attn_implementation="sdpa", **SHAPE))
    if cfg:
        model = lora.attach(model, cfg, seed=0)
    swap.install(model, "torch")
    model.train()
    ids, positions = torch.zeros(2, 32, dtype=torch.long), torch.arange(16).repeat(2).repeat(2, 1)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=bf16):
        model(input_ids=ids, position_ids=positions, targets=ids)
    return sum(kept.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "cfg", [None, adapter(0.05, ["all-linear"]), adapter(0.0, ["all-linear"])], ids=["full", "lora", "no dropout"]
)
def test_what_a_layer_keeps_is_what_autograd_keeps_to_the_byte(cfg, bf16):
    shape = Shape(num_hidden_layers=1, tie_word_embeddings=True, max_position_embeddings=64, **SHAPE)
    portion = Portion(2, 32, 1, 1, "cpu", bf16, activation_checkpointing=False)
    matrices = sum(n * m for n, m in shape.linears().values())
    casts = 2 * (matrices + (cfg.r * sum(n + m for n, m in shape.adapted(cfg)) if cfg else 0)) if bf16 else 0
    # the difference of two models: what the embedding, the last norm and the loss keep falls out
    measured = kept_by_autograd(3, cfg, bf16) - kept_by_autograd(2, cfg, bf16)
    assert measured == kept_in_layer(shape, portion, cfg) + casts


def test_parameters_are_those_of_the_published_model_and_of_its_adapter():
    assert AQUILA.parameters == 193_669_632
    model = MistralForCausalLM(MistralConfig(num_hidden_layers=2, tie_word_embeddings=False, **SHAPE))
    shape = Shape(num_hidden_layers=2, tie_word_embeddings=False, max_position_embeddings=64, **SHAPE)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert Shape.of_config(model.config.to_dict() | {"max_position_embeddings": 64}) == shape
    for targets in (["all-linear"], ["q_proj", "down_proj"]):
        cfg = adapter(0.0, targets)
        net = lora.attach(MistralForCausalLM(MistralConfig(num_hidden_layers=2, **SHAPE)), cfg, seed=0)
        assert shape.adapter_parameters(cfg) == sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_memory_follows_from_what_is_trained_and_how():
    def parts(cfg=None, device="cpu", **how):
        given = dict(rows=1, length=1024, accumulation=1, processes=1, is_bf16=False, activation_checkpointing=False)
        return memory(AQUILA, Portion(device=device, **given | how), cfg, program=0).parts

    plain = parts()
    assert plain["weights"] == 4 * 193_669_632 and plain["optimizer"] == 8 * 193_669_632
    assert parts(activation_checkpointing=True)["activations"] < 0.2 * plain["activations"]
    assert parts(rows=2)["activations"] == pytest.approx(2 * plain["activations"], rel=0.01)
    assert parts(processes=2)["gradients"] == plain["gradients"] + 4 * 193_669_632  # DDP's buckets
    assert parts(adapter(0.05, ["all-linear"]))["optimizer"] < 0.01 * plain["optimizer"]
    assert (
        plain["logits"] == 4 * 151_851 * 512 and parts(rows=8)["logits"] == 320 * 2**20
    )  # half of them, or the budget
    assert parts(device="cuda")["heap"] == 0 < plain["heap"]


def test_a_copy_for_saving_is_there_beside_a_step_only_if_training_goes_on_after_it():
    given = {"rows": 4, "length": 512, "accumulation": 1, "processes": 1, "is_bf16": False}
    given |= {"device": "cpu", "activation_checkpointing": False}
    last, between = (
        memory(AQUILA, Portion(**given, trains_on_after_saving=is_so), None, program=0) for is_so in (False, True)
    )
    assert (between.parts["saving"], last.parts["saving"]) == (12 * AQUILA.parameters, 0)
    assert between.peak == last.peak + 12 * AQUILA.parameters
    on_gpu = memory(AQUILA, Portion(**given | {"device": "cuda"}, trains_on_after_saving=True), None, program=0)
    assert on_gpu.parts["saving"] == 0


def test_models_kept_on_the_way_are_on_the_disk():
    assert disk(AQUILA, None, 2, models=3)[1] - disk(AQUILA, None, 2)[1] == 3 * 4 * AQUILA.parameters


def test_a_full_checkpoint_has_twelve_bytes_a_parameter():
    one, whole = disk(AQUILA, None, checkpoints=2)
    assert one == 12 * 193_669_632 and whole == 3 * one + 4 * 193_669_632  # one more is written before one is deleted
    assert disk(AQUILA, adapter(0.0, ["all-linear"]), checkpoints=2)[0] < 0.01 * one


MODEL = [
    "model.hidden_size=384",
    "model.num_hidden_layers=4",
    "model.intermediate_size=1024",
    "model.num_attention_heads=6",
    "model.num_key_value_heads=2",
    "model.head_dim=64",
    "model.vocab_size=12288",
]
HOW = [
    "scale=mini",
    "kernel=torch",
    "train.precision=fp32",
    "train.attention=sdpa",
    "train.max_length=128",
    "train.micro_batch_rows=6",
    "train.max_steps=2",
    "train.save_steps=1000",
]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator that the estimate knows is glibc's")
def test_memory_is_within_15_percent_of_the_measured_peak(tmp_path):
    tiny_tokenizer(tmp_path / "tok")
    write_jsonl(tmp_path / "chat.jsonl", tiny_conversations(120))
    write_jsonl(
        tmp_path / "text.jsonl", [{"text": f"{i}. {' '.join(SENTENCES[i % 20 : i % 20 + 12])}"} for i in range(60)]
    )
    prepare = [
        "recipe=prepare",
        "scale=mini",
        f"tokenizer.path={tmp_path}/tok",
        f"data.files={tmp_path}/text.jsonl",
        f"output_dir={tmp_path}/shards",
    ]
    text = [f"data.shards={tmp_path}/shards", "data.sources=null", "data.languages=null", "data.max_epochs=1000"]
    talk = ["model.path=random", f"tokenizer.path={tmp_path}/tok", f"data.files={tmp_path}/chat.jsonl"]
    one, two = "train.tokens_per_step=768", "train.tokens_per_step=1536"  # micro-batches
    runs = [
        ["recipe=pretrain", *text, one],
        ["recipe=pretrain", *text, two, "train.activation_checkpointing=true"],
        ["recipe=sft", *talk, one],
        ["recipe=sft_lora", *talk, one],
    ]
    words = [[*run, *MODEL, *HOW, f"output_dir={tmp_path}/run-{i}"] for i, run in enumerate(runs)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/peak_worker.py")],
        input=json.dumps({"before": prepare, "runs": words}),
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(figures) == 4 and all(f["parameters"] > 10e6 for f in figures)
    for run, f in zip(runs, figures, strict=True):
        print(f"{run[0]} measured {f['measured'] / 1e6:.0f} MB, estimated {f['estimated'] / 1e6:.0f} MB")
        assert abs(f["estimated"] / f["measured"] - 1) < 0.15, (run, f)
        # the model's own part, without the program, which is most of so small a run
        assert abs((f["estimated"] - f["program"]) / (f["measured"] - f["program"]) - 1) < 0.25, (run, f)
