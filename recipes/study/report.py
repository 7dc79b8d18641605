"""Figures of a study as files: figures.csv (every figure of every run), tables.md, changes.svg.

Rows are runs by axis. A change of answers is that against the plan's default, among the finals against the first of
them, on the same answers, with its interval; a change of text is that against the base, and figures.csv has that of
answers too.
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from recipes.study import figures
from recipes.study.figures import ALL, Measured
from recipes.study.plan import FINALS, Run, places_of
from recipes.study.run import folders_of, is_finished

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
class Figure:
    value: float
    low: float
    high: float
    items: int


@dataclass
class Row:
    axis: str
    label: str
    runs: list[Run]
    of: Measured  # all seeds together
    tokens: int  # of a run
    seconds: float  # of a run, evaluation not counted
    is_first: bool = False  # of its axis, in the plan
    figures: dict[tuple[str, str], Figure] = field(default_factory=dict)  # by (measure, part), changes among them


def rows_of(runs: Iterable[Run], plan: dict, base: Measured, text: dict[str, str]) -> list[Row]:
    """A row for every place in the tables whose runs are finished; `text`: what the plan has of it, by source."""
    rows, read, places = [], {}, places_of(plan)
    for axis, label in places:
        listed = [run for run in runs if (axis, label) in run.places]
        if not all(is_finished(run, plan, text) for run in listed):
            continue
        folders = [folders_of(run, plan) for run in listed]
        for stages in folders:
            if stages[-1] not in read:
                read[stages[-1]] = figures.of_folder(stages[-1] / "eval", plan["text_without"])
        sums = [json.loads((stage / "summary.json").read_text("utf-8")) for stages in folders for stage in stages]
        tokens, seconds = (sum(s[key] for s in sums) / len(listed) for key in ("tokens", "seconds"))
        of = figures.together([read[stages[-1]] for stages in folders])
        is_first = (axis, label) == next(place for place in places if place[0] == axis)
        rows.append(Row(axis, label, listed, of, round(tokens), seconds, is_first))
    compare(rows, base)
    return rows


def compare(rows: list[Row], base: Measured) -> None:
    for row in rows:
        row.figures = figures_of(row, reference(rows, row.axis), base)


def figures_of(row: Row, other: Row | None, base: Measured) -> dict[tuple[str, str], Figure]:
    """Every value of a row, and behind it its changes: of answers against the other row, and all against the base."""
    against = {"answers, change": other.of if other and other.runs != row.runs else {}}
    against |= {"text, change": base, "answers, against the base": base}
    found = {}
    for (measure, part), of in row.of.items():
        items = of.above.shape[1]
        found[measure, part] = Figure(of.value(), *of.interval(), items)
        for name in (name for name in against if name.startswith(f"{measure}, ")):
            if theirs := against[name].get((measure, part)):
                found[name, part] = Figure(of.value() / theirs.value() - 1, *of.interval(theirs), items)
    return found


def write(rows: list[Row], out: Path) -> str:
    """The files; the tables as text, one of the axes and one of the finals."""
    lines, table, axis = [], [], None
    for row in rows:
        if axis is None or (axis == FINALS) != (row.axis == FINALS):
            table += ["", f"| | {' | '.join(HEAD)} |", "|---" * (len(HEAD) + 1) + "|"]
        if row.axis != axis:
            table.append(f"| **{row.axis}** " + "| " * len(HEAD) + "|")
        axis = row.axis
        table.append(f"| {row.label} | {' | '.join(cells(row))} |")
        about = [row.axis, row.label, len(row.runs)]
        lines += [[*about, *key, of.value, of.low, of.high, of.items] for key, of in row.figures.items()]
        lines.append([*about, "tokens", "", row.tokens, "", "", ""])
        lines.append([*about, "seconds", "", round(row.seconds, 1), "", "", ""])
    text = "\n".join(table[1:]) + "\n"
    (out / "tables.md").write_text(text, "utf-8")
    with open(out / "figures.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["axis", "label", "seeds", "measure", "part", "value", "low", "high", "items"])
        writer.writerows(lines)
    return text


def reference(rows: list[Row], axis: str) -> Row | None:
    """What the rows of an axis are compared with: the first of the finals, the default among an axis's own or others.

    None where that one is not finished.
    """
    if axis == FINALS:
        return next((row for row in rows if row.axis == FINALS and row.is_first), None)
    defaults = [row for row in rows if row.axis != FINALS and not any(row.runs[0].changes)]
    return next((row for row in defaults if row.axis == axis), defaults[0] if defaults else None)


def cells(row: Row) -> list[str]:
    answers, followed = (
        [of for language in LANGUAGES if (of := row.figures.get((measure, language)))]
        for measure in ("answers", "followed")
    )
    stopped = row.figures.get(("stopped", ALL))
    return [
        ", ".join(f"{of.value:.3f}" for of in answers) or "–",
        *(change(row, "answers", language) for language in LANGUAGES),
        ", ".join(map(share, followed)) or "–",
        share(stopped) if stopped else "–",
        *(change(row, "text", language) for language in LANGUAGES),
        f"{row.tokens / 1000:.0f}",
        f"{row.seconds:.0f}",
    ]


def share(of: Figure) -> str:
    return f"{100 * of.value:.0f} ± {50 * (of.high - of.low):.0f}"


def change(row: Row, measure: str, part: str) -> str:
    of = row.figures.get((f"{measure}, change", part))
    return f"{100 * of.value:+.1f} ({100 * of.low:+.1f} … {100 * of.high:+.1f})" if of else "–"


def draw(rows: list[Row], path: Path) -> str | None:
    """The change of every run, answers and text; why not, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: pip install -e '.[bench]'"
    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.axis != FINALS]
    if reference(rows, "") is None:
        return "the plan's default is not finished"
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same figures give the same file
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 1.5 + 0.28 * len(shown)), sharey=True, layout="constrained")
    sides = {"answers": "held-back answers against the default", "text": "text against the base"}
    for panel, (measure, title) in zip(panels, sides.items(), strict=True):
        for offset, language, colour in ((-0.12, "en", "tab:blue"), (0.12, "zh", "tab:red")):
            for at, row in enumerate(shown):
                of = row.figures.get((f"{measure}, change", language))
                if of is None:
                    continue
                panel.plot([100 * of.low, 100 * of.high], [at + offset] * 2, color=colour, linewidth=1)
                label = None if language in panel.get_legend_handles_labels()[1] else language
                panel.plot(100 * of.value, at + offset, "o", color=colour, markersize=4, label=label)
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
