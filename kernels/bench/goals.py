"""The goals that a run is held to, from its rows: met, missed, or *not measured*."""

import dataclasses
from collections.abc import Callable

NOT_MEASURED = "*not measured*"
BUDGETS_GB = (0.5, 1, 2, 5)


@dataclasses.dataclass(frozen=True)
class Verdict:
    goal: str
    verdict: str  # "met", "missed" or NOT_MEASURED
    why: str = ""


def judge(rows: list[dict], device: str) -> list[Verdict]:
    """device: "cuda" or "cpu", whose goals are asked for."""
    return on_h200(rows) if device == "cuda" else on_cpu(rows)


def on_h200(rows: list[dict]) -> list[Verdict]:
    """N=16,384, V=151,851, bf16, trained-like logits, one H200. Memory is what a step takes beyond its inputs."""
    rows = [row for row in rows if "H200" in row["device"] and row["tokens"] == 16384 and row["dtype"] == "bfloat16"]
    measured = [row for row in rows if row["status"] == "ok"]
    head = {
        row["provider"]: row
        for row in measured
        if row["operation"] == "linear_cross_entropy" and (row["vocab"], row["logits"]) == (151851, "trained")
    }
    ours = [row for name, row in head.items() if is_ours(name)]
    rivals = [row for name, row in head.items() if not is_ours(name)]
    norm = {row["pass"]: row for row in measured if row["operation"] == "rms_norm" and is_ours(row["provider"])}
    return [
        *(none_faster(gb, head.get(f"ours-{gb:g}GB"), rivals) for gb in BUDGETS_GB),
        at_most(
            "the head's loss, at 5.5 GB extra: at most 16 ms",
            min((row["p50_ms"] for row in ours if row["extra_bytes"] <= 5.5e9), default=None),
            16,
            "{:.1f} ms",
        ),
        at_least(
            "the head's loss: at least 75 % of the roofline",
            max((row["share_of_ceiling"] for row in ours), default=None),
            0.75,
            "{:.0%}",
        ),
        at_most(
            "error of dW: at most a third of Liger default's",
            max((row["error_dw"] for row in ours), default=0) / head["liger"]["error_dw"]
            if ours and "liger" in head
            else None,
            1 / 3,
            "{:.2f} of it",
        ),
        at_least(
            "RMSNorm forward: at least 85 % of the copy bandwidth",
            share(norm.get("forward")),
            0.85,
            "{:.0%}",
        ),
        at_most(
            "RMSNorm backward: at most 1.3 x its floor",
            1 / share(norm["backward"]) if share(norm.get("backward")) else None,
            1.3,
            "{:.2f} x",
        ),
    ]


def on_cpu(rows: list[dict]) -> list[Verdict]:
    """N=2,048, H=576, V=151,851, every token with a target: ratios to plain logits and F.cross_entropy."""
    found = []
    for dtype in ("float32", "bfloat16"):
        row = next(
            (
                row
                for row in rows
                if (row["operation"], row["provider"]) == ("linear_cross_entropy", "ours")
                and (row["tokens"], row["hidden"], row["vocab"]) == (2048, 576, 151851)
                and (row["dtype"], row["supervised"], row["status"]) == (dtype, 1.0, "ok")
            ),
            {},
        )
        what = f"the head's loss on a CPU, {dtype}: at most"
        found.append(at_most(f"{what} 0.2 x plain's extra memory", row.get("memory_ratio"), 0.2, "{:.2f} x"))
        found.append(at_most(f"{what} 0.9 x plain's time", row.get("time_ratio"), 0.9, "{:.2f} x"))
    return found


def none_faster(gb: float, ours: dict | None, rivals: list[dict]) -> Verdict:
    """A rival counts if it takes no more memory than ours did with this budget for its logits."""
    goal = f"the head's loss, {gb:g} GB: no provider faster at equal or lower memory"
    if ours is None or not rivals:
        return Verdict(goal, NOT_MEASURED)
    faster = [row for row in rivals if row["extra_bytes"] <= ours["extra_bytes"] and row["p50_ms"] < ours["p50_ms"]]
    said = [f"{row['provider']} {row['p50_ms']:.1f} ms, {row['extra_bytes'] / 1e9:.2f} GB" for row in [ours, *faster]]
    return Verdict(goal, "missed" if faster else "met", "; ".join(said))


def at_most(goal: str, figure: float | None, limit: float, form: str) -> Verdict:
    return compared(goal, figure, lambda value: value <= limit, form)


def at_least(goal: str, figure: float | None, limit: float, form: str) -> Verdict:
    return compared(goal, figure, lambda value: value >= limit, form)


def compared(goal: str, figure: float | None, is_met: Callable[[float], bool], form: str) -> Verdict:
    if figure is None:
        return Verdict(goal, NOT_MEASURED)
    return Verdict(goal, "met" if is_met(figure) else "missed", form.format(figure))


def is_ours(name: str) -> bool:
    return name.split("-")[0] == "ours"


def share(row: dict | None) -> float | None:
    return row["share_of_ceiling"] if row else None
