"""recipe=check of=<recipe>: that recipe on paper. Nothing is written, nothing fetched, nothing trained.

settings -> what the recipes before made -> data -> steps and learning rate -> memory, disk, time -> findings
"""

from collections.abc import Callable

from aquila_sft import narration, runtime
from aquila_sft.config.runs import CheckRun
from aquila_sft.doctor import pretraining, text, tuning
from aquila_sft.doctor.findings import ERROR, Finding
from aquila_sft.doctor.view import View
from aquila_sft.errors import UserError

LOOKS = {
    "tokenizer": text.look_at_tokenizer,
    "prepare": text.look_at_prepare,
    "pretrain": pretraining.look_at_pretrain,  # anneal too
    "sft": tuning.look_at_sft,  # sft_lora too
}


def run(cfg: CheckRun, compose_run: Callable[[list[str]], object]) -> None:
    runtime.settle(offline=True)
    if not runtime.is_main():
        return
    runtime.say(f"{narration.SCALES[cfg.scale]}\nrecipe=check of={cfg.of}: on paper, nothing is written")
    findings, is_all_here = look(cfg, compose_run)
    for finding in sorted(findings, key=lambda f: f.level):
        runtime.say(str(finding))
    errors = sum(f.level == ERROR for f in findings)
    told = f"{errors} error(s), {len(findings) - errors} warning(s)" if findings else "nothing is wrong with it"
    told += "" if is_all_here else ", as far as it is here"
    runtime.say(f"recipe={cfg.of}: {told}\n{narration.SCALES[cfg.scale]}")
    if errors:
        raise UserError(f"recipe={cfg.of} as it is set would stop, or not do what it is for: {told}, see above")


def look(cfg: CheckRun, compose_run: Callable[[list[str]], object]) -> tuple[list[Finding], bool]:
    """What is wrong with it, and whether all that it needs was there to be looked at."""
    try:
        checked = compose_run(cfg.words)
    except UserError as refused:  # at the typed door
        return [Finding(ERROR, "setting", str(refused))], True
    view = View(cfg, checked, compose_run)
    view.attempt(view.needs)
    view.attempt(view.directory)
    LOOKS[checked.stage](view)
    return view.findings, view.is_all_here
