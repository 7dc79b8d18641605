"""The model card of a finished run: what the model is, what it was made from, and whether it is a toy."""

from collections.abc import Iterable

from aquila_sft.config.runs import PretrainRun, SftRun

CHAT = "Chat format: ChatML; an answer ends with `<|im_end|>`."
BASE = "A base model: it continues text and was not tuned to answer."


def model_card(cfg: SftRun | PretrainRun, languages: Iterable[str], trained_on: str) -> str:
    """README.md for `final/`, with the front matter that the Hub reads."""
    is_fresh = cfg.model.path == "random"
    front = {
        "library_name": "transformers",
        "language": [name for name in ("zh", "en") if name in languages],
        "base_model": None if is_fresh else cfg.model.path,
        "demo": str(cfg.demo).lower(),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in front.items() if value), "---"]
    lines += [
        f"# {cfg.run_name}",
        "",
        f"Made with Aquila-SFT, `recipe={cfg.recipe} scale={cfg.scale}`, from "
        f"{'fresh weights' if is_fresh else cfg.model.path} on {trained_on}.",
        *(["", "This is a small trial, not a model to use."] if cfg.demo else []),
        "",
        f"{CHAT if isinstance(cfg, SftRun) else BASE} The settings are in `config.yaml` of the run.",
    ]
    return "\n".join(lines) + "\n"
