"""How a base is tuned best: every run of a plan, measured, in tables with intervals.

    python -m recipes.study base=outputs/135m/anneal/final text=outputs/135m/prepare/final \\
        data.alpaca_en=en.jsonl data.alpaca_zh=zh.jsonl axes.stages=null
    python -m recipes.study plan=mine.yaml …       another plan than recipes/study/plan.yaml
    python -m recipes.study … only=LoRA            the runs of one axis; only=report: none, tables of what is finished

Any key of the plan can be given as key=value, default.train.tokens_per_step=4096 too; axes.stages=null leaves an axis
out (that one names sources of its own). The same command goes on where it was broken off. In `out`: runs/, the data as
they were split, figures.csv, tables.md, changes.svg.
"""

import sys
from pathlib import Path

from aquila_sft import checkpoint
from aquila_sft.errors import UserError
from recipes.study import figures, report, run, split
from recipes.study import plan as plans

REPORT = "report"


def main(words: list[str]) -> int:
    if not words or {"-h", "--help", "help"} & set(words):
        print(__doc__.strip())
        return 0 if words else 2
    try:
        return study(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 3


def study(words: list[str]) -> int:
    own = dict(word.split("=", 1) for word in words if word.startswith(("plan=", "only=")))
    rest = [word for word in words if not word.startswith(("plan=", "only="))]
    if bad := next((word for word in rest if "=" not in word), None):
        raise UserError(f"{bad!r} is not key=value; python -m recipes.study --help")
    plan = plans.read(own.get("plan", str(Path(__file__).with_name("plan.yaml"))), rest)
    runs, only = plans.runs_of(plan), own.get("only")
    axes = {axis for one in runs for axis, _ in one.places}
    if only not in (None, REPORT, *axes):
        raise UserError(f"only={only} is no axis of the plan; it has {', '.join(sorted(axes))}, and {REPORT}")
    failed = {}
    if only == REPORT and not Path(plan["out"]).is_dir():
        raise UserError(f"out={plan['out']}: no study lies there")
    if only != REPORT:
        failed = train([one for one in runs if only is None or only in {axis for axis, _ in one.places}], plan)
    tell(runs, plan)
    print(f"{plan['out']}/tables.md, figures.csv; {len(failed)} runs failed")
    for name, why in failed.items():
        print(f"  {name}: {why}")
    return 2 if failed else 0


def train(chosen: list[plans.Run], plan: dict) -> dict[str, str]:
    """Those runs, and the base's figures; {name: why it failed}."""
    out = Path(plan["out"])
    run.find_base(plan["base"])
    prepare(plan, out)
    text = split.texts(plan, out)
    jobs = {one.name: run.jobs_of(one, plan, text) for one in chosen}
    if before := run.base_command(plan, text):
        jobs = {"base": [(out / "base", before)]} | jobs
    print(f"{len(chosen)} runs, {plan['jobs']} at a time -> {out}", flush=True)
    return run.run_all(jobs, plan["jobs"], say)


def tell(runs: list[plans.Run], plan: dict) -> None:
    """Tables, figures and the plot of what is finished, and what is not."""
    out = Path(plan["out"])
    text = split.texts(plan, out)
    before = run.base_command(plan, text)
    has_base = run.done_in(out / "base") == before
    base = figures.of_folder(out / "base", plan["text_without"]) if before and has_base else {}
    rows = report.rows_of(runs, plan, base, text)
    print(report.write(rows, out))
    if why := report.draw(rows, out / "changes.svg"):
        print(f"no plot: {why}")
    there = {(row.axis, row.label) for row in rows}
    missing = [": ".join(place) for place in plans.places_of(plan) if place not in there]
    if missing := missing + ["the base, so no change against it"] * (not has_base):
        print(f"not finished: {'; '.join(missing)}")


def say(line: str) -> None:
    print(line, flush=True)


def prepare(plan: dict, out: Path) -> None:
    """The split of the data."""
    import train as program

    rules = program.compose_run(["recipe=sft", f"scale={plan['scale']}", f"model.path={plan['base']}"]).data.clean
    checkpoint.make_folder(out)
    split.prepare(plan, rules, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
