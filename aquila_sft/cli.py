"""The command line before it becomes a configuration: help, free text in overrides, and readable refusals.

`python train.py recipe=chat prompt=你好，世界` reaches Hydra as `prompt='你好，世界'`: its grammar reads commas,
blanks, `=`, brackets and bare Chinese as syntax, a person means text.
"""

import re
from pathlib import Path

from aquila_sft.config.data import check_source
from aquila_sft.door import nearest
from aquila_sft.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"
GROUPS = ("recipe", "scale", "debug", "model", "tokenizer", "bpe", "optim", "schedule", "lora")
FREE_TEXT = (
    "prompt",
    "prompts",
    "system",
    "run_name",
    "output_dir",
    "model.path",
    "tokenizer.path",
    "tokenizer.ranks",
    "tokenizer.system",
    "data.files",
    "data.shards",
    "data.text.shards",
    "data.cache",
    "data.decontaminate",
    "prepare.decontaminate",
    "machine.measured_by",
    "eval.data",
    "eval.before",
    "eval.references",
)
INTERNAL = ("stage", "demo", "scale_is_explicit", "words")
CHECKED = ("tokenizer", "prepare", "pretrain", "anneal", "sft", "sft_lora")  # what recipe=check looks at
FILES = ("data.files", "eval.references")  # one or a list of them; data.files also by source
WEIGHTS = ("data.languages", "data.sources", "data.corpora", "data.text.languages", "data.text.sources")
RUN_LENGTHS = ("train.max_steps", "train.total_tokens", "train.num_epochs")

USAGE = """\
Rebuild, instruction-tune and talk to Aquila-135M, one recipe a step.

  accelerate launch train.py recipe=<recipe> [scale=<scale>] [key=value ...]
  python train.py recipe=<recipe> ...            the same, one process
  python train.py recipe=<recipe> ... --cfg      print the settings of that run and stop
  python train.py recipe=check of=<recipe> ...   look at that run on paper: schedule, data, memory, disk, time

recipes
{recipes}
scales
{scales}
Every setting of a recipe is a line of `--cfg` and can be given as key=value: optim.lr=1e-4, data.files=my.jsonl,
model.path=<folder or Hub id>, run_name=trial2, seed=7, debug=smoke (two steps, in a run directory of its own).
Exit status: 0 done, 2 configuration or data at fault, 3 stopped by a signal (the same command goes on), 1 otherwise.
"""


def usage() -> str:
    def listing(group: str) -> str:
        lines = []
        for file in sorted((RECIPES / group).glob("*.yaml")):
            comments = [
                ln for ln in file.read_text("utf-8").splitlines() if ln.startswith("# ") and "@package" not in ln
            ]
            lines.append(f"  {file.stem:<12}{comments[0][2:]}")
        return "\n".join(lines) + "\n"

    return USAGE.format(recipes=listing("recipe"), scales=listing("scale"))


def choices(group: str) -> list[str]:
    return sorted(f.stem for f in (RECIPES / group).glob("*.yaml"))


def prepare_overrides(words: list[str]) -> list[str]:
    """Command-line words as Hydra overrides, free text quoted. Raises UserError on what cannot be an override."""
    if "recipe=check" in words:
        return check_overrides(words)
    return overrides_of(words)


def check_overrides(words: list[str]) -> list[str]:
    """recipe=check of=sft …: what is its own, and the command line of the recipe that it looks at as one setting."""
    named = [word.removeprefix("of=") for word in words if word.startswith("of=")]
    if len(named) != 1 or named[0] not in CHECKED:
        told = f"of={named[0]} is not one of" if len(named) == 1 else "recipe=check needs of=<recipe>, one of"
        raise UserError(f"{told} {', '.join(CHECKED)}{nearest(named[0], list(CHECKED)) if named else ''}")
    own = [
        word for word in words if word.split(".")[0] == "machine" or word.split("=")[0] in ("recipe", "of", "sample")
    ]
    others = [f"recipe={named[0]}", *(word for word in words if word not in own)]
    scale = [word for word in others if word.startswith("scale=")][:1]  # both have it
    return [*overrides_of([*own, *scale]), f"words=[{','.join(map(quoted, others))}]"]


def overrides_of(words: list[str]) -> list[str]:
    overrides, seen = [], {}
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+~")
        if not equals or not re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w.@/]*", key):
            raise UserError(f"{word!r} is not of the form key=value (see python train.py --help)")
        if key != name:
            raise UserError(f"{word!r}: settings are neither added (+) nor removed (~); write {name}=value")
        if name in INTERNAL or name.split(".")[0] == "hydra":
            raise UserError(f"{word}: {name} is no setting; recipe= and scale= decide it")
        if name in seen:
            raise UserError(f"{name} is given twice: {name}={seen[name]} and {name}={value}; keep one")
        seen[name] = value
        if name in GROUPS and value != "null" and value not in choices(name):
            raise UserError(f"{name}={value} is not one of {', '.join(choices(name))}{nearest(value, choices(name))}")
        if name in WEIGHTS and value != "null":  # Hydra would merge: what the recipe has and the person left out stays
            overrides += [f"{name}=null", f"+{name}={value}"]
        elif name in FILES and value[:1] + value[-1:] in ("[]", "{}"):
            as_literal = quoted if value[0] == "[" else quoted_source
            items = [as_literal(item) for item in split_items(value)]
            overrides.append(f"{name}={value[0]}{','.join(items)}{value[-1]}")
        else:
            overrides.append(f"{name}={quoted(value)}" if name in FREE_TEXT else word)
    if "recipe" not in seen:
        raise UserError(
            f"no recipe: add recipe=<one of {', '.join(choices('recipe'))}>; python train.py --help explains"
        )
    lengths = [name for name in RUN_LENGTHS if seen.get(name, "null") != "null"]
    if len(lengths) == 1:  # one decides: naming it on the command line unsets the recipe's own
        overrides += [f"{name}=null" for name in RUN_LENGTHS if name not in seen]
    overrides.append(f"scale_is_explicit={str('scale' in seen).lower()}")
    return overrides


def quoted(value: str) -> str:
    """Text as a Hydra string literal; null and what is quoted already as they are.

    `${` would be an interpolation, so it is escaped as OmegaConf wants it.
    """
    if value == "null" or re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL):
        return value
    value = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'").replace("${", "\\${")
    return f"'{value}'"


def split_items(value: str) -> list[str]:
    """What stands between commas in `[…]` or `{…}`; a list inside stays whole."""
    items, depth = [""], 0
    for character in value[1:-1]:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def quoted_source(item: str) -> str:
    """`name: files` or `name: [file, …]` of {name: files, …}."""
    name, _, files = (part.strip() for part in item.partition(":"))
    check_source(name)
    if files[:1] + files[-1:] == "[]":
        return f"{name}:[{','.join(quoted(file) for file in split_items(files))}]"
    return f"{name}:{quoted(files)}"


def refused_override(message: str, words: list[str], keys: list[str]) -> str:
    """One line for an override that Hydra refused: the word at fault, and the nearest valid key."""
    values = dict(w.split("=", 1) for w in words)
    for key, value in values.items():
        if key.startswith("lora.") and values.get("recipe") == "sft":
            return f"{key}={value}: recipe=sft has no adapter; did you mean recipe=sft_lora?"
        if key not in GROUPS and key not in keys:
            return f"{key}={value}: this recipe has no setting {key}{nearest(key, keys)}"
    return " ".join(message.split())
