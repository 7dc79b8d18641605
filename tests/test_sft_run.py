"""The program as a user runs it: whole runs in processes of their own, ended in every way that runs end."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import groupby
from pathlib import Path

import gradients_worker
import pytest
import torch
import warm
from safetensors.torch import load_file, save_file
from tiny import SENTENCES, tiny_conversations, tiny_model, tiny_ranks, tiny_tokenizer, write_jsonl, write_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from aquila_sft import chat_template
from aquila_sft.data import sft_set
from aquila_sft.data.rows import PackedRows, RowOrder
from aquila_sft.tokenizer import SPECIALS

ROOT = Path(__file__).parents[1]
STEPS = 6
# A launcher would set one thread; two test processes with two threads each would spin on two cores.
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model and conversations; `words(recipe, out)` is the command that tunes it."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model(folder / "base", tiny_tokenizer(folder / "tok"))
    write_jsonl(folder / "chat.jsonl", tiny_conversations(120))
    return folder


def words(world, out, *more, recipe="sft"):
    settings = {
        "recipe": recipe,
        "scale": "mini",
        "model.path": world / "base",
        "data.files": world / "chat.jsonl",
        "output_dir": out,
        "train.max_length": 128,
        "train.tokens_per_step": 512,
        "train.max_steps": STEPS,
        "train.micro_batch_rows": 2,
        "train.logging_steps": 1,
        "train.save_steps": 2,
    }
    settings |= dict(word.split("=", 1) for word in more)
    return [f"{key}={value}" for key, value in settings.items()]


def run(command):
    return warm.run(command, env=ENV)


def run_in_a_python_of_its_own(command, **env):
    """For what the libraries read from the environment while they are imported."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *command], capture_output=True, text=True, timeout=180, env=ENV | env
    )


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """One whole run of each recipe, {recipe: (folder, process)}."""
    out = tmp_path_factory.mktemp("unbroken")
    return {recipe: (out / recipe, run(words(world, out / recipe, recipe=recipe))) for recipe in ("sft", "sft_lora")}


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(a, b):
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("recipe", ["sft", "sft_lora"])
def test_a_run_leaves_what_the_contract_names(unbroken, recipe):
    folder, done = unbroken[recipe]
    assert done.returncode == 0, done.stderr
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "ledger.json",
        "checkpoints",
        "final",
    }
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-000004", "step-000006"]
    told = summary(folder)
    assert (told["status"], told["steps"], told["demo"], told["scale"]) == ("done", STEPS, True, "mini")
    assert set(told["bits_per_byte"]) == {"en", "zh"} and all(0 < v < 10 for v in told["bits_per_byte"].values())
    trained = [m for m in metrics(folder) if "loss" in m]
    assert [m["step"] for m in trained] == list(range(1, STEPS + 1))
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes"} <= set(trained[0])
    assert trained[-1]["tokens"] == told["tokens"] <= STEPS * 512 and trained[-1]["loss"] < trained[0]["loss"]
    assert trained[0]["lr"] > 0
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["read"] == 120 == ledger["kept"] + ledger["held_back"] + ledger["left_out"]
    for line in (
        "recipe=" + recipe,
        "scale=mini",
        "kernel torch",
        "precision",
        "attention sdpa",
        "recipe=chat",
        "scale=135m",
    ):
        assert line in done.stdout
    assert "demo: true" in (folder / "final/README.md").read_text()
    assert not [f for f in (folder / "final").iterdir() if f.suffix in (".bin", ".pt", ".pth", ".py")]
    if recipe == "sft_lora":
        assert told["merge_difference"] < 1e-5 and "merge gate" in done.stdout
        assert (folder / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("recipe", ["sft", "sft_lora"])
def test_final_loads_in_stock_transformers_and_was_trained(unbroken, world, recipe):
    folder, _ = unbroken[recipe]
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=4)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    assert not same_weights(folder / "final", world / "base")
    assert chat_template.turn_end_id(tokenizer) in model.generation_config.eos_token_id


def test_a_finished_run_is_reused_and_another_configuration_refused(unbroken, world):
    folder, _ = unbroken["sft"]
    before = (folder / "final/model.safetensors").stat().st_mtime_ns
    again = run(words(world, folder))
    assert again.returncode == 0 and "reused" in again.stdout
    other = run(words(world, folder, "optim.lr=0.1"))
    assert other.returncode == 2
    assert len(other.stderr.strip().split("\n")) == 1 and "optim.lr: 0.003 there, 0.1 now" in other.stderr
    assert (folder / "final/model.safetensors").stat().st_mtime_ns == before
    assert summary(folder)["status"] == "done"


def test_trackers_write_into_the_run_and_unknown_ones_are_named(world, tmp_path):
    done = run(
        words(
            world,
            tmp_path / "run",
            "report_to=[tensorboard]",
            "train.max_steps=2",
            "train.eval_steps=1",
            "train.activation_checkpointing=true",
        )
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    assert [m["step"] for m in metrics(tmp_path / "run") if "eval_loss_en" in m] == [0, 1, 2]
    refused = run(words(world, tmp_path / "run2", "report_to=[wndb]"))
    assert refused.returncode == 2 and "report_to: wndb" in refused.stderr
    assert summary(tmp_path / "run2")["status"] == "failed"


def test_changed_data_are_another_configuration(unbroken, world, tmp_path):
    folder, _ = unbroken["sft"]
    write_jsonl(tmp_path / "chat.jsonl", tiny_conversations(119))
    refused = run(words(world, folder, f"data.files={tmp_path}/chat.jsonl"))
    assert refused.returncode == 2 and "data: " in refused.stderr


def summary_status(folder):
    try:
        return summary(folder)["status"]
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_and_status_3_and_the_same_command_goes_on(unbroken, world, tmp_path, number):
    out = tmp_path / "run"
    process = warm.Process(words(world, out), env=ENV)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.005)
    while process.poll() is None and not any("loss" in m for m in safe_metrics(out)):
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(120) == 3, process.stderr
    assert "Traceback" not in process.stderr and "stopped: " in process.stderr
    assert summary(out)["status"] == "stopped" and len(list((out / "checkpoints").glob("step-*"))) >= 1
    done = run(words(world, out))
    assert done.returncode == 0 and "going on from step" in done.stdout
    assert same_weights(unbroken["sft"][0] / "final", out / "final")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_training_ends_in_good_order_too(world, tmp_path, number):
    out = tmp_path / "run"
    process = warm.Process(words(world, out), env=ENV)
    while process.poll() is None and summary_status(out) != "running":
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(120) == 3 and "Traceback" not in process.stderr, process.stderr
    assert summary(out)["status"] == "stopped"


def test_a_damaged_final_is_made_again(unbroken, world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken["sft"][0], out)
    weights = out / "final/model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01\x02\x03")
    done = run(words(world, out))
    assert done.returncode == 0 and "final is damaged" in done.stdout, done.stderr
    assert same_weights(unbroken["sft"][0] / "final", out / "final")


def test_a_set_of_bad_rows_leaves_a_ledger(world, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"conversations": []}\nnot json\n')
    done = run(words(world, tmp_path / "run", f"data.files={tmp_path / 'bad.jsonl'}"))
    assert done.returncode == 2 and "no conversation is left" in done.stderr
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert ledger["read"] == ledger["left_out"] == 2 and summary(tmp_path / "run")["status"] == "failed"
    again = run(words(world, tmp_path / "run", "train.max_steps=1"))
    assert again.returncode == 0, again.stderr


def safe_metrics(folder):
    try:
        return metrics(folder)
    except (json.JSONDecodeError, FileNotFoundError):
        return []


def test_a_loss_that_is_not_finite_stops_with_one_line(world, tmp_path):
    tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "tok"))
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file(
        weights | {"model.norm.weight": weights["model.norm.weight"] * 1e37},
        tmp_path / "base/model.safetensors",
        {"format": "pt"},
    )
    done = run(
        words(
            world, tmp_path / "run", f"model.path={tmp_path / 'base'}", "train.precision=fp32", "optim.max_grad_norm=0"
        )
    )
    assert done.returncode == 2 and "more than 3 updates were left out by step 4" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and summary(tmp_path / "run")["status"] == "failed"
    for written in (tmp_path / "run/checkpoints").glob("step-*"):  # of the weights as they were before any bad update
        assert all(torch.isfinite(t).all() for t in load_file(written / "model.safetensors").values())


@pytest.fixture(scope="module")
def prepared(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    policy = sft_set.RowPolicy(gradients_worker.LENGTH, 0.0, 0, 1000, 1)
    sft_set.prepare([world / "chat.jsonl"], world / "rows", partial(chat_template.encode_batch, tokenizer), policy, {})
    return world / "rows/train"


@pytest.mark.parametrize("loss_per", ["token", "answer"])
def test_1x8_2x4_8x1_and_two_processes_give_the_same_gradients(world, prepared, tmp_path, loss_per):
    def gradients(name, rows, run_worker):
        worker = [ROOT / "tests/gradients_worker.py", world / "base", prepared, rows, tmp_path / f"{name}.pt"]
        worker += [f"train.loss_per={loss_per}"]
        done = run_worker(*map(str, worker))
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / f"{name}.pt")

    def alone(script, *more):
        return warm.run(more, script=script, env=ENV)

    port = random.randint(20000, 60000)
    pair = partial(launcher, "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    results = {f"{8 // rows}x{rows}": gradients(rows, rows, alone) for rows in (8, 4, 1)}
    results["two processes"] = gradients("pair", 2, pair)
    whole = results["1x8"]
    scale = max(g.abs().max() for g in whole["gradients"].values())
    for name, result in results.items():
        assert result["loss"] == pytest.approx(whole["loss"], rel=1e-6), name
        for key, gradient in result["gradients"].items():
            # fp32 sums in another order: a few roundings of the largest gradient
            assert (gradient - whole["gradients"][key]).abs().max() < 2e-6 * scale, (name, key)


@pytest.mark.parametrize(
    ("loss_per", "weigh"),
    [
        ("token", lambda n, of_all: 1.0),
        ("answer_root", lambda n, of_all: n**-0.5),
        ("answer", lambda n, of_all: 1 / n),
        ("conversation", lambda n, of_all: 1 / of_all),
    ],
)
def test_the_loss_of_a_step_is_the_mean_that_loss_per_names(world, prepared, tmp_path, loss_per, weigh):
    """Against the stock model, one conversation at a time, and its log-probabilities."""
    rows = PackedRows(prepared)
    order = RowOrder(len(rows), 1337, 8)
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    lost = weights = 0.0
    for item in (item for place in range(8) for item in rows.items(order(place))):
        span = slice(int(rows.offsets[item]), int(rows.offsets[item + 1]))
        ids, is_target = torch.tensor(rows.tokens[span].astype("int64")), rows.targets[span].tolist()
        with torch.no_grad():
            nll = -model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        for is_answer, answer in groupby(range(len(ids)), is_target.__getitem__):
            answer = list(answer) if is_answer else []
            for t in answer:
                w = weigh(len(answer), sum(is_target))
                lost, weights = lost + w * float(nll[t - 1]), weights + w
    worker = [ROOT / "tests/gradients_worker.py", world / "base", prepared, 4, tmp_path / "one.pt"]
    done = warm.run([*map(str, worker[1:]), f"train.loss_per={loss_per}"], script=worker[0], env=ENV)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "one.pt")["loss"] == pytest.approx(lost / weights, rel=1e-5)


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory):
    """SENTENCES as documents in the base's vocabulary."""
    folder = tmp_path_factory.mktemp("shards")
    write_jsonl(folder / "docs.jsonl", [{"text": f"{n}. {text} {text[::-1]}"} for n, text in enumerate(SENTENCES)])
    done = run(
        [
            "recipe=prepare",
            "scale=mini",
            f"tokenizer.path={world / 'base'}",
            f"data.files={folder / 'docs.jsonl'}",
            f"output_dir={folder / 'run'}",
            "prepare.holdout_fraction=0",
            "prepare.clean.min_bytes=1",
        ]
    )
    assert done.returncode == 0, done.stderr
    return folder / "run/final"


def test_text_among_unpacked_conversations_is_trained_on_and_a_killed_run_goes_on_with_it(world, shards, tmp_path):
    more = ["data.text.share=0.25", f"data.text.shards={shards}", "data.packing=false", "train.loss_per=answer"]
    whole = run(words(world, tmp_path / "whole", *more))
    assert whole.returncode == 0, whole.stderr
    ledger = json.loads((tmp_path / "whole/ledger.json").read_text())
    assert ledger["rows"]["train"]["rows"] == ledger["kept"]
    assert f"{round(ledger['kept'] / 3)} rows of text among {ledger['kept']} of conversations: text.en " in whole.stdout
    plain = run(words(world, tmp_path / "plain", *more[2:]))
    assert summary(tmp_path / "plain")["tokens"] < summary(tmp_path / "whole")["tokens"], plain.stderr
    assert not same_weights(tmp_path / "plain/final", tmp_path / "whole/final")
    parted = warm.Process(words(world, tmp_path / "parted", *more), env=ENV)
    while not (tmp_path / "parted/checkpoints/step-000002").exists():
        time.sleep(0.05)
        assert parted.poll() is None, parted.stderr
    parted.kill()
    assert run(words(world, tmp_path / "parted", *more)).returncode == 0
    assert same_weights(tmp_path / "parted/final", tmp_path / "whole/final")
    ledgers = [json.loads((tmp_path / name / "ledger.json").read_text())["text"] for name in ("whole", "parted")]
    assert ledgers[0] == ledgers[1] and ledgers[0]["shards"] == str(shards)
    rows, order = round(ledger["kept"] / 3), RowOrder(ledger["kept"], 1337, 6 * 4, round(ledger["kept"] / 3))
    assert sum(ledgers[0]["rows"].values()) == sum(order(place) >= ledger["kept"] for place in range(24)) <= rows


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["data.text.shards=nowhere"], "data.text.share=0.1: no shards at nowhere; give data.text.shards="),
        (["data.text.languages={fr: 1}"], "data.text.languages.fr=1.0: the shards have no such language"),
    ],
)
def test_text_that_cannot_be_had_stops_the_run_before_it_begins(world, shards, tmp_path, more, told):
    done = run(words(world, tmp_path / "run", "data.text.share=0.1", f"data.text.shards={shards}", *more))
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_text_of_another_vocabulary_is_refused(world, shards, tmp_path):
    tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "tok", entries=1900))
    given = [f"model.path={tmp_path / 'base'}", "data.text.share=0.1", f"data.text.shards={shards}"]
    done = run(words(world, tmp_path / "run", *given))
    assert done.returncode == 2 and "were made with another vocabulary (1,916 entries)" in done.stderr, done.stderr


def launcher(*words_, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", *words_],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        **kwargs,
    )


def test_accelerate_launch_uses_all_cores_and_gives_the_same_result(world, unbroken, tmp_path):
    done = launcher(
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
        str(ROOT / "train.py"),
        *words(world, tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    assert f"device cpu ({cores} threads)" in done.stdout or torch.cuda.is_available()
    ours, theirs = summary(tmp_path / "run"), summary(unbroken["sft"][0])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_two_processes_train_together(world, unbroken, tmp_path):
    done = launcher(
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        f"--main_process_port={random.randint(20000, 60000)}",
        str(ROOT / "train.py"),
        *words(world, tmp_path / "run", "train.precision=fp32"),
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es) x 1 x 2 rows" in done.stdout
    assert done.stdout.count("recipe=sft -> ") == 1  # one voice
    ours, theirs = summary(tmp_path / "run"), summary(unbroken["sft"][0])
    assert ours["tokens"] == theirs["tokens"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "sft_lora"])
def test_a_run_of_one_process_goes_on_with_two(unbroken, world, tmp_path, recipe):
    whole, out = unbroken[recipe][0], tmp_path / "run"
    shutil.copytree(whole, out)
    for made_later in (out / "final", out / "adapter", out / "checkpoints/step-000006"):
        shutil.rmtree(made_later, ignore_errors=True)
    (out / "summary.json").write_text(json.dumps({"status": "running"}))
    told, _ = warm.ended(warm.together(*words(world, out, recipe=recipe)))
    assert "2 process(es) x 1 x 2 rows" in told.stdout and "going on from step 4" in told.stdout
    ours, theirs = ([m for m in metrics(folder) if "loss" in m] for folder in (out, whole))
    for key in ("step", "tokens", "lr"):  # the same rows in the same order
        assert [m[key] for m in ours] == [m[key] for m in theirs]
    assert [m["loss"] for m in ours[4:]] == pytest.approx([m["loss"] for m in theirs[4:]], rel=2e-3)  # bf16 sums
    assert summary(out)["bits_per_byte"] == pytest.approx(summary(whole)["bits_per_byte"], rel=1e-3)


def test_processes_that_would_train_apart_stop(world, tmp_path):
    """Two plain processes in one directory, as a launcher that forms no group starts them: one trains, one stops."""
    out = tmp_path / "run"
    processes = [warm.Process(words(world, out), env=ENV) for _ in range(2)]
    assert sorted(process.wait(180) for process in processes) == [0, 2]
    refused = next(process.stderr for process in processes if process.returncode == 2)
    assert "another process" in refused and len(refused.strip().split("\n")) == 1


def test_a_worker_whose_launcher_dies_stops(world, tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            str(ROOT / "train.py"),
            *words(world, out, "train.max_steps=2000", "train.save_steps=1000"),
        ],
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as launch:
        while launch.poll() is None and not any("loss" in m for m in safe_metrics(out)):
            time.sleep(0.01)
        lock = (out / ".lock").read_text()
        launch.kill()
        launch.wait()
    worker = int(lock)
    for _ in range(600):
        if not Path(f"/proc/{worker}").exists() or b"train.py" not in Path(f"/proc/{worker}/cmdline").read_bytes():
            break
        time.sleep(0.1)
    else:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker trained on as an orphan")
    assert summary(out)["status"] == "stopped"


def test_a_local_run_looks_up_no_host(world, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket\n"
        "def refuse(what):\n"
        "    def call(*a, **k):\n"
        "        with open(os.environ['LOOKED_UP'], 'a') as f: f.write(f'{what} {a[:2]}\\n')\n"
        "        raise OSError('no network in this test')\n"
        "    return call\n"
        "for name in ('getaddrinfo', 'gethostbyname', 'create_connection'):\n"
        "    setattr(socket, name, refuse(name))\n"
        "socket.socket.connect = refuse('connect')\n"
    )
    looked_up = tmp_path / "looked_up"
    env = {k: v for k, v in ENV.items() if not k.startswith("HF_") and k != "CI"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words(world, tmp_path / "run", recipe="sft_lora")],
        capture_output=True,
        text=True,
        timeout=180,
        env=env | {"PYTHONPATH": str(tmp_path), "LOOKED_UP": str(looked_up)},
    )
    assert done.returncode == 0, done.stderr
    assert not looked_up.exists(), looked_up.read_text()


def test_without_network_the_real_thing_stops_within_ten_seconds_with_three_ways_on(tmp_path):
    began = time.monotonic()
    done = run_in_a_python_of_its_own(
        ["recipe=sft", "scale=135m", f"output_dir={tmp_path / 'run'}"],
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hf"),
    )
    assert time.monotonic() - began < 10
    assert done.returncode == 2 and len(done.stderr.strip().split("\n")) == 1
    for way in ("BAAI/Infinity-Instruct", "hf auth login", "data.files=", "scale=mini"):
        assert way in done.stderr


def test_a_checkpoint_as_baai_publishes_it_is_a_base(world, tmp_path):
    """bf16, a redundant head, ids of the class defaults, tiktoken ranks and a tokenizer class that is remote code."""
    base = tmp_path / "base"
    tokenizer = tiny_tokenizer(tmp_path / "tok")
    ranks = tiny_ranks(tokenizer)
    tiny_model(base, tokenizer, vocab_size=len(ranks) + len(SPECIALS))
    weights = {k: v.bfloat16() for k, v in load_file(base / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config |= {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", "transformers_version": "4.44.2"}
    (base / "config.json").write_text(json.dumps(config))
    for file in (*base.glob("tokenizer*"), *base.glob("*.jinja"), *base.glob("special*")):
        file.unlink()
    write_ranks(base / "qwen.tiktoken", ranks)
    (base / "tokenization_qwen.py").write_text("raise SystemExit('remote code was executed')")
    auto = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer", "auto_map": auto}))
    done = run(words(world, tmp_path / "run", f"model.path={base}", "train.max_steps=2"))
    assert done.returncode == 0, done.stderr
    final = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    config = json.loads((tmp_path / "run/final/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (final.bos_token_id, final.eos_token_id)
    assert final.convert_ids_to_tokens(config["eos_token_id"]) == "<|extra_204|>"
    assert "lm_head.weight" not in load_file(tmp_path / "run/final/model.safetensors")
    assert not list((tmp_path / "run/final").glob("*.py"))


def test_a_base_without_chat_tokens_is_told_what_to_do_and_then_works(world, tmp_path):
    base = tmp_path / "base"
    tiny_model(base, tiny_tokenizer(tmp_path / "tok"))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if not re.search("im_(start|end)", t["content"])]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    command = words(world, tmp_path / "run", f"model.path={base}")
    refused = run(command)
    assert refused.returncode == 2 and "tokenizer.add_chat_tokens=true" in refused.stderr
    added = run([*command, "tokenizer.add_chat_tokens=true", "overwrite=true"])
    assert added.returncode == 0, added.stderr
    assert "2 chat tokens added" in added.stdout
