"""The folder of a model that is there already: model.path of what talks to it or measures it."""

import re
from pathlib import Path

from aquila_sft.config.model import Model
from aquila_sft.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_local(path: str | None) -> bool:
    """False for what can only be a Hub id: name/name, where no folder of either name exists here."""
    return not path or not HUB_ID.fullmatch(path) or Path(path).exists() or Path(path).parent.exists()


def find_model(model: Model, scale: str) -> Path:
    """The folder of model.path, downloaded if it is a Hub id. Raises UserError if there is no model in it."""
    if model.path is None:
        raise UserError("model.path is not set; add model.path=<folder or Hub id>")
    if not is_local(model.path):
        from aquila_sft import hub

        return hub.model_folder(model.path, model.revision, model.subfolder)
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model.path={model.path}: no such folder; train a model (recipe=sft scale={scale}), "
            "or add model.path=<folder or Hub id>"
        )
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.path={model.path} holds a LoRA adapter without its base; use the merged "
            "model in the folder `final` of the same run"
        )
    found = folder / "final"
    hint = f"use model.path={found}" if (found / "config.json").is_file() else "give a saved model's folder"
    raise UserError(f"model.path={model.path} holds no model (no config.json); {hint}")
