"""Figures of a study as files: figures.csv (every figure of every run), tables.md, changes.svg.

Rows are runs by axis. A change of answers is that against the plan's default, among the finals against the first of
them, on the same answers, with its interval; a change of text is that against the base.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.study import figures
from recipes.study.figures import ALL, Measured
from recipes.study.plan import FINALS, Run

LANGUAGES = ("en", "zh")
HEAD = [
    "answers en, zh: bits per byte",
    "change en, %",
    "change zh, %",
    "followed en, zh, %",
    "stopped, %",
    "text en, change, %",
    "text zh, change, %",
    "thousand tokens",
    "seconds",
]


@dataclass
class Row:
    axis: str
    label: str
    runs: list[Run]
    of: Measured  # all seeds together
    tokens: int  # of a run
    seconds: float  # of a run, evaluation not counted


def rows_of(
    runs: Iterable[Run], places: Sequence[tuple[str, str]], out: Path, text_without: Sequence[str]
) -> list[Row]:
    """A row for every place in the tables whose runs are finished."""
    rows, read = [], {}
    for axis, label in places:
        listed = [run for run in runs if (axis, label) in run.places]
        folders = [[out / "runs" / run.name / str(n) for n in range(1, len(run.stages) + 1)] for run in listed]
        if not all((stages[-1] / "eval/answers.jsonl").is_file() for stages in folders):
            continue
        for stages in folders:
            if stages[-1] not in read:
                read[stages[-1]] = figures.of_folder(stages[-1] / "eval", text_without)
        sums = [json.loads((stage / "summary.json").read_text("utf-8")) for stages in folders for stage in stages]
        tokens, seconds = (sum(s[key] for s in sums) / len(listed) for key in ("tokens", "seconds"))
        of = figures.together([read[stages[-1]] for stages in folders])
        rows.append(Row(axis, label, listed, of, round(tokens), seconds))
    return rows


def write(rows: list[Row], base: Measured, out: Path) -> str:
    """The files; the tables as text, one of the axes and one of the finals."""
    lines, table, axis = [], [], None
    for row in rows:
        if axis is None or (axis == FINALS) != (row.axis == FINALS):
            table += ["", f"| | {' | '.join(HEAD)} |", "|---" * (len(HEAD) + 1) + "|"]
        if row.axis != axis:
            table.append(f"| **{row.axis}** " + "| " * len(HEAD) + "|")
        axis = row.axis
        compared = reference(rows, axis)
        compared = None if compared and compared.runs == row.runs else compared  # itself
        table.append(f"| {row.label} | {' | '.join(cells(row, compared, base))} |")
        lines += csv_lines(row, compared, base)
    text = "\n".join(table[1:]) + "\n"
    (out / "tables.md").write_text(text, "utf-8")
    with open(out / "figures.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["axis", "label", "seeds", "measure", "part", "value", "low", "high", "items"])
        writer.writerows(lines)
    return text


def reference(rows: list[Row], axis: str) -> Row | None:
    """What the rows of an axis are compared with."""
    if axis == FINALS:
        return next(row for row in rows if row.axis == FINALS)
    return next((row for row in rows if row.axis != FINALS and not any(row.runs[0].changes)), None)


def cells(row: Row, default: Row | None, base: Measured) -> list[str]:
    answers = [f"{of.value():.3f}" for of in values(row, "answers")]
    followed = [share(of) for of in values(row, "followed")]
    stopped = row.of.get(("stopped", ALL))
    return [
        ", ".join(answers) or "–",
        *(change(row, default and default.of, "answers", language) for language in LANGUAGES),
        ", ".join(followed) or "–",
        share(stopped) if stopped else "–",
        *(change(row, base, "text", language) for language in LANGUAGES),
        f"{row.tokens / 1000:.0f}",
        f"{row.seconds:.0f}",
    ]


def values(row: Row, measure: str) -> list[figures.Items]:
    return [row.of[measure, language] for language in LANGUAGES if (measure, language) in row.of]


def share(of: figures.Items) -> str:
    low, high = of.interval()
    return f"{100 * of.value():.0f} ± {50 * (high - low):.0f}"


def change(row: Row, other: Measured | None, measure: str, part: str) -> str:
    mine, theirs = row.of.get((measure, part)), (other or {}).get((measure, part))
    if mine is None or theirs is None:
        return "–"
    low, high = mine.interval(theirs)
    return f"{100 * mine.value() / theirs.value() - 100:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def csv_lines(row: Row, default: Row | None, base: Measured) -> list[list[object]]:
    about = [row.axis, row.label, len(row.runs)]
    lines = []
    for (measure, part), of in row.of.items():
        lines.append([*about, measure, part, of.value(), *of.interval(), of.above.shape[1]])
        compared = base if measure == "text" else default.of if default else {}
        if measure in ("answers", "text") and (theirs := compared.get((measure, part))):
            value = of.value() / theirs.value() - 1
            lines.append([*about, f"{measure}, change", part, value, *of.interval(theirs), of.above.shape[1]])
    lines.append([*about, "tokens", "", row.tokens, "", "", ""])
    lines.append([*about, "seconds", "", round(row.seconds, 1), "", "", ""])
    return lines


def draw(rows: list[Row], base: Measured, path: Path) -> str | None:
    """The change of every run, answers and text; why not, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: pip install -e '.[bench]'"
    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.axis != FINALS]
    default = reference(rows, "")
    if default is None:
        return "the plan's default is not finished"
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same figures give the same file
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 1.5 + 0.28 * len(shown)), sharey=True, layout="constrained")
    sides = [("answers", default.of, "held-back answers against the default"), ("text", base, "text against the base")]
    for panel, (measure, other, title) in zip(panels, sides, strict=True):
        for offset, language, colour in ((-0.12, "en", "tab:blue"), (0.12, "zh", "tab:red")):
            for at, row in enumerate(shown):
                mine, theirs = row.of.get((measure, language)), other.get((measure, language))
                if mine is None or theirs is None:
                    continue
                low, high = mine.interval(theirs)
                panel.plot([100 * low, 100 * high], [at + offset] * 2, color=colour, linewidth=1)
                value = 100 * (mine.value() / theirs.value() - 1)
                panel.plot(value, at + offset, "o", color=colour, markersize=4, label=language if not at else None)
        panel.axvline(0, color="black", linewidth=0.5)
        panel.set_xscale("symlog", linthresh=5)
        panel.set_title(f"bits per byte of {title}, %")
        panel.grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(shown)), [f"{row.axis}: {row.label}" for row in shown])
    panels[0].invert_yaxis()
    panels[1].legend(*panels[1].get_legend_handles_labels(), loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return None
