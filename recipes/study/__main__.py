"""How a base is tuned best: every run of a plan, measured, in tables with intervals.

    python -m recipes.study base=outputs/135m/anneal/final text=outputs/135m/prepare/final \\
        data.alpaca_en=en.jsonl data.alpaca_zh=zh.jsonl
    python -m recipes.study plan=mine.yaml …       another plan than recipes/study/plan.yaml
    python -m recipes.study … only=LoRA            the runs of one axis; only=report: none, tables of what is finished

Any key of the plan can be given as key=value. The same command goes on where it was broken off. In `out`: runs/, the
data as they were split, figures.csv, tables.md, changes.svg.
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
    out = Path(plan["out"])
    failed = {}
    if only != REPORT:
        text = prepare(plan, out)
        chosen = [one for one in runs if only is None or only in {axis for axis, _ in one.places}]
        jobs = {one.name: run.jobs_of(one, plan, text) for one in chosen}
        if text:
            jobs = {"base": [(out / "base", run.base_command(plan, text))]} | jobs
        print(f"{len(chosen)} runs, {plan['jobs']} at a time -> {out}", flush=True)
        failed = run.run_all(jobs, plan["jobs"], say)
    has_text = (out / "base/answers.jsonl").is_file()
    base = figures.of_folder(out / "base", plan["text_without"]) if has_text else {}
    rows = report.rows_of(runs, plans.places_of(plan), out, plan["text_without"])
    print(report.write(rows, base, out))
    if why := report.draw(rows, base, out / "changes.svg"):
        print(f"no plot: {why}")
    print(
        f"{out}/tables.md, figures.csv; {len(failed)} runs failed" + "".join(f"\n  {n}: {w}" for n, w in failed.items())
    )
    return 2 if failed else 0


def say(line: str) -> None:
    print(line, flush=True)


def prepare(plan: dict, out: Path) -> dict[str, str]:
    """The split of the data, and the files of held-back text by source."""
    import train as program

    rules = program.compose_run(["recipe=sft", f"scale={plan['scale']}", f"model.path={plan['base']}"]).data.clean
    checkpoint.make_folder(out)
    for source, files in plan["data"].items():
        split.of_source(source, files, plan, rules, out)
    return split.of_text(Path(plan["text"]), plan["text_bytes"], out) if plan["text"] else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
