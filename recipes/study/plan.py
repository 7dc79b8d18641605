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
FROM_ONE, OR_BY_SOURCE = "a whole number from 1 on", "or one for each source: {source: 5}"
BY_SOURCE, FROM_ZERO = ("skip", "held_back", "train"), ("seed", "skip")
KINDS = {  # every key of a plan: what it is, and what is said of another
    "scale": (str, "a scale of train.py"),
    "seed": (int, "a whole number"),
    "seeds_of": (dict, "seeds of axes that have several: {axis: [1, 2]}"),
    "base": (str, "a folder or a Hub id"),
    "text": (str, "the final/ of a recipe=prepare"),
    "text_bytes": (int, FROM_ONE),
    "text_without": (list, "a list of sources of the text"),
    "data": (dict, "files by source: data.<source>=<files>"),
    "skip": (int, f"a whole number, {OR_BY_SOURCE}"),
    "held_back": (int, f"{FROM_ONE}, {OR_BY_SOURCE}"),
    "train": (int, f"{FROM_ONE}, {OR_BY_SOURCE}"),
    "max_bytes": (int, FROM_ONE),
    "out": (str, "a folder"),
    "jobs": (int, FROM_ONE),
    "evaluate": (dict, "settings of recipe=eval"),
    "default": (dict, "settings of train.py"),
    "axes": (dict, "settings by axis and label"),
    FINALS: (dict, "seeds, and settings by label"),
}


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
            is_named = axis == FINALS or seed != plan["seed"]
            found[key] = Run(slug(f"{axis} {label}" + (f" {seed}" if is_named else "")), stages, seed, changes)
        found[key].places.append((axis, label))

    for axis, labels in plan["axes"].items():
        for label, change in labels.items():
            for seed in [plan["seed"], *plan.get("seeds_of", {}).get(axis, ())]:
                add(axis, str(label), change, seed)
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
    """The plan in a file, with `key=value` words over it. Raises UserError for what no plan has, and what cannot run.

    Behind `default.` stands a setting of train.py, whose points are its own; null takes an axis or a final run away.
    """
    prefix = "default."
    of_default = [word for word in words if word.startswith(prefix)]
    of_plan = [word for word in words if not word.startswith(prefix)]
    try:
        plan = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(of_plan))
    except OSError as error:
        raise UserError(f"plan={file}: {error.strerror}") from None
    made = {"text": None, "seeds_of": {}, "skip": 0} | OmegaConf.to_container(plan)
    if unknown := set(made) - set(KINDS):
        raise UserError(f"{', '.join(sorted(unknown))}: no part of a plan; it has {', '.join(sorted(KINDS))}")
    for key, (_, told) in sorted(KINDS.items()):
        value = made.get(key)
        if value is None and key != "text":
            raise UserError(f"{key}= is missing; recipes/study/plan.yaml says what it is")
        if value is not None and not fits(key, value):
            raise UserError(f"{key}={value!r}: {told}")
    for word in of_default:
        key, value = word.removeprefix(prefix).split("=", 1)
        made["default"][key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]
    made["axes"] = {axis: labels for axis, labels in made["axes"].items() if labels is not None}
    finals = made[FINALS]
    if set(finals) != {"seeds", "runs"} or not finals["seeds"]:
        raise UserError(f"{FINALS}: has seeds, at least one, and runs; given: {', '.join(finals)}")
    finals["runs"] = {label: change for label, change in finals["runs"].items() if change is not None}
    check(made)
    return made


def fits(key: str, value: object) -> bool:
    """Whether a part of a plan can be that value."""
    kind, _ = KINDS[key]
    if key in BY_SOURCE and isinstance(value, dict):
        return all(isinstance(number, int) and fits(key, number) for number in value.values())
    return isinstance(value, kind) and (kind is not int or value >= (key not in FROM_ZERO))


def check(plan: dict) -> None:
    """What would only be found when its run begins. Raises UserError."""
    for name in ("out", *(f"data.{source}" for source in plan["data"])):
        value = plan["out"] if name == "out" else name
        if not re.fullmatch(r"[\w./+~-]+", value, re.ASCII):
            raise UserError(f"{name}={value}: names and paths of a study are of letters, digits, and . _ / + ~ - alone")
    for key in BY_SOURCE:
        if isinstance(plan[key], dict) and set(plan[key]) != set(plan["data"]):
            raise UserError(f"{key}= has {', '.join(sorted(plan[key]))}, and data= {', '.join(sorted(plan['data']))}")
    for axis in set(plan.get("seeds_of", {})) - set(plan["axes"]):
        raise UserError(f"seeds_of: {axis} is no axis of the plan; it has {', '.join(plan['axes'])}")
    for run in runs_of(plan):
        where, names = ": ".join(run.places[0]), set(plan["data"])
        for stage in run.stages:
            if missing := sorted(set(stage.get("sources") or ()) - names):
                raise UserError(
                    f"{where}: {', '.join(missing)} is no source of data=, which has {', '.join(sorted(names))}; name "
                    f"yours so, or leave that axis out: axes.{run.places[0][0]}=null"
                )
            if stage.get("data.text.share") and not (plan["text"] or stage.get("data.text.shards")):
                raise UserError(f"{where}: mixes text in, and text= is missing: the final/ of a recipe=prepare")
