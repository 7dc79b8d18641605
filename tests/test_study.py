"""recipes/study: a plan's runs, what is held back, intervals, tables, and a whole small study."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import warm
import yaml
from tiny import SENTENCES, tiny_conversations, tiny_model, tiny_tokenizer, write_jsonl

import train as program
from aquila_sft.errors import UserError
from recipes.study import figures, plan, report, run, split
from recipes.study.__main__ import main

WHOLE = str(Path(plan.__file__).with_name("plan.yaml"))
SOURCES = ["foundational_en", "foundational_zh", "chat_en", "chat_zh"]
PLAN = {
    "seed": 1,
    "default": {"optim.lr": 1e-3, "train.num_epochs": 1},
    "axes": {
        "rate": {"low": {"optim.lr": 1e-4}, "high": {}},
        "epochs": {"1": {}, "2": {"train.num_epochs": 2}},
        "stages": {"two": [{"sources": ["a"]}, {"sources": ["b"]}]},
    },
    "finals": {"seeds": [1, 2], "runs": {"default": {}, "low": {"optim.lr": 1e-4}}},
}


def test_equal_settings_are_one_run_that_stands_in_every_table_that_names_it():
    runs = {one.name: one for one in plan.runs_of(PLAN)}
    assert list(runs) == ["rate-low", "rate-high", "epochs-2", "stages-two", "finals-default-2", "finals-low-2"]
    assert runs["rate-high"].places == [("rate", "high"), ("epochs", "1"), ("finals", "default")]
    assert runs["rate-low"].places == [("rate", "low"), ("finals", "low")]
    assert [s["sources"] for s in runs["stages-two"].stages] == [["a"], ["b"]]
    places = [("rate", "low"), ("rate", "high"), ("epochs", "1"), ("epochs", "2"), ("stages", "two")]
    assert plan.places_of(PLAN) == [*places, ("finals", "default"), ("finals", "low")]
    assert runs["epochs-2"].stages == [{"optim.lr": 1e-3, "train.num_epochs": 2}]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.a=x", "base=y", "learning=3"], "learning: no part of a plan"),
        (["data.a=x"], "base= is missing"),
        (["base=y"], "data= is missing"),
        (["data=a.jsonl", "base=y"], "data='a.jsonl': files by source"),
        (["data.a=x", "base=y", "jobs=0"], "jobs=0: a whole number from 1 on"),
        (["data.a=x", "base=y", "jobs=two"], "jobs='two': a whole number from 1 on"),
        (["data.a=x", "base=y", "out=/tmp/a(1)"], r"out=/tmp/a\(1\): names and paths of a study"),
        (["data.研究=x", "base=y"], "data.研究=data.研究: names and paths of a study"),
        (["data.a=x", "base=y"], "text mixed in: 0.1 of all rows: mixes text in, and text= is missing"),
        (["data.a=x", "base=y", "text=t"], "foundational_en, foundational_zh is no source of data=, which has a; "),
        (["data.a=x", "base=y", "text=t", "seeds_of.speed=[1]"], "seeds_of: speed is no axis"),
        (["data.a=x", "base=y", "text=t", "finals.seeds=[]"], "finals: has seeds, at least one"),
    ],
)
def test_a_plan_with_a_slip_is_one_line(words, told):
    with pytest.raises(UserError, match=told):
        plan.read(WHOLE, words)


def test_a_word_changes_a_setting_of_the_default_and_leaves_an_axis_out():
    given = ["data.a=x", "base=y", "text=t", "axes.stages=null"]
    before, after = (plan.read(WHOLE, given + more) for more in ([], ["default.train.tokens_per_step=4096"]))
    assert "stages" not in after["axes"]
    assert after["default"] == before["default"] | {"train.tokens_per_step": 4096}
    steps = {one.places[0]: one.stages[0]["train.tokens_per_step"] for one in plan.runs_of(after)}
    assert steps["tokens a step", "8,192"] == 8192 and steps["epochs", "2"] == 4096


def test_an_axis_may_have_seeds_of_its_own():
    runs = plan.runs_of(PLAN | {"seeds_of": {"rate": [7]}})
    assert [(one.name, one.seed) for one in runs[:4]] == [
        ("rate-low", 1),
        ("rate-low-7", 7),
        ("rate-high", 1),
        ("rate-high-7", 7),
    ]


def test_the_plan_that_is_there_has_two_dozen_runs_and_every_word_of_it_is_a_setting():
    whole = plan.read(WHOLE, ["base=base", "text=shards", *(f"data.{name}=x" for name in SOURCES)])
    runs = plan.runs_of(whole)
    assert len([one for one in runs if any(axis != "finals" for axis, _ in one.places)]) >= 24
    for one in runs:
        for _, words in run.jobs_of(one, whole, {"a": "a.jsonl"}):
            program.compose_run([word for word in words if not word.startswith("evaluate=")])


def test_a_stage_starts_from_the_one_before_and_the_last_is_evaluated():
    whole = PLAN | {"out": "o", "base": "b", "scale": "mini", "data": {"a": 0, "b": 0}, "evaluate": {"limit": 2}}
    whole["text"] = "shards"
    two = next(one for one in plan.runs_of(whole) if one.name == "stages-two")
    (first, words1), (second, words2) = run.jobs_of(two, whole, {"t": "t.jsonl"})
    assert (str(first), str(second)) == ("o/runs/stages-two/1", "o/runs/stages-two/2")
    assert "model.path=b" in words1 and "model.path=o/runs/stages-two/1/final" in words2
    assert "data.files=[o/train/a.jsonl]" in words1 and "data.files=[o/train/b.jsonl]" in words2
    assert not any(word.startswith("evaluate=") for word in words1)
    assert words2[-1] == (
        "evaluate={tasks: [references, instruct_zh, instruct_en, text], references: [o/held-back/a.jsonl, "
        "o/held-back/b.jsonl], limit: 2, text: {t: t.jsonl}}"
    )


def items(values, below):
    return figures.Items(np.array(values, dtype=float), np.array(below, dtype=float))


def test_a_value_is_a_ratio_of_sums_and_equal_items_leave_no_doubt():
    one = items([[2.0, 4.0, 6.0]], [[1.0, 2.0, 3.0]])
    assert one.value() == 2.0 and one.interval() == (2.0, 2.0)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        size = generator.integers(50, 150, 60).astype(float)
        low, high = items([size * generator.normal(2.0, 0.3, 60)], [size]).interval()
        covered += low < 2.0 < high
    assert 85 <= covered <= 100  # 95 expected, standard deviation 2


def test_two_runs_are_compared_on_the_same_items():
    """One item is hard for both: it moves each value, and no ratio."""
    generator = np.random.default_rng(0)
    hard = generator.lognormal(0, 1, 40)
    before, after = items([hard], [np.ones(40)]), items([0.9 * hard], [np.ones(40)])
    low, high = before.interval()
    assert high / low > 1.3
    assert after.interval(before) == pytest.approx((-0.1, -0.1))


def test_seeds_widen_an_interval_that_one_seed_would_make_too_small():
    steady = np.ones((1, 30))
    one, three = items(steady, steady), items(np.array([[0.9], [1.0], [1.1]]) * steady, np.ones((3, 30)))
    assert one.interval() == (1.0, 1.0)
    low, high = three.interval()
    assert low < 0.95 and high > 1.05


def test_sources_that_are_no_text_do_not_count_as_text(tmp_path):
    lines = [
        {"task": "text", "language": "en", "source": source, "scores": {"nats": nats, "bytes": 10.0}}
        for source, nats in (("books", 20.0), ("chat", 5.0))
    ]
    write_jsonl(tmp_path / "answers.jsonl", lines)
    both, books = (figures.of_folder(tmp_path, without)["text", "en"] for without in ([], ["chat"]))
    assert both.value() == pytest.approx(1.25 / np.log(2)) and books.value() == pytest.approx(2 / np.log(2))


def test_an_answer_without_a_word_has_not_stopped(tmp_path):
    scores = {"prompts, strict": 0.0}
    said = [("Yes.", True), ("", True), (" \n", True), ("and and and", False)]
    lines = [{"task": "instruct_en", "scores": scores, "written": text, "stopped": ended} for text, ended in said]
    write_jsonl(tmp_path / "answers.jsonl", lines)
    assert figures.of_folder(tmp_path)["stopped", "all"].value() == 0.25


@pytest.mark.parametrize(("named", "given"), [(None, ["0", "1", "0"]), ("3,5", ["3", "5", "3"]), ("", [None] * 3)])
def test_runs_side_by_side_share_the_gpus(tmp_path, monkeypatch, named, given):
    seen = []
    monkeypatch.setattr(run, "train", lambda command, log, env, cores: seen.append(env.get("CUDA_VISIBLE_DEVICES")))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    for slot in range(3):
        assert run.run_one(tmp_path / str(slot), ["a=1"], slot, 3) is None
    assert seen == [one or named for one in given]


def test_a_run_that_cannot_be_written_is_told_and_the_next_one_goes_on(tmp_path, monkeypatch):
    def train(command, log, env, cores):
        if command == ["bad"]:
            raise OSError("No space left on device")

    monkeypatch.setattr(run, "train", train)
    jobs = {name: [(tmp_path / name, [name])] for name in ("bad", "good")}
    assert run.run_all(jobs, 1, print) == {"bad": "No space left on device"}
    assert run.done_in(tmp_path / "good") == ["good"]


def test_why_a_run_ended_is_its_error_or_how_it_was_killed(tmp_path):
    log = tmp_path / "1.log"
    log.write_text("begins\n 1%\r 2%\nerror: no such file\nscale=mini: a demonstration\n")
    assert run.reason(log, 2) == "error: no such file"
    log.write_text("begins\n 1%\r 2%\n")
    assert run.reason(log, -9) == "status -9; its last line:  2%"
    log.write_text("")
    assert run.reason(log, -9) == "status -9; its last line: "


def test_another_split_never_replaces_the_one_that_runs_were_compared_on(tmp_path):
    write_jsonl(tmp_path / "chat.jsonl", tiny_conversations(60))
    rules = program.compose_run(["recipe=sft", "scale=135m", "model.path=x"]).data.clean
    told = {
        "skip": 0,
        "held_back": 10,
        "train": 20,
        "max_bytes": 5000,
        "text": None,
        "data": {"a": str(tmp_path / "chat.jsonl")},
    }
    out = tmp_path / "study"
    split.prepare(told, rules, out)
    before = split.contents(out / "held-back")
    split.prepare(told, rules, out)
    with pytest.raises(UserError, match=r"study/train is of other data, or of another skip=, held_back="):
        split.prepare(told | {"held_back": 12}, rules, out)
    assert split.contents(out / "held-back") == before


def test_what_is_held_back_is_neither_trained_on_nor_dependent_on_the_order(tmp_path):
    records = tiny_conversations(60)
    rules = program.compose_run(["recipe=sft", "scale=135m", "model.path=x"]).data.clean
    told = {"skip": 0, "held_back": 10, "train": 20, "max_bytes": 10_000}
    for name, listed in (("one", records), ("two", records[::-1] + records)):
        write_jsonl(tmp_path / f"{name}.jsonl", listed)
        split.of_source("a", str(tmp_path / f"{name}.jsonl"), told, rules, tmp_path / name)
    held, kept = ((tmp_path / "one" / part / "a.jsonl").read_text() for part in ("held-back", "train"))
    assert len(held.splitlines()) == 10 and len(kept.splitlines()) == 20
    assert not set(held.splitlines()) & set(kept.splitlines())
    assert (tmp_path / "two/held-back/a.jsonl").read_text() == held
    assert (tmp_path / "two/train/a.jsonl").read_text() == kept
    with pytest.raises(UserError, match="54 conversations, 54 are to be held back behind 0"):
        split.of_source("a", str(tmp_path / "one.jsonl"), told | {"held_back": 54}, rules, tmp_path)
    split.of_source(
        "a", str(tmp_path / "one.jsonl"), told | {"skip": {"a": 10}, "held_back": {"a": 12}}, rules, tmp_path
    )
    others = (tmp_path / "held-back/a.jsonl").read_text().splitlines()
    assert len(others) == 12 and not set(others) & set(held.splitlines())  # settings chosen on one, judged on the other
    assert set(others) < set(kept.splitlines())
    split.of_source("a", str(tmp_path / "one.jsonl"), told | {"max_bytes": 300}, rules, tmp_path / "short")
    for line in (tmp_path / "short/train/a.jsonl").read_text().splitlines():
        assert sum(len(m["content"].encode()) for m in json.loads(line)["messages"]) <= 300


def test_a_change_below_the_table_is_that_of_the_answers(tmp_path):
    """Two runs whose answers differ by a tenth; text unchanged but in one language."""

    def measured(factor, text):
        return {
            ("answers", "en"): items([[10.0, 20.0]], [[10.0, 10.0]]),
            ("answers", "zh"): items([[factor * 10.0, factor * 30.0]], [[10.0, 10.0]]),
            ("text", "en"): items([[text * 5.0, text * 7.0]], [[3.0, 4.0]]),
            ("stopped", "all"): items([[1.0, 0.0, 1.0, 1.0]], [[1.0] * 4]),
        }

    def row(label, changes, of):
        return report.Row("rate", label, [plan.Run(label, [{}], 1, changes)], of, 1000, 10.0)

    rows = [row("high", [{}], measured(1.0, 1.0)), row("low", [{"optim.lr": 1}], measured(0.9, 1.1))]
    report.compare(rows, measured(1.0, 1.0))
    told = report.write(rows, tmp_path)
    low = next(line for line in told.splitlines() if line.startswith("| low"))
    assert "| 1.500, 1.800 | +0.0 (+0.0 … +0.0) | -10.0 (-10.0 … -10.0) |" in low and "| +10.0 (+10.0 … +10.0) |" in low
    assert "| 75 ± " in low and low.count("–") == 2  # followed in no language, text of one
    with open(tmp_path / "figures.csv", encoding="utf-8") as file:
        lines = {(r["label"], r["measure"], r["part"]): float(r["value"]) for r in csv.DictReader(file)}
    assert lines["low", "answers, change", "zh"] == pytest.approx(-0.1)
    assert lines["low", "answers, against the base", "zh"] == pytest.approx(-0.1)
    assert lines["high", "answers, against the base", "zh"] == lines["low", "answers, against the base", "en"] == 0
    assert lines["high", "answers", "zh"] == pytest.approx(2.0) and lines["low", "seconds", ""] == 10.0


def test_a_whole_study_goes_on_where_it_was_broken_off_and_says_what_failed(tmp_path, monkeypatch, capsys):
    tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "tok"))
    write_jsonl(tmp_path / "chat.jsonl", tiny_conversations(60))
    write_jsonl(tmp_path / "docs.jsonl", [{"text": f"{n}. {s} {s[::-1]}"} for n, s in enumerate(SENTENCES)])
    begun = []

    def warm_train(command, log, env, cores):
        begun.append(next(word for word in command if word.startswith("output_dir=")).removeprefix("output_dir="))
        done = warm.run(command, env=env)
        log.write_text(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(run, "train", warm_train)
    monkeypatch.setattr(os, "environ", os.environ | {"OMP_NUM_THREADS": "1"})
    prepared = ["recipe=prepare", "scale=mini", f"tokenizer.path={tmp_path}/base", f"data.files={tmp_path}/docs.jsonl"]
    prepared += [f"output_dir={tmp_path}/prepare", "prepare.clean.min_bytes=1", "prepare.holdout_fraction=0.2"]
    assert warm.run(prepared).returncode == 0
    written = PLAN | {
        "scale": "mini",
        "jobs": 2,
        "held_back": 8,
        "train": 30,
        "max_bytes": 5000,
        "text_bytes": 2000,
        "text_without": [],
        "evaluate": {"max_new_tokens": 4, "limit": 3},
        "default": {"optim.lr": 1e-3, "train.max_steps": 2, "train.max_length": 128, "train.tokens_per_step": 256},
        "axes": {"rate": {"high": {}, "none": {"optim.lr": -1}}},
        "finals": {"seeds": [1, 2], "runs": {"default": {}}},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(written))
    out = tmp_path / "study"
    words = [f"plan={tmp_path}/plan.yaml", f"base={tmp_path}/base", f"text={tmp_path}/prepare/final"]
    words += [f"data.a={tmp_path}/chat.jsonl", f"out={out}"]
    assert main(words) == 2
    told = capsys.readouterr().out
    assert "1 runs failed" in told and "rate-none: error: optim.lr=-1" in told, told
    assert sorted(begun) == [str(out / part) for part in ("base", *(f"runs/{name}/1" for name in NAMES))]
    table = (out / "tables.md").read_text()
    labels = [line.split(" | ")[0] for line in table.splitlines()]
    assert labels.count("| high") == labels.count("| default") == 1 and "| none" not in labels
    assert (out / "changes.svg").is_file()
    begun.clear()
    assert main(words) == 2
    assert begun == [str(out / "runs/rate-none/1")]  # the others are finished
    assert (out / "tables.md").read_text() == table
    assert main([*words, "only=nothing"]) == 2
    assert main([*words, "only=report", f"base={tmp_path}/another"]) == 0  # whose runs these are not
    assert (out / "tables.md").read_text().strip() == "" and "text" not in (out / "figures.csv").read_text()


NAMES = ["finals-default-2", "rate-high", "rate-none"]


def test_a_base_that_cannot_be_tuned_is_said_before_any_run(tmp_path):
    """Not there, or without a tokenizer, which is another thing than to know no chats."""
    with pytest.raises(UserError, match=f"base: model.path={tmp_path}/none: no such folder"):
        run.find_base(f"{tmp_path}/none")
    with pytest.raises(UserError, match=str(tmp_path)):
        run.knows_chats(str(tmp_path))
    tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "tok"))
    run.find_base(str(tmp_path / "base"))
    assert run.knows_chats(str(tmp_path / "base"))


def test_a_report_of_a_study_that_was_never_begun_is_one_line(tmp_path, capsys):
    words = ["base=x", f"data.a={tmp_path}/a.jsonl", "axes.stages=null", "text=y"]
    assert main([*words, f"out={tmp_path}/none", "only=report"]) == 2
    assert capsys.readouterr().err == f"error: out={tmp_path}/none: no study lies there\n"
