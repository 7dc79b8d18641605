"""A plan becomes runs: each a name, where it stands in the tables, and the settings of its stages.

    default: {…}, axes: {rate: {low: {optim.lr: 1e-4}, …}}, finals: {seeds: […], runs: {…}} -> [Run]

Settings are those of train.py. A list of them is trained one after the other, each from the model before. Two runs with
the same settings and seed are one.
"""

import re
from dataclasses import dataclass, field

from omegaconf import OmegaConf

from aquila_sft.errors import UserError

Settings = dict[str, object]
OWN = ("sources",)  # read by the study and not by train.py: which of the sources are trained on
FINALS = "finals"


@dataclass
class Run:
    name: str  # of its folder
    stages: list[Settings]
    seed: int
    changes: list[Settings]  # from the plan's default, in each stage
    places: list[tuple[str, str]] = field(default_factory=list)  # (axis, label) in the tables


def runs_of(plan: dict) -> list[Run]:
    """Every run of a plan once, in the order in which they are read. Raises UserError."""
    found: dict[str, Run] = {}

    def add(axis: str, label: str, change: object, seed: int) -> None:
        changes = change if isinstance(change, list) else [change or {}]
        if not all(isinstance(stage, dict) for stage in changes):
            raise UserError(f"{axis}: {label}: {change!r} is neither settings nor a list of them")
        stages = [plan["default"] | stage for stage in changes]
        key = repr([sorted(stage.items(), key=str) for stage in stages]) + str(seed)
        if key not in found:
            found[key] = Run(slug(f"{axis} {label}" + (f" {seed}" if axis == FINALS else "")), stages, seed, changes)
        found[key].places.append((axis, label))

    for axis, labels in plan["axes"].items():
        for label, change in labels.items():
            add(axis, str(label), change, plan["seed"])
    for label, change in plan[FINALS]["runs"].items():
        for seed in plan[FINALS]["seeds"]:
            add(FINALS, str(label), change, seed)
    runs = list(found.values())
    names = [run.name for run in runs]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{', '.join(sorted(doubled))}: two runs of the plan would share a folder; rename one")
    return runs


def places_of(plan: dict) -> list[tuple[str, str]]:
    """Every place in the tables, in the plan's order."""
    axes = plan["axes"] | {FINALS: plan[FINALS]["runs"]}
    return [(axis, str(label)) for axis, labels in axes.items() for label in labels]


def slug(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-")


def read(file: str, words: list[str]) -> dict:
    """The plan in a file, with `key=value` words over it. Raises UserError for a key that no plan has."""
    known = {
        "seed",
        "base",
        "text",
        "data",
        "out",
        "jobs",
        "held_back",
        "train",
        "max_bytes",
        "text_bytes",
        "text_without",
        "evaluate",
    }
    known |= {"scale", "default", "axes", FINALS}
    try:
        plan = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(words))
    except OSError as error:
        raise UserError(f"plan={file}: {error.strerror}") from None
    made = OmegaConf.to_container(plan)
    if unknown := set(made) - known:
        raise UserError(f"{', '.join(sorted(unknown))}: no part of a plan; it has {', '.join(sorted(known))}")
    if missing := [key for key in sorted(known - {"text"}) if made.get(key) is None]:
        raise UserError(f"{missing[0]}= is missing; recipes/study/plan.yaml says what it is")
    return {"text": None} | made
