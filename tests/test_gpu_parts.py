"""The parts of `make gpu` that time training steps and tune at two rates, at tiny shapes and without a GPU."""

import csv
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import warm
from tiny import TINY_ARCHITECTURE, tiny_conversations, tiny_model, tiny_tokenizer, write_jsonl

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels/bench"))
import beside  # noqa: E402
import flops  # noqa: E402
import gpu  # noqa: E402
import rates  # noqa: E402
import step_data  # noqa: E402
import steps  # noqa: E402

TINY = TINY_ARCHITECTURE | {"model.vocab_size": 1001, "train.max_length": 128, "train.tokens_per_step": 512}


@functools.cache
def record(side: str) -> dict:
    """Three steps of a tiny model after one to warm up."""
    attention = "sdpa" if side == "trl" else None  # on a GPU ours chooses what on a CPU TRL cannot use
    told = {"side": side, "settings": TINY, "attention": attention, "micro_rows": 2, "extra": {}}
    return steps.run(told | {"is_compiled": False, "warm_ups": 1, "steps": 3})


@pytest.mark.parametrize("side", ["sft", "trl", "pretrain", "plain"])
def test_every_side_trains_the_same_model_and_says_what_its_steps_took(side):
    found = record(side)
    assert len(found["seconds"]) == len(found["tokens"]) == len(found["flops"]) == 3 and min(found["seconds"]) > 0
    assert found["parameters"] == record("sft")["parameters"] and found["vocab"] == 1001
    assert (found["micro_rows"], found["accumulation"], found["length"]) == (2, 2, 128)
    assert found["peak_bytes"] > 2**27
    assert abs(found["loss"] - torch.tensor(1001.0).log()) < 0.1  # fresh weights, four steps
    share = sum(found["targets"]) / sum(found["tokens"])
    if side in ("sft", "trl"):
        assert 380 < min(found["tokens"]) <= max(found["tokens"]) <= 512  # four rows, nearly full
        assert 0.55 < share < 0.65
    else:  # every token but the first of a document
        assert found["tokens"] == [512] * 3 and 0.9 < share < 1
    assert record("pretrain")["targets"] == record("plain")["targets"]


def test_both_tuning_sides_train_on_the_same_conversations(tmp_path):
    drawn = step_data.Conversations.drawn(4000, 128, 1001)
    rows, theirs = drawn.packed(tmp_path / "rows", 128), drawn.dataset()
    batch = rows.batch(range(len(rows)), 128, pad_id=0)
    pieces = []
    for ids, labels, positions in zip(*(batch[key].tolist() for key in batch), strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0]
        pieces += [(ids[a:b], labels[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    ours = sorted(piece for piece in pieces if piece[0][0])  # padding is a piece of zeros
    assert ours == sorted(zip(theirs["input_ids"], theirs["labels"], strict=True))
    assert sum(len(ids) for ids, _ in ours) >= 4000 and len({len(ids) for ids, _ in ours}) > 10


def test_the_formula_counts_what_torch_counts():
    """On logits of every position and the whole square of eager attention, which is what torch multiplies there."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = MistralConfig(vocab_size=101, num_key_value_heads=2, attn_implementation="eager", **sizes)
    net, ids = MistralForCausalLM(config), torch.randint(101, (3, 20))
    with FlopCounterMode(display=False) as counter:
        net(input_ids=ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == flops.of_step(config, tokens=60, targets=60, pairs=3 * 20 * 20)


def test_counts_leave_padding_out_and_know_what_a_token_may_see():
    counts = steps.Counts(pad_id=0)
    ids = torch.tensor([[5, 6, 7, 8, 9, 0, 0]])  # two conversations, of three and two tokens
    positions, labels = torch.tensor([[0, 1, 2, 0, 1, 0, 1]]), torch.tensor([[-100, 6, 7, -100, 9, -100, -100]])
    counts.add([{"input_ids": ids, "position_ids": positions, "labels": labels}] * 2)
    assert counts.of_steps() == [[2 * 5, 2 * 3, 2 * (6 + 3)]]


def test_the_plain_side_asks_for_the_causal_kernel_and_computes_what_sdpa_does():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    net = MistralForCausalLM(MistralConfig(vocab_size=101, num_key_value_heads=2, **sizes))
    asked = []

    def backend(graph, _):
        asked.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph.forward

    ids, outputs = torch.randint(101, (2, 20)), []
    for attention in ("sdpa", "sdpa_causal"):
        net.set_attn_implementation(attention)
        outputs.append(net(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(*outputs)
    torch.compile(net, backend=backend)(input_ids=ids, use_cache=False)
    assert len(asked) == 2 and all(how["is_causal"] and how.get("attn_mask") is None for how in asked)


def test_mfu_is_against_the_published_peak_and_unknown_for_other_gpus():
    assert flops.mfu(989.4e12, 2.0, "NVIDIA H200") == pytest.approx(0.5)
    assert flops.mfu(1e12, 1.0, "NVIDIA H100 PCIe") is None
    made = beside.figures(record("sft"), "NVIDIA H200"), beside.figures(record("sft"), "NVIDIA L4")
    assert made[0]["mfu"].endswith("%") and made[1]["mfu"] == "peak not known"


def made_up(tokens_per_s, gib=1.0, **more):
    counts = {"tokens": [tokens_per_s] * 3, "targets": [tokens_per_s // 2] * 3, "flops": [10**12] * 3}
    about = {"loss": 1.0, "attention": "sdpa", "micro_rows": 8, "accumulation": 8, "length": 2048, "vocab": 151851}
    about |= {"parameters": 193669632, "precision": "bf16", "peak_bytes": gib * 2**30}
    return counts | {"seconds": [1.0, 1.25, 0.8]} | about | more


def bench(speeds, **more):
    """A bench whose jobs take as long as `speeds` says: (side, attention, rows, extra) -> tokens/s, or why not."""

    def measure(job, limit_s):
        found = speeds(job["side"], job["attention"], job["micro_rows"], job["extra"])
        if isinstance(found, str):
            raise beside.Failed(found)
        return made_up(found, attention=job["attention"] or "flex_attention")

    return beside.Bench("NVIDIA H200", measure=measure, **more)


def test_the_fastest_way_of_the_other_side_is_repeated_in_turn_with_ours():
    def speeds(side, attention, rows, extra):
        if side == "sft":
            return 320_000
        if "torch_compile" in extra:
            return "Unsupported: a graph break"
        return {("flex_attention", 16): "CUDA out of memory", ("flex_attention", 8): 200_000}.get(
            (attention, rows), 9_000
        )

    rows = bench(speeds).sft()
    turns = [(row["turn"], row["side"]) for row in rows if row["turn"] in "123"]
    assert turns == [(turn, side) for turn in "123" for side in ("ours", "TRL")]
    theirs = [row for row in rows if row["turn"] in "123" and row["side"] == "TRL"]
    assert all(
        row["settings"].startswith("flex_attention, 8 x 8 rows") and row["tokens_per_s"] == 200_000 for row in theirs
    )
    told = {row["settings"]: row.get("tokens_per_s") for row in rows if row["turn"] == "trial"}
    assert told["flex_attention, 16 rows at once, pad_to_multiple_of=32768"] == "not possible: CUDA out of memory"
    assert "graph break" in told["flex_attention, 8 rows at once, pad_to_multiple_of=16384, torch_compile=True"]
    assert any(row["turn"] == "left out" and "flash-attn is not installed" in row["settings"] for row in rows)
    beside_them, alone = rows[-2:]
    assert (beside_them["tokens_per_s"], beside_them["verdict"]) == ("1.60 x (1.60 to 1.60)", "met")
    assert (alone["tokens_per_s"], alone["verdict"]) == (320_000, "met")
    assert rows[0]["settings"].startswith("193,669,632 parameters, 151,851 entries, rows of 2,048, 50.0% supervised")


def test_a_side_that_nothing_makes_run_leaves_its_goals_not_measured():
    rows = bench(lambda side, *way: 100_000 if side == "pretrain" else "CUDA out of memory").pretrain()
    assert [row["verdict"] for row in rows[-2:]] == ["*not measured*", "missed"]
    rows = bench(lambda *way: "no").pretrain()
    assert [row["verdict"] for row in rows[-2:]] == ["*not measured*", "*not measured*"]


def test_when_its_time_is_up_a_part_says_what_was_not_done():
    rows = bench(lambda *way: 1, limit_s=0).pretrain()
    assert all(row["tokens_per_s"] == "not possible: the time was up" for row in rows if row["turn"] == "trial")
    assert rows[-1]["verdict"] == "*not measured*"


def test_a_ladder_goes_up_to_what_is_too_much():
    rows = bench(lambda side, attention, rows, extra: "CUDA out of memory" if rows > 8 else rows * 1000).throughput()
    steps_up = [row["tokens_per_s"] for row in rows if row["turn"] == "ladder"]
    assert steps_up == [4000, 8000, "not possible: CUDA out of memory"] * 3


def test_a_job_that_fails_is_told_in_its_last_line(monkeypatch, tmp_path):
    script = tmp_path / "beside.py"
    (tmp_path / "steps.py").write_text("import sys, time; time.sleep(float(sys.argv[1])); raise MemoryError('of GPU')")
    monkeypatch.setattr(beside, "__file__", str(script))
    with pytest.raises(beside.Failed, match="^MemoryError: of GPU$"):
        beside.in_its_own_process(0, 60)
    with pytest.raises(beside.Failed, match="took more than 1 s"):
        beside.in_its_own_process(60, 1)


def test_a_table_and_its_file_say_the_same(tmp_path, capsys):
    found = beside.Bench("a GPU", settings=TINY, is_compiled=False, measure=lambda job, _: record(job["side"]))
    about = {
        "device": "A GPU",
        "driver": "1",
        "torch": "2",
        "commit": "abc",
        "date": "today",
        "command": "python gpu.py",
    }
    gpu.show("pretrain", found.pretrain(), about, tmp_path)
    printed = [line for line in capsys.readouterr().out.split("\n") if line.startswith("|")]
    with open(tmp_path / "a_gpu_pretrain.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == len(printed) - 2 and {row["device"] for row in kept} == {"A GPU"}
    for row, line in zip(kept, printed[2:], strict=True):
        assert [cell.strip() for cell in line.split("|")[1:-1]] == [row[c] for c in list(row)[: line.count("|") - 1]]
    # tiny: the ratio is a figure, the goal of the real shape is not judged
    assert kept[-2]["verdict"] in ("met", "missed") and kept[-1]["verdict"] == "*not measured*"


def test_a_clock_on_a_gpu_asks_its_events_and_its_peak_begins_after_the_warm_ups(monkeypatch):
    now, peak = iter([0.0, 500.0, 750.0, 1500.0]), [9]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def elapsed_time(self, later):
            return later.at - self.at  # milliseconds

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 5))
    clock = steps.Clock(warm_ups=2)
    for _ in range(4):
        clock.on_step_end()
    assert (clock.seconds(), clock.peak_bytes) == ([0.25, 0.75], 5)


def test_the_command_runs_the_parts_that_are_asked_for_and_writes_a_file_of_each(monkeypatch, tmp_path, capsys):
    made = functools.partial(beside.Bench, measure=lambda job, limit_s: made_up(100_000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu.beside, "Bench", made)
    monkeypatch.setattr(rates, "run", lambda words, limit_s: "done")
    words = "--part sft pretrain rates --minutes 1 --rates 1e-3 1e-4 --data a.jsonl --ranks a.tiktoken --out"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words.split(), str(tmp_path)])
    assert gpu.main() == 0
    files = {file.name: list(csv.DictReader(file.open(newline=""))) for file in tmp_path.iterdir()}
    assert set(files) == {f"nvidia_h200_{part}.csv" for part in ("sft", "pretrain", "rates")}
    assert [row["rate"] for row in files["nvidia_h200_rates.csv"]] == ["0.001", "0.0001"]
    assert all(row["device"] == "NVIDIA H200" and row["command"] for rows in files.values() for row in rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2 and "no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_figures_of_a_rate_are_those_of_its_run(tmp_path, monkeypatch):
    tiny_model(tmp_path / "tiny", tiny_tokenizer(tmp_path / "tok"))
    data = write_jsonl(tmp_path / "chat.jsonl", tiny_conversations(48))

    def run(words, limit_s):
        ended = warm.run(words)
        return "done" if ended.returncode == 0 else ended.stderr

    monkeypatch.setattr(rates, "run", run)
    quick = {"train.max_length": 128, "train.tokens_per_step": 512, "train.max_steps": 4, "data.workers": 1}
    quick |= {"train.logging_steps": 2, "data.holdout_fraction": 0.2, "data.clean.detector": "script"}
    told = {"rates": [1e-2], "data": [str(data)], "ranks": None, "base": str(tmp_path / "tiny")}
    (row,) = rates.rows(tmp_path / "work", **told, settings=quick)
    assert (row["ended"], row["rate"], row["steps"]) == ("done", "0.01", 4)
    for language in ("en", "zh"):
        before, after = map(float, row[f"bits a byte, {language}"].split(" -> "))
        assert 0 < after < before
    summary = json.loads((tmp_path / "work/rate-0/summary.json").read_text())
    assert f"{summary['bits_per_byte']['zh']:.3f}" in row["bits a byte, zh"]
    assert row["loss"].endswith(f"{summary['loss']:.3f}")


def test_without_a_rate_the_recipes_own_and_a_third_of_it_are_tried(monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(rates, "run", lambda words, limit_s: tried.append(words) or "status 2")
    told = {"rates": [], "data": [], "ranks": Path("qwen.tiktoken"), "base": None}
    rows = rates.rows(tmp_path, **told)
    own = rates.own_rate()
    assert [f"optim.lr={own}" in tried[0], f"optim.lr={own / 3}" in tried[1]] == [True, True]
    assert [row["ended"] for row in rows] == ["status 2"] * 2 and "loss" not in rows[0]


def test_a_run_that_took_too_long_is_stopped_and_its_row_has_what_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(rates, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("import sys, time; time.sleep(float(sys.argv[1])); sys.exit(2)")
    assert (rates.run(["60"], 0.5), rates.run(["0"], 60)) == ("stopped after 0 s", "status 2")
    lines = [{"step": 0, "eval_bits_per_byte_en": 2.0}, {"step": 1, "loss": 5.0}, {"step": 9, "loss": 4.0}]
    speeds = {"tokens_per_s": 10.0, "peak_memory_bytes": 2**30, "seconds": 3.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line | speeds) + "\n" for line in lines))
    found = rates.figures(tmp_path)
    assert (found["steps"], found["loss"], found["peak_gib"]) == (9, "5.000 -> 4.000", 1.0)
    assert found["bits a byte, en"] == "2.000 -> *not measured*" and rates.figures(tmp_path / "none") == {}


def test_conversations_are_those_given_else_real_ones_else_the_worlds(monkeypatch, tmp_path):
    monkeypatch.delenv("AQUILA_REAL_DATA", raising=False)
    told = {"ranks": Path("qwen.tiktoken"), "base": None}
    (of_world,) = rates.inputs(tmp_path, [], **told)["data.files"].strip("[]").split(",")
    assert len(json.loads(Path(of_world).read_text("utf-8").split("\n")[0])["conversations"]) >= 2
    real = tmp_path / "real/instruct_a/train.jsonl"
    real.parent.mkdir(parents=True)
    real.touch()
    monkeypatch.setenv("AQUILA_REAL_DATA", str(tmp_path / "real"))
    assert rates.inputs(tmp_path, [], **told)["data.files"] == f"[{real}]"
    assert rates.inputs(tmp_path, ["a.jsonl"], **told)["data.files"] == "[a.jsonl]"
