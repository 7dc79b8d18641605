"""The benchmark at sizes of a moment: what it says of what was measured, of what could not be, and of what failed."""

import csv
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels/bench"))
OPERATIONS = ("linear_cross_entropy", "cross_entropy", "rms_norm")


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """The command, on a CPU: its status, rows, and what it printed. The steps run in processes of their own."""
    import bench as program

    def run(*words):
        folders = [str(tmp_path), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
        command = ["bench.py", "--device", "cpu", "--out", str(tmp_path), "--name", "try", *words]
        monkeypatch.setattr(sys, "argv", command)
        status = program.main()
        with open(tmp_path / "try.csv", newline="") as file:
            return status, list(csv.DictReader(file)), capsys.readouterr()

    return run


def number(row, column):
    return float(row[column])


@pytest.mark.slow
def test_every_operation_and_provider_has_a_row_with_figures_or_a_reason(bench, tmp_path):
    words = ("--shape", "tiny", "--dtype", "float32", "--logits", "trained", "--repeats", "2", "--fresh", "run")
    status, rows, printed = bench(*words)
    assert status == 0, printed.err
    import providers

    found = {(row["operation"], row["provider"]) for row in rows if row["operation"] != "ceiling"}
    assert found == {(operation, name) for operation in OPERATIONS for name in providers.names(operation)}
    measured = [row for row in rows if row["status"] == "ok" and row["operation"] != "ceiling"]
    assert {row["provider"] for row in measured} >= {"ours", "eager", "torch", "trl"}
    assert {row["pass"] for row in measured if row["operation"] == "rms_norm"} == {"forward", "backward", "both"}
    for row in measured:
        assert 0 < number(row, "p20_ms") <= number(row, "p50_ms") <= number(row, "p80_ms") and row["repeats"] == "2"
        assert number(row, "time_ratio") > 0 and number(row, "share_of_ceiling") > 0
        assert row["device"] and row["torch"] and row["date"] and row["command"] and row["provider_version"]
        if row["provider"] == "ours":  # fp32: rounding of sums of a few hundred terms
            assert number(row, "error_dx") < 1e-5 and number(row, "error_out") < 1e-5
            assert row["operation"] == "cross_entropy" or number(row, "error_dw") < 1e-5
    for row in rows:
        if row["status"] == "not eligible":
            assert row["reason"] and not row["p50_ms"]
            assert f"| {row['provider']} | not eligible: {row['reason']} |" in printed.out
    assert {row["pass"] for row in rows if row["operation"] == "ceiling"} >= {"copy", "product_of_the_head"}
    assert "*not measured*" in printed.out and (tmp_path / "try.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_a_step_in_a_process_of_its_own_has_its_memory(bench):
    words = ("--operations", "linear_cross_entropy", "--providers", "eager", "--dtype", "float32")
    status, rows, printed = bench(*words, "--shape", "256x64x8192", "--logits", "fresh", "--repeats", "1")
    assert status == 0, printed.err
    # plain torch holds at least the logits, their log-softmax and its gradient
    assert 3 < number(rows[-1], "extra_bytes") / (4 * 256 * 8192) < 6 and number(rows[-1], "memory_ratio") == 1


def test_ratios_are_of_the_same_turn():
    import cases
    import report

    def turns(*seconds, extra_bytes):
        one = {"status": "ok", "reason": "", "loss": 1.0}
        return [
            one | {"passes": [{"seconds": [s], "cpu_seconds": [2 * s], "extra_bytes": extra_bytes}]} for s in seconds
        ]

    case = cases.Case("linear_cross_entropy", 64, 64, 512, "float32", "fresh", 0.5)
    eager = turns(1.0, 2.0, 4.0, extra_bytes=1000)  # a machine that slows down
    (made,) = report.rows_of(
        case, "ours", turns(0.5, 1.2, 2.4, extra_bytes=200), eager, {"copy": 1.0, "product_x": 1e7}
    )
    assert [made[f"p{q}_ms"] for q in (20, 50, 80)] == [780, 1200, 1920]
    assert [made[name] for name in ("time_ratio", "time_ratio_min", "time_ratio_max")] == [0.6, 0.5, 0.6]
    assert made["cpu_ratio"] == 0.6 and made["memory_ratio"] == 0.2
    # three products of 2 N H V, for the half of the tokens that have a target
    assert made["share_of_ceiling"] == pytest.approx(3 * 2 * 32 * 64 * 512 / 1e7 / 1.2, rel=1e-5)


@pytest.mark.slow
def test_a_provider_that_fails_or_dies_loses_its_own_rows_only(bench, tmp_path):
    (tmp_path / "trl/kernels").mkdir(parents=True)
    (tmp_path / "trl/__init__.py").write_text("")
    (tmp_path / "trl/kernels/__init__.py").write_text(
        "import os, torch\n"
        "class ChunkedLogProbFunction:\n"
        "    def apply(hidden, *_):\n"
        "        if hidden.dtype == torch.bfloat16:\n"
        "            os.abort()\n"
        "        raise OverflowError('too much\\nof it')\n"
    )
    words = ("--operations", "linear_cross_entropy", "--providers", "trl", "eager", "--shape", "tiny")
    status, rows, printed = bench(*words, "--logits", "fresh", "--repeats", "1", "--fresh", "run")
    assert status == 1
    found = {(row["provider"], row["dtype"]): row for row in rows if row["operation"] != "ceiling"}
    for dtype, said in (("float32", "OverflowError: too much"), ("bfloat16", "its process ended with status -6")):
        trl, eager = found["trl", dtype], found["eager", dtype]
        assert trl["status"] == "failed" and trl["reason"].startswith(said) and not trl["p50_ms"]
        assert f"error: linear_cross_entropy, trl: {trl['reason']}" in printed.err
        assert eager["status"] == "ok" and number(eager, "p50_ms") > 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["--providers", "nobody"], "'nobody'"),
        (["--shape", "huge"], "'huge' is not a shape; use tiny"),
        (["--shape", "64x0x512"], "'64x0x512' is not a shape"),
        (["--supervised", "1.5"], "1.5 is not in (0, 1]"),
        (["--repeats", "none"], "'none'"),
        (["--operations", "rms_norm", "--providers", "cce-exact"], "none of cce-exact is a variant of rms_norm"),
    ],
)
def test_what_cannot_be_meant_is_one_line(monkeypatch, capsys, words, said):
    import bench

    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(SystemExit) as ended:
        bench.arguments()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("kind, low, high", [("fresh", 6.0, 7.0), ("trained", 2.0, 4.0), ("peaked", 0.0, 0.6)])
def test_the_three_kinds_of_logits(kind, low, high):
    import cases
    import torch

    case = cases.Case("linear_cross_entropy", 256, 64, 512, "float32", kind, 1.0)  # ln 512 is 6.2
    hidden, weight, target = cases.make_inputs(case).given
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, target)
    assert low < loss.item() < high


# ---- goals ----


def row(provider, operation="linear_cross_entropy", **figures):
    made = {"operation": operation, "provider": provider, "pass": "both", "status": "ok", "device": "NVIDIA H200"}
    made |= {"tokens": 16384, "hidden": 576, "vocab": 151851, "dtype": "bfloat16", "logits": "trained"}
    made |= {"supervised": 1.0, "p50_ms": 15.0, "extra_bytes": 5.4e9, "share_of_ceiling": 0.8, "error_dw": 0.003}
    return made | figures


def verdicts(rows, device="cuda"):
    import goals

    return {verdict.goal.split(":")[0]: verdict.verdict for verdict in goals.judge(rows, device)}


def test_goals_that_are_met():
    budgets = [row(f"ours-{gb}GB", p50_ms=15 + 1 / gb, extra_bytes=gb * 1e9 + 4e8) for gb in (0.5, 1, 2, 5)]
    norms = [
        row("ours", "rms_norm", **{"pass": p, "share_of_ceiling": s}) for p, s in (("forward", 0.9), ("backward", 0.8))
    ]
    rivals = [
        row("liger", p50_ms=100.0, extra_bytes=2e8, error_dw=0.03),
        row("eager", p50_ms=12.0, extra_bytes=3e10),  # faster, with more memory
    ]
    assert set(verdicts([*budgets, *norms, *rivals]).values()) == {"met"}


def test_goals_that_are_missed():
    ours = row("ours-1GB", p50_ms=20.0, extra_bytes=1.4e9, share_of_ceiling=0.5, error_dw=0.02)
    rivals = [row("liger", p50_ms=19.0, extra_bytes=1.4e9, error_dw=0.03)]
    norms = [row("ours", "rms_norm", **{"pass": p, "share_of_ceiling": 0.7}) for p in ("forward", "backward")]
    found = verdicts([ours, *rivals, *norms])
    assert found.pop("the head's loss, 1 GB") == "missed"
    for gb in ("0.5", "2", "5"):  # no such row of ours
        assert found.pop(f"the head's loss, {gb} GB") == "*not measured*"
    assert set(found.values()) == {"missed"}


def test_goals_of_an_h200_are_not_measured_elsewhere_nor_by_rows_without_figures():
    other = row("ours-1GB", device="NVIDIA A100"), row("liger", device="NVIDIA A100")
    failed = row("ours-1GB", status="failed", p50_ms=None), row("liger", status="not eligible", p50_ms=None)
    for rows in ([], other, failed):
        assert set(verdicts(list(rows)).values()) == {"*not measured*"}


def test_goals_on_a_cpu():
    made = {"device": "a CPU", "tokens": 2048, "logits": "fresh"}
    good = row("ours", **made, dtype="float32", time_ratio=0.8, memory_ratio=0.19)
    bad = row("ours", **made, time_ratio=0.95, memory_ratio=0.3)
    import goals

    assert [v.verdict for v in goals.judge([good, bad], "cpu")] == ["met", "met", "missed", "missed"]
    assert [v.verdict for v in goals.judge([good], "cpu")][2:] == ["*not measured*"] * 2
