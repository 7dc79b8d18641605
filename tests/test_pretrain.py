"""recipe=pretrain and recipe=anneal as a user runs them: what they leave, how they go on, what they refuse."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import poisoned
import pytest
import torch
import warm
from safetensors.torch import load_file
from shard_files import write_part
from tiny import SENTENCES, TINY_ARCHITECTURE, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from aquila_sft import checkpoint, guard, intermediate, log, pretrain, proof
from aquila_sft.data.rows import IGNORE
from aquila_sft.data.shards import Part, Prepared
from aquila_sft.data.text_rows import TextRows, batch
from aquila_sft.errors import UserError

ROOT = Path(__file__).parents[1]
STEPS = 8
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(*words):
    """`python train.py …` without the seconds that a new process takes to import."""
    sys.path.insert(0, str(ROOT))
    import train as program

    out, err, before = io.StringIO(), io.StringIO(), dict(os.environ)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = program.main([str(word) for word in words])
    finally:
        sys.path.remove(str(ROOT))
        os.environ.clear()
        os.environ.update(before)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """recipe=prepare's output: two sources, one of them in two languages."""
    folder = tmp_path_factory.mktemp("shards")
    tiny_tokenizer(folder / "tok")
    english = [line for line in SENTENCES if line.isascii()]
    chinese = [line for line in SENTENCES if not line.isascii()]
    for name, lines in (("wiki", english + chinese), ("notes", english)):
        records = [{"text": " ".join(lines[i:] + lines[:i])} for i in range(len(lines))]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8"
        )
    for i, lines in enumerate((english, chinese)):  # documents of one language each
        with open(folder / "wiki.jsonl", "w" if i == 0 else "a", encoding="utf-8") as file:
            for at in range(30):
                text = " ".join((lines[at % len(lines) :] + lines)[:8])
                file.write(json.dumps({"text": f"{at}. {text}"}, ensure_ascii=False) + "\n")
    done = run(
        "recipe=prepare",
        "scale=mini",
        f"data.files={{wiki: {folder}/wiki.jsonl, notes: {folder}/notes.jsonl}}",
        f"tokenizer.path={folder}/tok",
        f"output_dir={folder}/prepared",
        "prepare.holdout_fraction=0.1",
    )
    assert done.returncode == 0, done.stderr
    return folder / "prepared" / "final"


def words(shards, out, *more, recipe="pretrain") -> list[str]:
    settings = {
        "recipe": recipe,
        "scale": "mini",
        "data.shards": shards,
        "output_dir": out,
        "data.sources": "{wiki: 1}",
        "train.max_length": 64,
        "train.tokens_per_step": 512,
        "train.max_steps": STEPS,
        "train.micro_batch_rows": 2,
        "train.logging_steps": 1,
        "train.save_steps": 2,
        "train.intermediate_steps": 5,
        "train.precision": "fp32",
        "optim.lr": 3e-3,
        **TINY_ARCHITECTURE,
    }
    settings |= dict(word.split("=", 1) for word in more)
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "run"
    return out, run(*words(shards, out))


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(a, b):
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_leaves_what_the_contract_names(unbroken):
    folder, done = unbroken
    assert done.returncode == 0, done.stderr
    names = [p.name for p in sorted((folder / "checkpoints").iterdir())]
    assert names == ["step-000002", "step-000004", "step-000006", "step-000008"]
    told = summary(folder)
    assert (told["status"], told["recipe"], told["steps"], told["tokens"]) == ("done", "pretrain", STEPS, STEPS * 512)
    assert told["demo"] is True and told["loss"] < told["first_loss"]
    assert set(told["bits_per_byte"]) == {"en", "zh", "wiki.en", "wiki.zh"}
    assert all(told["bits_per_byte"][k] < told["before"]["bits_per_byte"][k] for k in ("en", "zh"))
    trained = [m for m in metrics(folder) if "loss" in m]
    assert [m["step"] for m in trained] == list(range(1, STEPS + 1))
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes"} <= set(trained[0])
    assert all(m["lr"] == 3e-3 for m in trained)  # 2 % of 8 steps is no warm-up, and nothing decays here
    assert all(m["skipped_updates"] == 0 and 0 <= m["data_wait_share"] < 1 for m in trained)
    ledger = json.loads((folder / "ledger.json").read_text())
    rows = {name: part["rows"] for name, part in ledger["parts"].items()}
    assert sum(rows.values()) == STEPS * 8 and set(rows) == {"wiki.en", "wiki.zh"}
    assert ledger["verdict"] == told["verdict"] == "nothing lost, nothing twice: 64 rows counted, 64 of them read again"
    state = (folder / "checkpoints/step-000008/state.json").read_text()
    assert json.loads(state)["ledger"]["hash"] == ledger["hash"] and len(state) < 1024
    assert "demo: true" in (folder / "final/README.md").read_text()
    assert "scale=135m" in done.stdout.splitlines()[0] and "scale=135m" in done.stdout.splitlines()[-1]


def test_every_checkpoint_and_final_load_in_stock_transformers(unbroken):
    folder, _ = unbroken
    kept = sorted(path for path in (folder / "intermediate").iterdir() if path.is_dir())
    for path in (*sorted((folder / "checkpoints").iterdir()), *kept, folder / "final"):
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        ids = tokenizer("The river", return_tensors="pt")["input_ids"]
        assert torch.isfinite(model(ids).logits).all()
    assert not [f for f in (folder / "final").iterdir() if f.suffix in (".bin", ".pt", ".py")]


def test_models_are_kept_early_and_evenly_and_listed(unbroken):
    folder, _ = unbroken
    entries = json.loads((folder / "intermediate/index.json").read_text())
    assert [(e["step"], e["name"]) for e in entries] == [
        (1, "pretrain-step-0000001-tokens-512"),
        (2, "pretrain-step-0000002-tokens-1024"),
        (4, "pretrain-step-0000004-tokens-2048"),
        (5, "pretrain-step-0000005-tokens-2560"),
        (8, "pretrain-step-0000008-tokens-4096"),
    ]
    ledgers = {m["step"]: m["ledger"] for m in metrics(folder) if "ledger" in m}
    for entry in entries:
        weights = folder / "intermediate" / entry["name"] / "model.safetensors"
        assert entry["weights_sha256"] == {"model.safetensors": checkpoint.sha256(weights)}
        assert checkpoint.problem(folder / "intermediate" / entry["name"]) is None
        assert (entry["stage"], entry["lr"], entry["tokens"]) == ("pretrain", 3e-3, entry["step"] * 512)
        assert sum(entry["mixture"].values()) == 1 and entry["ledger"] == ledgers.get(entry["step"], entry["ledger"])
    assert entries[-1]["bits_per_byte"] == summary(folder)["bits_per_byte"] and entries[0]["bits_per_byte"] is None


def test_kept_models_are_counted_as_they_are_kept():
    for every in (1, 2, 5, 8, 9, None):
        for steps in range(40):
            due = sum(intermediate.is_due(step, every, steps) for step in range(1, steps + 1))
            assert intermediate.count(every, steps) == due


def test_bits_per_byte_are_those_of_plain_logits(unbroken, shards):
    """Held-back documents one by one, through transformers' own forward pass, without packing."""
    folder, _ = unbroken
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    for name, part in Prepared(shards).held_back.items():
        if not name.startswith("wiki"):
            continue
        tokens, begins = part.read(0, part.tokens)
        starts = [*np.flatnonzero(begins), len(tokens)]
        nats = 0.0
        for first, last in zip(starts, starts[1:], strict=False):
            for row in range(first, last, 1):
                # rows of 64 cut a document where the stream's rows end: the context begins anew there
                context = max(first, row // 64 * 64)
                if row + 1 < last - 1:  # the end mark is not text
                    logits = model(torch.from_numpy(tokens[context : row + 1])[None]).logits[0, -1]
                    nats -= torch.log_softmax(logits.float(), -1)[tokens[row + 1]].item()
        expected = nats / math.log(2) / part.text_bytes
        assert summary(folder)["bits_per_byte"][name] == pytest.approx(expected, rel=0.02)  # bf16 products


def test_rows_hold_every_token_once_and_restart_positions_at_documents(tmp_path):
    documents = [[1, 10, 11, 2], [1, 12, 13, 14, 15, 2], [1, 16, 2]]
    about = {"vocab_size": 20, "tokenizer_sha256": "x", "source": "a", "language": "en"}
    paths = write_part(tmp_path / "train/a.en", ((ids, 3) for ids in documents), shard_tokens=5, **about)
    rows = TextRows(Part("a.en", paths), 4)
    assert len(rows) == 4
    made = batch([(rows, r) for r in range(4)] + [None], 4, pad_id=0)
    assert made["input_ids"].tolist() == [[1, 10, 11, 2], [1, 12, 13, 14], [15, 2, 1, 16], [2, 0, 0, 0], [0, 0, 0, 0]]
    assert made["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]]
    x = IGNORE
    assert made["targets"].tolist() == [[10, 11, 2, x], [12, 13, 14, 15], [2, x, 16, 2], [x, x, x, x], [x, x, x, x]]
    predicted = [t for row in made["targets"].tolist() for t in row if t != x]
    assert sorted(predicted) == sorted(t for d in documents for t in d[1:])


def interrupted(whole: Path, out: Path, step: int) -> Path:
    """A copy of a run as a kill after `step` left it."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (out / "summary.json").write_text(json.dumps({"status": "running"}))
    return out


ENDLESS = ("train.max_steps=100000", "train.save_steps=100000", "data.max_epochs=1e9", "train.eval_share=0")


def stopped_by(number: int, out: Path, processes: list[warm.Process]) -> None:
    """After a few steps the last process has a signal; all end with 3, and what was trained is saved."""
    while not ((out / "metrics.jsonl").exists() and len(metrics(out)) > 3):
        assert all(process.poll() is None for process in processes), processes[0].stderr
        time.sleep(0.05)
    processes[-1].send_signal(number)
    assert all(process.wait(60) == 3 and "Traceback" not in process.stderr for process in processes)
    assert summary(out)["status"] == "stopped"
    (saved,) = (out / "checkpoints").iterdir()
    assert metrics(out)[-1]["step"] == int(saved.name[5:]) and checkpoint.problem(saved) is None


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_the_step_and_exits_with_3(shards, tmp_path, number):
    out = tmp_path / "run"
    stopped_by(number, out, [warm.Process(words(shards, out, *ENDLESS), env=ENV)])


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(shards, tmp_path):
    out = tmp_path / "run"
    stopped_by(signal.SIGUSR1, out, warm.together(*words(shards, out, *ENDLESS)))


@pytest.mark.slow
def test_one_process_then_two_then_one_train_on_the_same_rows_as_one(unbroken, shards, tmp_path):
    whole, _ = unbroken
    out = interrupted(whole, tmp_path / "run", step=2)
    told, _ = warm.ended(warm.together(*words(shards, out)))
    assert "2 process(es)" in told.stdout and "going on from step 2" in told.stdout
    assert summary(out)["verdict"] == summary(whole)["verdict"]
    interrupted(out, tmp_path / "again", step=6)
    shutil.rmtree(out)
    (tmp_path / "again").rename(out)
    done = run(*words(shards, out))
    assert done.returncode == 0 and "1 process(es)" in done.stdout and "going on from step 6" in done.stdout
    # the same rows at the same places: the same ledger at every checkpoint
    ledgers = [[m["ledger"] for m in metrics(f) if "ledger" in m] for f in (out, whole)]
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) == 4
    assert (out / "ledger.json").read_text() == (whole / "ledger.json").read_text()
    assert proof.of_run(out) == summary(whole)["verdict"]
    # the same sums in another order
    losses = [[m["loss"] for m in metrics(f) if "loss" in m] for f in (out, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert summary(out)["bits_per_byte"] == pytest.approx(summary(whole)["bits_per_byte"], rel=1e-4)


@pytest.mark.slow
def test_an_anneal_of_one_process_goes_on_with_two(unbroken, shards, tmp_path):
    base = unbroken[0] / "checkpoints/step-000004"
    more = (f"model.path={base}", "data.sources={notes: 1, wiki: 1}", "train.max_steps=4")
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(*words(shards, whole, *more, recipe="anneal")).returncode == 0
    told, _ = warm.ended(warm.together(*words(shards, interrupted(whole, out, step=2), *more, recipe="anneal")))
    assert "2 process(es)" in told.stdout and "going on from step 2" in told.stdout
    assert (out / "ledger.json").read_text() == (whole / "ledger.json").read_text()
    rates, losses = ([[m[key] for m in metrics(f) if "loss" in m] for f in (out, whole)] for key in ("lr", "loss"))
    assert rates[0] == rates[1] and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_two_processes_twice_are_bitwise_equal_and_leave_out_the_same_updates(unbroken, shards, tmp_path):
    whole, _ = unbroken
    ends = []
    for name in ("a", "b"):
        (folder := tmp_path / name).mkdir()
        out = interrupted(whole, folder / "run", step=4)
        warm.ended(warm.together(*words(shards, out), script=Path(__file__).with_name("poisoned.py")))
        ends.append([(folder / f"weights-{rank}").read_text() for rank in (0, 1)])
        assert [m["skipped_updates"] for m in metrics(out) if "loss" in m] == [0] * 5 + [1] * 3
    assert len({*ends[0], *ends[1]}) == 1  # both processes of both runs hold the same weights


def tensors(folder: Path) -> dict:
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{number}.{name}": t for number, of_one in state.items() for name, t in of_one.items()}
    return load_file(folder / "model.safetensors") | moments


def test_an_update_without_numbers_is_left_out_and_counted_and_changes_nothing(shards, tmp_path, monkeypatch):
    poisoned.poison({3 * 8}, monkeypatch.setattr)
    done = run(*words(shards, out := tmp_path / "run", "train.save_steps=1"))
    assert done.returncode == 0, done.stderr
    assert [m["skipped_updates"] for m in metrics(out) if "loss" in m] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [m["grad_norm"] is None for m in metrics(out) if "loss" in m] == [step == 3 for step in range(8)]
    before, after, later = (tensors(out / f"checkpoints/step-{step:06d}") for step in (3, 4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(before["model.norm.weight"], later["model.norm.weight"])
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert summary(out)["updates_left_out"] == 1 and "64 rows counted" in summary(out)["verdict"]


def test_a_spike_is_left_out_and_counted_and_the_run_goes_on(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "WINDOW", 4)  # updates before there is a spike
    poisoned.poison({5 * 8}, monkeypatch.setattr, times=1e4)
    done = run(*words(shards, out := tmp_path / "run", "train.save_steps=1", "train.keep_checkpoints=null"))
    assert done.returncode == 0, done.stderr
    told = [m for m in metrics(out) if "loss" in m]
    assert [m["skipped_updates"] for m in told] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert told[5]["grad_norm"] > 100 * max(m["grad_norm"] for m in told if m["step"] != 6)
    before, after, later = (tensors(out / f"checkpoints/step-{step:06d}") for step in (5, 6, 7))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["model.norm.weight"], later["model.norm.weight"])
    assert summary(out)["updates_left_out"] == 1 and told[-1]["loss"] < told[0]["loss"]


def full_disk(patch, where):
    """Full from the third checkpoint on: no room before it, in the write, or for the log."""
    left = {"before": 2, "in it": 2, "log": 9}[where]  # calls that find room

    def until_full(owner, name, when_full):
        own = getattr(owner, name)

        def call(*given, **named):
            nonlocal left
            left -= 1
            return own(*given, **named) if left >= 0 else when_full()

        patch.setattr(owner, name, call)

    def refuse():
        raise OSError(28, "No space left on device")

    if where == "before":
        until_full(shutil, "disk_usage", lambda: SimpleNamespace(free=1000))
    else:
        until_full(*{"in it": (torch, "save"), "log": (log.MetricsFile, "write")}[where], refuse)


@pytest.mark.parametrize("where", ["before", "in it", "log"])
def test_a_full_disk_ends_a_run_with_one_line_and_the_same_command_goes_on(unbroken, shards, tmp_path, where):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, where)
        done = run(*words(shards, out))
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and "no space left" in line.lower() and "nothing that was saved is lost" in line
    assert "Traceback" not in done.stderr and summary(out)["status"] == "failed"
    saved = checkpoint.all_of(out / "checkpoints")
    assert len(saved) == 2 and not any(map(checkpoint.problem, saved))
    done = run(*words(shards, out))
    assert done.returncode == 0 and "going on from step 4" in done.stdout, done.stderr
    assert same_weights(out / "final", unbroken[0] / "final")
    assert (out / "ledger.json").read_text() == (unbroken[0] / "ledger.json").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_gains_and_the_embedding_do_not(tied):
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    net = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=tied))
    groups = pretrain.parameter_groups(net, SimpleNamespace(weight_decay=0.1))
    name_of = {id(parameter): name for name, parameter in net.named_parameters()}
    decay = {name_of[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(name_of)  # all, each once
    kept = {name for name, value in decay.items() if value == 0}
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert kept == {"model.embed_tokens.weight", "model.norm.weight"} | {
        f"model.layers.{i}.{norm}.weight" for i in range(2) for norm in norms
    }
    assert {decay[name] for name in decay.keys() - kept} == {0.1} and ("lm_head.weight" in decay) == (not tied)


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(shards, tmp_path):
    for limit, clipped in ((0.01, 0.01), (0, None)):  # 0: no clipping
        out = tmp_path / str(limit)
        more = ("train.max_steps=1", f"optim.max_grad_norm={limit}", "train.precision=fp32")
        done = run(*words(shards, out, *more))
        assert done.returncode == 0, done.stderr
        moments = torch.load(out / "checkpoints/step-000001/optimizer.pt", weights_only=True)["state"].values()
        # the first moment of the first step is (1 - beta1) times the gradient
        norm = math.sqrt(sum(float(moment["exp_avg"].square().sum()) for moment in moments)) / (1 - 0.9)
        (logged,) = [m["grad_norm"] for m in metrics(out) if "grad_norm" in m]
        assert logged > 0.1 and norm == pytest.approx(clipped or logged, rel=1e-3)


def test_too_many_take_the_run_back_without_their_data_whenever_the_host_looks(shards, tmp_path, monkeypatch):
    poisoned.poison({4 * 8, 5 * 8, 6 * 8}, monkeypatch.setattr)
    ends = []
    for every in (1, 3):
        out = tmp_path / f"run-{every}"
        more = ("train.max_skipped=2", "train.save_steps=4", f"train.logging_steps={every}")
        done = run(*words(shards, out, *more))
        assert done.returncode == 0, done.stderr
        assert "more than 2 updates skipped from step 5 on" in done.stdout
        assert "back to step 4, and the data of steps 5 to 7 are left out (roll-back 1 of at most 3)" in done.stdout
        ledger = json.loads((out / "ledger.json").read_text())
        assert ledger["places_left_out"] == [[32, 56]]
        assert ledger["verdict"].startswith("nothing lost, nothing twice: 64 rows") and proof.of_run(out)
        steps = [m["step"] for m in metrics(out) if "loss" in m]
        assert steps == sorted(set(steps)) and steps[-1] == STEPS
        assert [m["rolled_back_from"] for m in metrics(out) if "rolled_back_from" in m] == [7 if every == 1 else 8]
        ends.append(out / "final")
    assert same_weights(*ends)
    # a kill between the roll-back and the next checkpoint: it is made again, and told once
    again = interrupted(out, tmp_path / "again", step=4)
    done = run(*words(shards, again, *more))
    assert done.returncode == 0 and "back to step 4" in done.stdout, done.stderr
    assert [m["rolled_back_from"] for m in metrics(again) if "rolled_back_from" in m] == [8]
    assert same_weights(again / "final", out / "final")


def test_a_run_that_goes_wrong_again_and_again_stops_with_its_good_checkpoints(shards, tmp_path, monkeypatch):
    poisoned.poison(set(range(32, 10**4, 8)), monkeypatch.setattr)
    more = ("train.max_skipped=0", "train.max_rollbacks=2")
    done = run(*words(shards, out := tmp_path / "run", *more))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: more than 0 updates skipped")
    assert [m["step"] for m in metrics(out) if "rolled_back_from" in m] == [4, 4]
    assert "after 2 roll-backs" in done.stderr and "last good checkpoint: step-000004" in done.stderr
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert saved == ["step-000002", "step-000004"] and summary(out)["status"] == "failed"
    kept = [path for path in (out / "intermediate").iterdir() if path.is_dir()]
    for path in (*kept, *(out / "checkpoints").iterdir()):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


def test_weights_that_are_no_numbers_are_never_saved(unbroken, shards, tmp_path, monkeypatch):
    own, broken = pretrain.Trainer.step, []

    def step(self, loaded):
        update = own(self, loaded)
        if loaded.step == 5 and not broken:
            broken.append(next(self.model.parameters()).data[7, 3].fill_(float("inf")))
        return update

    monkeypatch.setattr(pretrain.Trainer, "step", step)
    out = interrupted(unbroken[0], tmp_path / "run", step=4)
    done = run(*words(shards, out))
    assert done.returncode == 0 and "no numbers after step 6: back to step 4" in done.stdout, done.stderr
    assert json.loads((out / "ledger.json").read_text())["places_left_out"] == [[32, 48]]
    for path in (out / "checkpoints").iterdir():
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


def test_compiled_layers_train_to_the_same_losses(unbroken, shards, tmp_path, monkeypatch):
    """Captured as on a GPU, forward and backward; the machine code, which takes minutes to make here, is left out."""
    made, own = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **how: made.append(given) or own(*given, backend="aot_eager"))
    done = run(*words(shards, tmp_path / "run", "train.compile=true", "train.intermediate_steps=null"))
    assert done.returncode == 0, done.stderr
    assert len(made) == TINY_ARCHITECTURE["model.num_hidden_layers"]
    losses = [[m["loss"] for m in metrics(folder) if "loss" in m] for folder in (tmp_path / "run", unbroken[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    bits = [summary(folder)["bits_per_byte"] for folder in (tmp_path / "run", unbroken[0])]
    assert bits[0] == pytest.approx(bits[1], rel=1e-3)


def test_the_proof_is_a_command_and_finds_a_shard_that_changed(unbroken, shards, tmp_path):
    folder, _ = unbroken
    assert proof.of_run(folder) == summary(folder)["verdict"]
    lines = metrics(folder)
    next(m for m in lines if m.get("ledger") and m["step"] == 4)["rows"]["wiki.en"] -= 1
    (changed := tmp_path / "run").mkdir()
    for name in ("config.yaml", "checkpoints"):
        (changed / name).symlink_to(folder / name)
    (changed / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    with pytest.raises(UserError, match="between steps 4 and 6 .* rows of wiki.en .* trained on twice"):
        proof.of_run(changed)
    (changed / "metrics.jsonl").write_bytes(b"\xff")
    assert proof.of_run(changed) == summary(folder)["verdict"]  # what the newest checkpoint says of all 64 rows


def test_what_is_wrong_with_a_run_is_one_line_of_the_proof(unbroken, tmp_path):
    (whole := tmp_path / "run").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(unbroken[0] / name, whole)
    with pytest.raises(UserError, match="has no checkpoint of recipe=pretrain"):
        proof.of_run(whole)
    shutil.copytree(unbroken[0] / "checkpoints/step-000008", newest := whole / "checkpoints/step-000008")
    assert proof.of_run(whole) == summary(unbroken[0])["verdict"]
    state = json.loads((newest / "state.json").read_text())
    state["ledger"]["rows"][0] += 1
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="step-000008 is damaged .state.json "):
        proof.of_run(whole)
    (newest / "MANIFEST.json").unlink()
    checkpoint.commit(newest, again := whole / "checkpoints/step-000009", step=9)
    again.rename(newest)
    with pytest.raises(UserError, match="it is of step 9"):
        proof.of_run(whole)
    newest.rename(again)
    with pytest.raises(UserError, match="between steps 8 and 8 .* 0 rows of wiki.en and the ledger 1"):
        proof.of_run(whole)
    (whole / "config.yaml").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="no config.yaml"):
        proof.of_run(whole)


def test_a_lost_or_damaged_list_of_models_is_made_again_from_them(unbroken, tmp_path):
    whole, folder = unbroken[0] / "intermediate", tmp_path / "intermediate"
    shutil.copytree(whole, folder)
    for damage in ((folder / "index.json").unlink, lambda: (folder / "index.json").write_text("[{")):
        damage()
        intermediate.begin(folder, 8)
        assert (folder / "index.json").read_bytes() == (whole / "index.json").read_bytes()
    (folder / "mine").mkdir()
    intermediate.begin(folder, 4)
    assert [entry["step"] for entry in intermediate.index(folder)] == [1, 2, 4]
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 4


def test_a_finished_run_whose_last_checkpoint_is_damaged_makes_it_again(unbroken, shards, tmp_path):
    whole, _ = unbroken
    shutil.copytree(whole, out := tmp_path / "run")
    last = out / "checkpoints/step-000008"
    (last / "model.safetensors").write_bytes(b"")
    done = run(*words(shards, out))
    assert done.returncode == 0 and "going on from step 6" in done.stdout, done.stderr
    assert same_weights(last, whole / "checkpoints/step-000008")
    assert "reused, nothing done" in run(*words(shards, out, "kernel=torch")).stdout  # what auto chose on a CPU


@pytest.mark.slow
def test_portioning_a_step_does_not_change_it(shards, tmp_path):
    done = run(*words(shards, tmp_path / "run", "train.micro_batch_rows=8", "train.precision=fp32"))
    small = run(*words(shards, tmp_path / "small", "train.micro_batch_rows=1", "train.precision=fp32"))
    assert done.returncode == small.returncode == 0, done.stderr + small.stderr
    for figure in ("loss", "grad_norm"):  # rows have unlike numbers of targets: a mean of means would show here
        one, eight = ([m[figure] for m in metrics(tmp_path / f) if "loss" in m] for f in ("run", "small"))
        assert one == pytest.approx(eight, rel=1e-4), figure


def test_an_anneal_begins_at_any_checkpoint_with_its_moments_and_lets_the_rate_fall(unbroken, shards, tmp_path):
    trunk, _ = unbroken
    out = tmp_path / "anneal"
    base = trunk / "checkpoints/step-000004"
    more = (f"model.path={base}", "data.sources={notes: 1, wiki: 1}", "train.max_steps=4")
    done = run(*words(shards, out, *more, recipe="anneal"))
    assert done.returncode == 0, done.stderr
    assert f"optimizer: the moments of {base}" in done.stdout
    told = [m for m in metrics(out) if "loss" in m]
    assert [m["lr"] for m in told] == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])
    before = next(m for m in metrics(out) if "eval_bits_per_byte_en" in m)
    ledger = json.loads((out / "ledger.json").read_text())
    assert set(ledger["parts"]) == {"notes.en", "wiki.en", "wiki.zh"}
    # it is that checkpoint's model: after four steps, not after none and not after eight
    assert before["eval_bits_per_byte_wiki.zh"] < summary(trunk)["before"]["bits_per_byte"]["wiki.zh"]
    assert before["eval_bits_per_byte_wiki.zh"] > summary(trunk)["bits_per_byte"]["wiki.zh"]
    from_final = run(
        *words(shards, tmp_path / "final", f"model.path={trunk / 'final'}", "train.max_steps=1", recipe="anneal")
    )
    assert "optimizer: begins anew" in from_final.stdout


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "config.json", "MANIFEST.json"])
def test_a_damaged_checkpoint_is_no_base_to_go_on_from(unbroken, shards, tmp_path, name):
    base = tmp_path / "step-000004"
    shutil.copytree(unbroken[0] / "checkpoints/step-000004", base)
    damaged = bytearray((base / name).read_bytes())
    damaged[len(damaged) * 2 // 3] ^= 1
    (base / name).write_bytes(damaged)
    refused = run(*words(shards, tmp_path / "out", f"model.path={base}", recipe="anneal"))
    assert refused.returncode == 2 and f"model.path={base} is damaged ({name} " in refused.stderr
    assert not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["no pickle", "empty", "of another model", "of another order"])
def test_an_optimizer_that_is_not_of_this_model_is_one_line(unbroken, shards, tmp_path, kind):
    shutil.copytree(unbroken[0] / "final", base := tmp_path / "base")
    (base / "MANIFEST.json").unlink()
    state = torch.load(unbroken[0] / "checkpoints/step-000004/optimizer.pt", weights_only=True)
    if kind == "of another model":
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:-1]
    elif kind == "of another order":
        state["param_groups"].reverse()
    torch.save({} if kind == "empty" else state, base / "optimizer.pt")
    if kind == "no pickle":
        (base / "optimizer.pt").write_bytes(b"junk")
    done = run(*words(shards, tmp_path / "out", f"model.path={base}", recipe="anneal"))
    assert done.returncode == 2 and f"{base}/optimizer.pt does not hold AdamW's moments" in done.stderr, done.stderr


def test_several_anneals_branch_off_one_trunk(unbroken, shards, tmp_path):
    """From a checkpoint by its subfolder, whose configuration has wrong ids, and with another decay and mixture."""
    trunk, _ = unbroken
    shutil.copytree(trunk / "checkpoints", tmp_path / "repository")
    config = tmp_path / "repository/step-000004/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token_id": 1, "eos_token_id": 2}))
    config.with_name("MANIFEST.json").unlink()  # published ones have none
    base = (f"model.path={tmp_path}/repository", "model.subfolder=step-000004", "train.max_steps=3")
    branches = {
        "linear": ("data.sources={wiki: 1}",),
        "root": ("data.sources={wiki: 1}", "schedule.kind=one_minus_sqrt"),
        "notes": ("data.sources={notes: 1}",),
        "settings": ("data.sources={wiki: 1}", "optim.weight_decay=0.5", "optim.betas=[0.8,0.9]", "optim.eps=1e-3"),
    }
    for name, more in branches.items():
        done = run(*words(shards, tmp_path / name, *base, *more, recipe="anneal"))
        assert done.returncode == 0, done.stderr
        assert "has 1 as the token that a text begins with" in done.stdout
        assert "has 2 as the token that a text ends with" in done.stdout
        final = AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").config
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name / "final")
        assert (final.bos_token_id, final.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        (entry,) = [e for e in json.loads((tmp_path / name / "intermediate/index.json").read_text()) if e["step"] == 3]
        assert entry["name"].startswith("anneal-step-0000003-tokens-1536")
    begins = [next(m for m in metrics(tmp_path / name) if "eval_loss_wiki.en" in m) for name in ("linear", "root")]
    assert begins[0]["eval_loss_wiki.en"] == begins[1]["eval_loss_wiki.en"]
    rates = [[m["lr"] for m in metrics(tmp_path / name) if "loss" in m] for name in ("linear", "root")]
    assert rates[0] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert rates[1] == pytest.approx([3e-3 * (1 - math.sqrt(k / 3)) for k in range(3)])
    assert not same_weights(tmp_path / "linear/final", tmp_path / "root/final")
    assert not same_weights(tmp_path / "linear/final", tmp_path / "notes/final")
    # the moments are the trunk's, the settings each branch's own
    state = torch.load(tmp_path / "settings/checkpoints/step-000003/optimizer.pt", weights_only=True)
    asked = [(group["weight_decay"], group["betas"], group["eps"]) for group in state["param_groups"]]
    assert asked == [(0.5, (0.8, 0.9), 1e-3), (0.0, (0.8, 0.9), 1e-3)]


def test_the_same_command_reuses_a_finished_run_and_another_is_refused(unbroken, shards):
    folder, _ = unbroken
    again = run(*words(shards, folder))
    assert again.returncode == 0 and "reused" in again.stdout
    other = run(*words(shards, folder, "data.block_rows=50"))
    assert other.returncode == 2 and "data.block_rows: 100 there, 50 now" in other.stderr


@pytest.mark.parametrize(
    "more, told",
    [
        (["train.max_steps=5000"], "data.max_epochs=50"),
        (["data.sources={books: 1}"], "the shards have no such source; they have notes, wiki"),
        (["train.max_length=1024", "train.tokens_per_step=1024"], "512 positions"),
        (["data.shards=/no/where"], "/no/where"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_line_and_leaves_the_directory_free(shards, tmp_path, more, told):
    done = run(*words(shards, tmp_path / "run", *more))
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "run/checkpoints").exists() or not list((tmp_path / "run/checkpoints").iterdir())


def test_a_checkpoint_of_another_vocabulary_is_refused(unbroken, shards, tmp_path):
    from tiny import tiny_model

    from aquila_sft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shards / "tokenizer")
    tokenizer.add_tokens(["<|another|>"])
    tiny_model(tmp_path / "other", tokenizer)
    done = run(*words(shards, tmp_path / "run", f"model.path={tmp_path / 'other'}", recipe="anneal"))
    assert done.returncode == 2 and "another vocabulary" in done.stderr, done.stderr


def test_a_damaged_shard_stops_with_its_name(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    file = next((tmp_path / "shards/train").glob("wiki.zh/*.shard"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    done = run(*words(tmp_path / "shards", tmp_path / "run"))
    assert done.returncode == 2 and str(file) in done.stderr and "Traceback" not in done.stderr, done.stderr
