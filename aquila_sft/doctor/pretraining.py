"""recipe=pretrain and recipe=anneal on paper: shards, vocabulary and mixture, and what all training has."""

from collections.abc import Iterable
from pathlib import Path

from aquila_sft import schedule
from aquila_sft.config.runs import PretrainRun
from aquila_sft.data import mixture
from aquila_sft.data.shards import Prepared
from aquila_sft.doctor import examine, findings
from aquila_sft.doctor.findings import Finding, error, warning
from aquila_sft.doctor.training import data_of, look_at_training, shape_of
from aquila_sft.doctor.view import View
from aquila_sft.inputs import same_vocabulary


def look_at_pretrain(view: View) -> None:
    run: PretrainRun = view.run
    prepared = view.attempt(look_at_shards, view) if run.data.shards else None
    tokenizer = view.attempt(examine.tokenizer_of, prepared.tokenizer_folder) if prepared else None
    if tokenizer:
        view.add(of_vocabulary(run, prepared, tokenizer))
    base = view.attempt(examine.base_of, run)
    shape = shape_of(view, base, len(tokenizer) if tokenizer else None)
    if base and tokenizer:
        view.attempt(lambda: same_vocabulary(run, examine.tokenizer_of(base), tokenizer, base))
    order = view.attempt(mixture.order_of_run, run, prepared) if prepared else None
    plan = look_at_training(view, shape, int(order.rows.sum()) if order else None, data_of(run, order))
    if plan and order:
        epochs = order.epochs(plan.places)
        for name, share in mixture.shares_of_run(run, prepared).items():
            view.say("data", f"{name}: {share:.1%} of the tokens, {epochs[name]:.2f} epoch(s)")
        view.add(findings.of_epochs(epochs, run.data.max_epochs))
    if base and run.recipe == "anneal":
        if not (base / "optimizer.pt").is_file() and schedule.warmup_steps(run.schedule, plan.steps if plan else 1) < 1:
            view.warning(
                "no-moments",
                f"model.path={run.model.path} has no optimizer.pt: AdamW begins anew, at the full rate; start from "
                "a checkpoint, or give schedule.warmup_steps=0.01",
            )


def look_at_shards(view: View) -> Prepared:
    prepared = Prepared(Path(view.run.data.shards))
    tokens = sum(part.tokens for part in prepared.parts.values())
    view.say("shards", f"{prepared.folder}: {len(prepared.parts)} part(s), {tokens:,} tokens")
    if not prepared.held_back:
        view.warning("nothing-held-back", f"{prepared.folder} holds nothing back: no bits per byte")
    return prepared


def of_vocabulary(run: PretrainRun, prepared: Prepared, tokenizer) -> Iterable[Finding]:
    """The vocabulary that lies beside the shards is the one that they were made with, and fits the model."""
    from aquila_sft.tokenizer import tokenizer_sha256

    recorded, found = prepared.manifest["tokenizer_sha256"], tokenizer_sha256(tokenizer)
    if recorded != found:
        yield error(
            "tokenizer-changed",
            f"{prepared.tokenizer_folder} is not the tokenizer that the shards were made with (sha256 {found[:12]}, "
            f"recorded {recorded[:12]}): ids would mean other text; prepare them again",
        )
    if run.model.path == "random" and run.model.vocab_size:
        if run.model.vocab_size < len(tokenizer):
            yield error(
                "vocabulary-small",
                f"model.vocab_size={run.model.vocab_size:,} is less than the {len(tokenizer):,} entries of the shards' "
                "tokenizer; use model.vocab_size=null",
            )
        elif run.model.vocab_size > 1.1 * len(tokenizer) + 128:
            yield warning(
                "vocabulary-large",
                f"model.vocab_size={run.model.vocab_size:,} and {len(tokenizer):,} entries in the shards' tokenizer: "
                "the other rows are never trained; use model.vocab_size=null",
            )
