"""Norms and the loss path, replaced on built models: every number agrees with the stock model's, wherever it runs.

Triton's kernels run through the interpreter here, on a few rows. Tolerances are fp32's, for sums in another order, or,
under bf16 autocast, those of products that round at 2^-8.
"""

import copy
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import accelerate
import gradients_worker
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from swap_worker import batch
from tensors_made import LargestTensors
from tiny import tiny_conversations, tiny_model, tiny_tokenizer, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from aquila_sft import attention as attentions
from aquila_sft import device, settle, swap
from aquila_sft.attention import BY_DOCUMENT
from aquila_sft.config.model import Attention, Precision
from aquila_sft.errors import Stopped, UserError

ROOT = Path(__file__).parents[1]
SIZES = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
each_model = pytest.mark.parametrize(
    "kind, tied", [("llama", True), ("llama", False), ("mistral", True), ("mistral", False)]
)
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


def built(kind="mistral", tied=True, **settings):
    model, config = KINDS[kind]
    torch.manual_seed(0)
    net = model(config(tie_word_embeddings=tied, **SIZES | settings))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name:  # as trained: fresh norms multiply by one
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return net


def swapped(kind="mistral", tied=True, **settings):
    net = built(kind, tied, **settings)
    swap.install(net, "triton")
    return net


def stock_sum(net, targets, **given):
    """The stock model's loss: logits, then cross-entropy, summed."""
    logits = net(**given, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def assert_same(ours, theirs, tolerance=2e-6):
    """Dictionaries of tensors, by norm: fp32 rounds at 6e-8, and a gradient is some hundred sums long."""
    assert ours.keys() == theirs.keys() and ours
    for name, exact in theirs.items():
        if exact is None:
            assert ours[name] is None, name
        else:
            assert exact.norm() > 0, name
            assert (ours[name] - exact).norm() <= tolerance * exact.norm(), name


def assert_trains_alike(net, reference, tolerance=2e-6, autocast=nullcontext):
    """Loss and the gradient of every trained parameter, on one batch."""
    given = batch()
    with autocast():
        loss, expected = net(**given).loss, stock_sum(reference, **given)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    loss.backward()
    expected.backward()
    assert_same(gradients(net), gradients(reference), tolerance)


# ---- the numbers ----


@each_model
def test_loss_and_every_gradient_are_the_stock_models(kind, tied):
    net, reference = swapped(kind, tied), built(kind, tied)
    assert sum(isinstance(m, swap.TritonNorm) for m in net.modules()) == 5
    assert len(gradients(net)) == (20 if tied else 21)
    assert_trains_alike(net, reference)


@each_model
def test_logits_where_asked_for_and_the_models_own_loss_are_the_stock_models(kind, tied):
    net, reference = swapped(kind, tied), built(kind, tied)
    ids, labels = batch()["input_ids"], batch()["targets"]
    ours, theirs = net(input_ids=ids, labels=labels), reference(input_ids=ids, labels=labels)
    assert_same({"logits": ours.logits, "loss": ours.loss}, {"logits": theirs.logits, "loss": theirs.loss})
    last = net(input_ids=ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, theirs.logits[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_under_bf16_autocast_they_agree_within_its_rounding(kind):
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    # A bf16 product differs by 2^-8 where its input was rounded the other way; two layers and back make a few of them.
    assert_trains_alike(swapped(kind), built(kind), 2e-2, autocast)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_model_in_bf16_is_no_further_from_fp32_than_the_stock_one_is(kind):
    exact, results = built(kind), []
    for net in (swapped(kind).bfloat16(), built(kind).bfloat16()):
        with torch.no_grad():
            logits = net(input_ids=batch()["input_ids"]).logits
            assert logits.dtype == torch.bfloat16
            results.append((logits.float() - exact(input_ids=batch()["input_ids"]).logits).norm())
    assert results[0] <= 1.25 * results[1]  # rounded once where stock rounds twice


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(kind, use_reentrant):
    net, reference = swapped(kind), built(kind)
    net.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    net.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    assert_trains_alike(net.train(), reference.train())
    assert len(runs) == 2  # forward, and again for backward


@each_model
def test_micro_batches_accumulate_to_the_gradients_of_the_whole(kind, tied):
    net, reference, given = swapped(kind, tied), built(kind, tied), batch()
    num_items = (given["targets"] != -100).sum()
    for row in range(2):
        (net(**{name: t[row : row + 1] for name, t in given.items()}).loss / num_items).backward()
    (stock_sum(reference, **given) / num_items).backward()
    assert_same(gradients(net), gradients(reference))


def test_tied_weights_get_the_embeddings_and_the_heads_gradient_added():
    tied, apart = swapped(tied=True), built(tied=False)
    apart.load_state_dict(tied.state_dict())
    swap.install(apart, "triton")
    for net in (tied, apart):
        net(**batch()).loss.backward()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    both = apart.model.embed_tokens.weight.grad + apart.lm_head.weight.grad
    assert_same({"tied": tied.lm_head.weight.grad}, {"tied": both})


def test_every_token_has_its_own_loss_in_evaluation():
    net, reference, given = swapped(), built(), batch()
    with torch.no_grad():
        each = net(**given, per_token=True).loss
        logits = reference(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), given["targets"].flatten(), reduction="none").view(2, 12)
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=0)
    assert not each.requires_grad and (each[given["targets"] == -100] == 0).all()


# ---- where it runs ----

PEFT = {
    "all-linear": dict(target_modules="all-linear"),
    "attention": dict(target_modules=["q_proj", "v_proj"], use_dora=True),
    "embedding": dict(target_modules=["embed_tokens", "down_proj"]),
    "norms in full": dict(target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
    "embedding in full": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "head in full": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "some tokens": dict(target_modules=["q_proj"], trainable_token_indices=[145, 16, 239]),
}


@pytest.mark.parametrize("install_first, tied", [(True, False), (False, True)])
@pytest.mark.parametrize("wearing", PEFT)
@pytest.mark.filterwarnings("ignore")
def test_adapters_train_alike_installed_before_or_after(wearing, install_first, tied):
    def adapted(net):
        net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=4, **PEFT[wearing]))
        torch.manual_seed(1)
        for name, p in net.named_parameters():
            if "lora_B" in name or "lora_embedding_" in name:
                torch.nn.init.normal_(p, std=0.1)  # as trained: a fresh adapter has no gradient in half of it
        return net

    reference = adapted(built(tied=tied))
    if install_first:
        net = adapted(swapped(tied=tied))
    else:
        net = adapted(built(tied=tied))
        swap.install(net, "triton")
    kinds = {type(m) for m in net.modules() if "Norm" in type(m).__name__}
    assert kinds == {swap.TritonMistralRMSNorm}  # copies that PEFT made too
    assert_trains_alike(net, reference)
    settle.check(net, "cpu", nullcontext())


def test_an_adapter_on_the_head_is_refused_before_and_after():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    with pytest.raises(UserError, match="adapter on the output head would not be trained"):
        swap.install(get_peft_model(built(tied=False), config), "torch")
    net = get_peft_model(swapped(tied=False), config)
    with pytest.raises(UserError, match="adapter on the output head would not be trained"):
        net(**batch())


def test_a_frozen_head_gets_no_gradient_and_none_is_computed():
    largest = {}
    for frozen in (True, False):
        net = built(tied=False, vocab_size=50_001)
        swap.install(net, "torch")
        net.lm_head.weight.requires_grad_(not frozen)
        net.model.embed_tokens.weight.requires_grad_(False)
        with LargestTensors() as made:
            net(**batch()).loss.backward()
        assert (net.lm_head.weight.grad is None) == frozen
        largest[frozen] = max(made.numels)
    assert largest[True] < 50_001 * 64 <= largest[False]


def test_neither_training_nor_evaluation_makes_tokens_times_vocabulary():
    net = built(vocab_size=50_001)
    swap.install(net, "torch")
    ids = torch.randint(0, 50_001, (16, 256))
    with LargestTensors() as training:
        net(input_ids=ids, targets=swap.targets_of(ids)).loss.backward()
    with LargestTensors() as evaluation, torch.no_grad():
        net(input_ids=ids, targets=swap.targets_of(ids), per_token=True)
    # The scratch for logits is bounded by 320 MiB, here 84M numbers; all logits would be 205M.
    assert max(training.numels | evaluation.numels) <= 320 * 2**20 // 4 < ids.numel() * 50_001 // 2


def test_two_processes_under_ddp_give_the_gradients_of_one(tmp_path):
    reference = built()
    reference.save_pretrained(tmp_path / "base")
    loss = stock_sum(reference, **batch())
    loss.backward()
    worker = [sys.executable, str(ROOT / "tests/swap_worker.py"), str(tmp_path / "base")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*worker, str(rank), "2", str(tmp_path / "meeting"), str(tmp_path / "out.pt")], env=env)
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    ours = torch.load(tmp_path / "out.pt")
    assert_same(ours, {"loss": loss.detach()} | gradients(reference))


def test_torch_compile_takes_the_decoder_whole_and_changes_nothing():
    net, reference, given = swapped("llama"), built("llama"), batch()
    targets = given.pop("targets")
    compiled = torch.compile(net.model, backend="aot_eager", fullgraph=True)
    hidden = compiled(**given, use_cache=False).last_hidden_state
    loss = F.cross_entropy(net.lm_head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    expected = stock_sum(reference, targets, **given)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    loss.backward()
    expected.backward()
    assert_same(gradients(net), gradients(reference))


def test_torch_compile_of_model_and_loss_changes_nothing():
    net, reference, given = swapped(), built(), batch()
    loss, expected = torch.compile(net, backend="aot_eager")(**given).loss, stock_sum(reference, **given)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    loss.backward()
    expected.backward()
    assert_same(gradients(net), gradients(reference))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_generation_picks_the_same_tokens(kind):
    prompt = batch()["input_ids"][:, :4]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    ours, theirs = (net.generate(prompt, **settings) for net in (swapped(kind), built(kind)))
    assert torch.equal(ours, theirs) and ours.shape == (2, 10)


# ---- what stays as it was ----


@each_model
def test_a_saved_model_is_the_stock_ones_and_loads_in_stock_classes(kind, tied, tmp_path):
    net, reference = swapped(kind, tied), built(kind, tied)
    assert list(net.state_dict()) == list(reference.state_dict())
    net.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "stock")
    assert [f.name for f in sorted((tmp_path / "ours").iterdir())] == [
        f.name for f in sorted((tmp_path / "stock").iterdir())
    ]
    for file in (tmp_path / "stock").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is KINDS[kind][0] and not any(isinstance(m, swap.TritonNorm) for m in again.modules())
    assert_same(again.state_dict(), reference.state_dict(), 0)


def test_a_copy_computes_with_its_own_weights():
    net = swapped()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    reference = built()
    reference.load_state_dict(twin.state_dict())
    assert_trains_alike(twin, reference)
    assert all(p.grad is None for p in net.parameters())


def test_a_pickled_norm_comes_back_as_it_was():
    norm, file = swapped().model.norm, io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(3, 64)
    assert type(again) is type(norm) is swap.TritonMistralRMSNorm and isinstance(again, torch.nn.Module)
    assert torch.equal(again(x), norm(x)) and repr(again).endswith("((64,), eps=1e-06)")


def test_another_model_of_the_process_stays_stock():
    swapped()
    assert not any(isinstance(m, swap.TritonNorm) for m in built().modules())
    assert "forward" not in vars(built())


def test_a_second_install_changes_nothing():
    net = swapped()
    swap.install(net, "triton")
    assert sum(isinstance(m, swap.TritonNorm) for m in net.modules()) == 5
    assert_trains_alike(net, built())


def test_the_torch_kernel_leaves_the_norms_as_they_are():
    net = built()
    swap.install(net, "torch")
    assert not any(isinstance(m, swap.TritonNorm) for m in net.modules())
    assert_trains_alike(net, built())


# ---- what is refused ----


def foreign_norm(net):
    net.model.layers[0].input_layernorm = torch.nn.RMSNorm(64)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda net: delattr(net.model.layers[1], "input_layernorm"), "expected 5 norms, all MistralRMSNorm, found 4;"),
        (lambda net: setattr(net.config, "num_hidden_layers", 3), "expected 7 norms, .*found 5;"),
        (lambda net: net.model.register_module("q_norm", copy.deepcopy(net.model.norm)), "expected 5 .*found 6;"),
        (foreign_norm, "expected 5 norms, all MistralRMSNorm, found 5, among them RMSNorm;"),
        (lambda net: setattr(net.model, "norm", LlamaRMSNorm(64)), "found 5, among them LlamaRMSNorm;"),
    ],
    ids=["one missing", "another number of layers", "one more", "one of torch's", "one of another model"],
)
def test_norms_that_are_not_as_many_or_not_as_expected_are_an_error_with_counts(change, said):
    net = built()
    change(net)
    with pytest.raises(UserError, match=said):
        swap.install(net, "triton")
    assert not any(isinstance(m, swap.TritonNorm) for m in net.modules()) and "forward" not in vars(net)


def test_another_architecture_keeps_its_norms_under_auto_and_is_refused_where_triton_was_asked_for(capsys):
    net = built("qwen2")
    with pytest.raises(UserError, match="kernel=triton knows the norms of Llama and Mistral, not .*Qwen2ForCausalLM"):
        swap.install(net, "triton", asked=True)
    swap.install(net, "triton")
    assert "Triton's kernels compute the loss; Qwen2ForCausalLM keeps its norms" in capsys.readouterr().out
    assert_trains_alike(net, built("qwen2"))
    swap.install(built(), "triton")
    assert "Triton's kernels compute 5 norms and the loss" in capsys.readouterr().out


def test_a_norm_that_computes_something_else_is_found_before_training(monkeypatch):
    from aquila_kernels import rms_norm as kernels

    net = swapped()
    settle.settle(net, "cpu", nullcontext(), asked=False)
    stock = kernels.rms_norm
    for wrong in (
        lambda x, w, eps, kernel: stock(x, w, eps * 2, kernel=kernel),
        lambda x, w, eps, kernel: stock(x, w.detach() + (w - w.detach()) * 2, eps, kernel=kernel),  # gradient of w
    ):
        monkeypatch.setattr(kernels, "rms_norm", wrong)
        with pytest.raises(UserError, match="model.layers.0.input_layernorm does not compute what"):
            settle.settle(net, "cpu", nullcontext(), asked=False)


def test_a_model_that_scales_its_logits_is_refused():
    class Scaled(MistralForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    net = built()
    net.__class__ = Scaled
    swap.install(net, "torch")
    with pytest.raises(UserError, match="does more to its logits"):
        settle.check_loss(net, "cpu", nullcontext())


def test_a_loss_that_is_no_number_is_refused(monkeypatch):
    net = swapped()
    monkeypatch.setattr(swap, "linear_cross_entropy", lambda *args, **kwargs: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="our loss is nan"):
        settle.settle(net, "cpu", nullcontext(), asked=False)


def test_a_base_of_nans_is_told_so():
    net = swapped()
    net.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite numbers"):
        settle.settle(net, "cpu", nullcontext(), asked=False)


@pytest.mark.parametrize(
    "model, config, settings",
    [
        (GraniteForCausalLM, GraniteConfig, dict(logits_scaling=8.0)),
        (CohereForCausalLM, CohereConfig, dict(logit_scale=1 / 16)),
        (Gemma2ForCausalLM, Gemma2Config, dict(final_logit_softcapping=30.0, head_dim=16, attn_implementation="eager")),
    ],
    ids=["granite", "cohere", "gemma2"],
)
def test_a_fresh_model_that_scales_or_caps_its_logits_is_refused(model, config, settings):
    torch.manual_seed(0)
    net = model(config(**SIZES | dict(pad_token_id=0, initializer_range=0.01) | settings))
    swap.install(net, "torch")
    settle.check_loss(net, "cpu", nullcontext())  # near uniform logits the loss does not tell
    with pytest.raises(UserError, match=f"^{model.__name__} does more to its logits .*; this architecture is not supp"):
        settle.check(net, "cpu", nullcontext())


def test_a_swapped_model_is_not_pickled_without_its_loss(tmp_path):
    net = swapped()
    for save in (pickle.dumps, lambda net: torch.save(net, io.BytesIO()), lambda net: pickle.dumps(copy.deepcopy(net))):
        with pytest.raises(UserError, match=r"^a model with our loss cannot be pickled; use save_pretrained\(\)"):
            save(net)
    again = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert type(pickle.loads(pickle.dumps(again))) is LlamaForCausalLM


@pytest.mark.parametrize("first", ["install", "offload"])
def test_an_offloaded_head_is_refused(first, tmp_path):
    for offload in (accelerate.cpu_offload, partial(accelerate.disk_offload, offload_dir=tmp_path)):
        net = built()
        if first == "install":
            swap.install(net, "torch")
        offload(net)
        with pytest.raises(UserError, match="the output head's matrix is not in memory"):
            swap.install(net, "torch") if first == "offload" else net(**batch())


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(targets=batch()["targets"].T), r"^targets \[12, 2\] do not fit the input's \[2, 12\]"),
        (dict(targets=batch()["targets"].flatten()), r"^targets \[24\] do not fit"),
        (dict(targets=batch()["targets"][:, 1:]), r"^targets \[2, 11\] do not fit"),
        (dict(labels=batch()["input_ids"]), "^labels cannot be had together with targets"),
        (dict(output_hidden_states=True), "^output_hidden_states cannot"),
        (dict(output_attentions=True), "^output_attentions cannot"),
        (dict(logits_to_keep=1), "^logits_to_keep cannot"),
        (dict(logits_to_keep=torch.tensor([0])), "^logits_to_keep cannot"),
        (dict(use_cache=True), "^use_cache cannot"),
        (dict(past_key_values=DynamicCache()), "^past_key_values cannot"),
        (dict(return_dict=False), "^return_dict=False cannot"),
    ],
)
def test_what_targets_cannot_give_is_an_error(change, said):
    net = built()
    swap.install(net, "torch")
    with pytest.raises(UserError, match=said):
        net(**batch() | change)


def test_what_trainers_and_peft_pass_by_default_changes_nothing():
    net = built()
    swap.install(net, "torch")
    nothing = dict.fromkeys(("labels", "output_attentions", "output_hidden_states", "past_key_values", "return_dict"))
    loss = net(**batch()).loss
    assert torch.equal(net(**batch(), **nothing, use_cache=False, logits_to_keep=0).loss, loss)
    assert torch.equal(net(**batch(), return_dict=True).loss, loss)
    net.config.return_dict = False
    assert torch.equal(net(**batch()).loss, loss)


def test_with_targets_arguments_are_keywords_and_without_them_in_the_stock_order():
    net, given = built(), batch()
    swap.install(net, "torch")
    with pytest.raises(UserError, match="^with targets= every argument is a keyword"):
        net(given["input_ids"], None, given["position_ids"], targets=given["targets"])
    ours = net(given["input_ids"], None, given["position_ids"]).logits
    assert torch.equal(ours, built()(given["input_ids"], None, given["position_ids"]).logits)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_head_is_refused(hook):
    net = built()
    getattr(net.lm_head, hook)(lambda *_: None)
    with pytest.raises(UserError, match="^a hook on the output head of MistralForCausalLM would never run"):
        swap.install(net, "torch")


def test_a_forward_of_the_instances_own_is_refused():
    net = built()
    stock = net.forward
    net.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    with pytest.raises(UserError, match=r"^this MistralForCausalLM has a forward of its own \(.*test_swap\)"):
        swap.install(net, "torch")


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_before_and_after(config):
    config = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match="^virtual tokens .* are not supported with targets"):
        swap.install(get_peft_model(built(), config), "torch")
    net = built()
    swap.install(net, "torch")
    with pytest.raises(UserError, match="virtual tokens .* are not supported|^past_key_values cannot"):
        get_peft_model(net, config)(**batch())


def test_what_is_no_causal_model_with_a_plain_head_is_refused():
    net = built(tied=False)
    net.set_output_embeddings(torch.nn.Sequential(net.lm_head))
    for model in (torch.nn.Linear(2, 2), net):
        with pytest.raises(UserError, match="has no plain linear output head"):
            swap.install(model, "torch")


def test_the_kernel_installed_last_holds_and_an_unknown_one_is_refused(monkeypatch):
    net, used = swapped(), []
    stock = swap.linear_cross_entropy
    monkeypatch.setattr(
        swap,
        "linear_cross_entropy",
        lambda *args, kernel, **kw: used.append(kernel) or stock(*args, kernel=kernel, **kw),
    )
    for kernel, ours in (("torch", 0), ("triton", 5)):
        swap.install(net, kernel)
        assert sum(isinstance(m, swap.TritonNorm) for m in net.modules()) == ours
        net.zero_grad()
        assert_trains_alike(net, built())
    assert used == ["torch", "triton"]
    for unknown in ("cuda", "auto"):
        with pytest.raises(UserError, match=f"^kernel='{unknown}' cannot be installed; use triton or torch"):
            swap.install(net, unknown)


# ---- which kernel ----


def test_triton_is_chosen_where_it_can_run_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(swap, "is_interpreted", lambda: False)
    assert swap.choose_kernel("auto", "cpu") == (
        "torch",
        "Triton's kernels need a GPU, and the tensors are on cpu",
    )
    assert swap.choose_kernel("torch", "cpu") == ("torch", "asked for")
    with pytest.raises(UserError, match="^kernel=triton: Triton's kernels need a GPU.*; use kernel=auto or torch$"):
        swap.choose_kernel("triton", "cpu")
    monkeypatch.setattr(swap, "why_not_triton", lambda device: "")
    assert swap.choose_kernel("auto", "cuda")[0] == swap.choose_kernel("triton", "cuda")[0] == "triton"
    assert swap.choose_kernel("torch", "cuda")[0] == "torch"


def test_the_interpreter_is_never_chosen_for_a_run(monkeypatch):
    assert swap.is_interpreted()  # as in these tests
    with pytest.raises(UserError, match="kernel=triton"):
        swap.choose_kernel("triton", "cpu")
    monkeypatch.setattr(swap, "why_not_triton", lambda device: "")
    assert swap.choose_kernel("auto", "cuda") == (
        "torch",
        "TRITON_INTERPRET is set, and Triton's interpreter is for tests",
    )


# ---- attention for packed rows ----


def sdpa(*args, **kwargs):
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def leaky(module, q, k, v, mask, **kwargs):
    """Causal, and blind to where a conversation begins."""
    return sdpa(module, q, k, v, None, **kwargs)


def broken(module, q, k, v, mask, **kwargs):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def flash(module, q, k, v, mask, *, position_ids, **kwargs):
    """As transformers calls flash attention: conversations by their positions in a batch of one row, else causal."""
    if len(q) == 1:
        conversation = (position_ids == 0).cumsum(1)
        mask = (conversation[:, None, :, None] == conversation[:, None, None, :]).tril()
    return sdpa(module, q, k, v, mask, **kwargs)


@pytest.fixture
def attend(monkeypatch):
    """A built model with an attention of that name, computed by that function."""

    def make(name, function):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, function)
        net = built()
        net.config._attn_implementation = name
        swap.install(net, "torch")
        return net

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager", BY_DOCUMENT])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_packed_conversations_are_what_each_is_alone(kind, attention):
    net = swapped(kind, attn_implementation=attention)
    assert settle.check_isolation(net, "cpu", nullcontext()) < 1e-5
    assert settle.check_isolation(net, "cpu", torch.autocast("cpu", torch.bfloat16)) < 0.02
    given = batch()
    packed = net(**given, per_token=True).loss[:, 7:]
    alone = net(**{name: t[:, 7:] for name, t in given.items()}, per_token=True).loss
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    assert settle.settle(net.train(), "cpu", nullcontext(), asked=True) == attention
    assert net.training and all(p.grad is None for p in net.parameters())  # a run begins as if nothing had been


def test_attention_by_document_trains_as_sdpa_does_and_its_documents_begin_where_positions_do():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [3, 4, 5, 6, 0, 1]])  # one goes on from an earlier row
    assert attentions.lengths_of(positions) == [3, 1, 2, 4, 2]
    assert_trains_alike(swapped(attn_implementation=BY_DOCUMENT), built())


def test_attention_by_document_refuses_what_positions_do_not_tell():
    ids = torch.arange(12).view(2, 6)
    net = built(attn_implementation=BY_DOCUMENT).eval()
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for given, why in (({"attention_mask": padded}, "a mask of padding"), ({"max_new_tokens": 2}, "a mask or a cache")):
        with pytest.raises(ValueError, match=f"{why}.*use sdpa"):
            net.generate(ids, **given)
    windowed = built("mistral", attn_implementation=BY_DOCUMENT, sliding_window=5)
    with pytest.raises(ValueError, match="a document exceeds 5; use sdpa"):
        windowed(ids)
    windowed(ids[:, :5])


def test_flex_attention_masks_packed_conversations_as_sdpa_does(monkeypatch):
    from transformers.integrations.flex_attention import WrappedFlexAttention

    # its own compiler would take a minute; backward exists on a GPU only
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    given, results = batch() | {"targets": None}, []
    for attention in ("flex_attention", "sdpa", "leaky"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "leaky", leaky)
        net = built(attn_implementation=attention).eval()
        with torch.no_grad():
            results.append(net(**given, use_cache=False).logits)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert (results[0] - results[2]).abs().max() > 1e-2


def test_an_attention_that_leaks_is_refused_where_asked_for_and_replaced_where_auto_chose_it(attend, capsys):
    with pytest.raises(UserError, match="attention leaky does not keep packed conversations apart"):
        settle.check_isolation(attend("leaky", leaky), "cpu", nullcontext())
    with pytest.raises(UserError, match="train.attention=leaky: attention leaky does not keep.*use train.attention="):
        settle.settle(attend("leaky", leaky), "cpu", nullcontext(), asked=True)
    net = attend("leaky", leaky)
    assert settle.settle(net, "cpu", nullcontext(), asked=False) == "sdpa" == net.config._attn_implementation
    assert "attention sdpa instead of leaky: attention leaky does not keep packed conv" in capsys.readouterr().out
    assert_trains_alike(net, built())


def test_an_attention_that_does_not_run_is_refused_where_asked_for_and_replaced_where_auto_chose_it(attend, capsys):
    with pytest.raises(UserError, match="^train.attention=broken: no kernel image is available; use train.attention="):
        settle.settle(attend("broken", broken), "cpu", nullcontext(), asked=True)
    assert settle.settle(attend("broken", broken), "cpu", nullcontext(), asked=False) == "sdpa"
    assert "attention sdpa instead of broken: no kernel image is available\n" in capsys.readouterr().out


def test_a_signal_during_the_check_stops_the_run(attend):
    def stopped(*args, **kwargs):
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        settle.settle(attend("stopped", stopped), "cpu", nullcontext(), asked=False)


def test_what_is_not_the_attentions_fault_is_not_blamed_on_it(attend, capsys):
    net = attend("leaky", leaky)
    net.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="^the base model's outputs are not finite numbers"):
        settle.settle(net, "cpu", nullcontext(), asked=True)
    assert "instead of" not in capsys.readouterr().out


def test_flash_attention_gets_its_rows_laid_end_to_end_and_isolates_them(attend):
    net = attend("flash_attention_2", flash)
    assert settle.check_isolation(net, "cpu", nullcontext()) < 1e-5
    assert_trains_alike(net, built())
    assert net(**batch(), per_token=True).loss.shape == (2, 12)
    with pytest.raises(AssertionError):  # which rows as they are would not do
        net, given = attend("flash_attention_2", flash), batch()
        torch.testing.assert_close(stock_sum(net, **given), stock_sum(built(), **given))


@pytest.mark.parametrize(
    "asked, where, has_flash, has_triton, precision, chosen",
    [
        ("auto", "cpu", False, False, "fp32", BY_DOCUMENT),
        ("auto", "mps", True, False, "fp32", "sdpa"),
        ("auto", "cuda", True, True, "bf16", "flash_attention_2"),
        ("auto", "cuda", True, True, "fp32", "flex_attention"),  # flash attention has no fp32
        ("auto", "cuda", False, True, "bf16", "flex_attention"),
        ("auto", "cuda", False, False, "fp32", "sdpa"),  # a T4
        ("sdpa", "cuda", True, True, "bf16", "sdpa"),
        ("eager", "cpu", False, False, "fp32", "eager"),
        ("flash_attention_2", "cuda", True, True, "bf16", "flash_attention_2"),
        ("flex_attention", "cuda", False, False, "fp32", "flex_attention"),
        ("flash_attention_2", "cuda", False, True, "bf16", "flash-attn package or a GPU for it is missing"),
        ("flash_attention_2", "cpu", True, False, "bf16", "flash-attn package or a GPU for it is missing"),
        ("flash_attention_2", "cuda", True, True, "fp32", "computes in bf16 alone"),
        ("flex_attention", "cpu", False, False, "fp32", "no backward pass on cpu"),
    ],
)
def test_attention_is_chosen_by_what_the_machine_has(
    asked, where, has_flash, has_triton, precision, chosen, monkeypatch
):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: has_flash)
    monkeypatch.setattr(swap, "why_not_triton", lambda device: "" if has_triton else "none")
    monkeypatch.setattr(swap, "is_interpreted", lambda: False)
    if " " in chosen:
        with pytest.raises(UserError, match=f"train.attention={asked}.*{chosen}|{chosen}"):
            device.choose_attention(Attention(asked), where, Precision(precision))
    else:
        assert device.choose_attention(Attention(asked), where, Precision(precision))[0] == chosen


# ---- inside trainers ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tokenizer, base model and prepared rows of 64 tokens."""
    from aquila_sft.chat_template import encode_batch
    from aquila_sft.data import sft_set

    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer(folder / "tok")
    tiny_model(folder / "base", tokenizer)
    write_jsonl(folder / "chat.jsonl", tiny_conversations(30))
    policy = sft_set.RowPolicy(64, 0.0, 0, 1000, 1)
    sft_set.prepare([folder / "chat.jsonl"], folder / "rows", partial(encode_batch, tokenizer), policy, {})
    return folder


def test_trls_own_trainer_takes_the_same_step(world, tmp_path):
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from aquila_sft.pretrain import accelerate_forgets

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.taken = {name: p.grad.clone() for name, p in model.named_parameters()}

    rows = Dataset.from_list([{"input_ids": row} for row in torch.randint(5, 300, (4, 10)).tolist()])
    results = []
    for swaps in (True, False):
        net = AutoModelForCausalLM.from_pretrained(world / "base")
        if swaps:
            swap.install(net, "triton")
        taken = Take()
        with accelerate_forgets():
            trainer = SFTTrainer(
                net,
                SFTConfig(
                    output_dir=str(tmp_path),
                    max_steps=1,
                    per_device_train_batch_size=2,
                    gradient_accumulation_steps=2,
                    max_grad_norm=0,
                    bf16=False,
                    use_cpu=True,
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                ),
                train_dataset=rows,
                processing_class=AutoTokenizer.from_pretrained(world / "base"),
                callbacks=[taken],
            )
            done = trainer.train()
        assert any(isinstance(m, swap.TritonNorm) for m in trainer.model.modules()) == swaps
        results.append(taken.taken | {"loss": torch.tensor(done.training_loss)})
    assert_same(*results)


def test_our_trainer_takes_the_same_step_with_either_kernel(world, monkeypatch, capsys):
    monkeypatch.setattr(gradients_worker, "ROWS", 4)
    monkeypatch.setattr(gradients_worker, "LENGTH", 64)
    results = {}
    for kernel in ("triton", "torch"):
        step = gradients_worker.step(world / "base", world / "rows/train", 2, kernel=kernel)
        results[kernel] = step["gradients"] | {"loss": torch.tensor(step["loss"])}
        assert ("Triton's kernels compute 5 norms and the loss" in capsys.readouterr().out) == (kernel == "triton")
    assert_same(results["triton"], results["torch"])


@pytest.mark.parametrize("scale, told", [(1.0, None), (1.2, "compute something else"), (None, "no compiler")])
def test_compiled_layers_that_compute_something_else_or_cannot_be_made_are_refused(monkeypatch, scale, told):
    def compile(call):
        def compiled(*given, **named):
            if scale is None:
                raise RuntimeError("no compiler\nin ten lines")
            return call(*given, **named) * scale

        return compiled

    net = built()
    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(UserError, match=f"{told}.*train.compile=false") if told else nullcontext():
        settle.compile_layers(net, (2, 24), "cpu", nullcontext())
    assert all(parameter.grad is None for parameter in net.parameters())
