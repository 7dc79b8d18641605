"""The typed door: composed YAML goes in, one dataclass per stage comes out, or one line that says what is wrong."""

import dataclasses
import difflib
import math
import re

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from aquila_sft.config.runs import SCHEMAS, Run
from aquila_sft.errors import UserError

UNLIMITED = ("data.max_epochs", "optim.max_grad_norm")  # where inf means that there is no limit


def load(cfg: DictConfig) -> Run:
    """The composed configuration as a checked dataclass. Raises UserError, one line."""
    schema = SCHEMAS[cfg.stage]
    try:
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    except OmegaConfBaseException as error:
        raise UserError(explain(error, schema, cfg)) from None
    check_numbers(run)
    for value in [getattr(run, f.name) for f in dataclasses.fields(run)]:
        if hasattr(value, "check"):
            value.check()
    run.check()
    return run


def check_numbers(value: object, key: str = "") -> None:
    """nan is no setting, and neither is an endless length or size; raises UserError."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            check_numbers(getattr(value, f.name), f"{key}.{f.name}".lstrip("."))
    elif isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or key not in UNLIMITED):
        raise UserError(f"{key}={value} is no number to work with")


def explain(error: OmegaConfBaseException, schema: type, cfg: DictConfig) -> str:
    """One line for an OmegaConf error: the key, its value, what is valid."""
    key = error.full_key or str(error.key)
    if isinstance(error, ConfigKeyError):
        return f"{key} is not a setting of stage {cfg.stage}{nearest(key, setting_names(schema))}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; add {key}=<value>"
    what = error.msg.splitlines()[0] if error.msg else str(error)
    if isinstance(error, ValidationError):
        found = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", what)
        if found:
            return f"{key}={found[1]} is not one of {found[2]}"
        found = re.search(r"Value '(.*)' of type '.*' could not be converted to (\w+)", what)
        if found:
            wanted = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
            return f"{key}={found[1]} is not {wanted.get(found[2], found[2])}"
        if "ListConfig" in what:
            return f"{key}={OmegaConf.select(cfg, key)} is not a list; write {key}=[…,…]"
        if "None" in what:
            return f"{key} cannot be null"
    return f"{key}: {what}"


def setting_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of every field of a dataclass, nested ones included."""
    names = []
    for f in dataclasses.fields(schema):
        names.append(prefix + f.name)
        inner = next((t for t in (f.type, *getattr(f.type, "__args__", ())) if dataclasses.is_dataclass(t)), None)
        if inner:
            names += setting_names(inner, f"{prefix}{f.name}.")
    return names


def nearest(name: str, choices: list[str]) -> str:
    """'; did you mean x?' for the closest of `choices`, or '' when none is close."""
    last = {c.rsplit(".", 1)[-1]: c for c in choices}  # `lr=1e-4` means `optim.lr`
    found = [last[name]] if name in last else difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if not found:
        found = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.75)]
    return f"; did you mean {found[0]}?" if found else ""
