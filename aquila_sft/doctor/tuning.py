"""recipe=sft and recipe=sft_lora on paper: conversations, their rows and labels, and what all training has.

The first conversations are prepared as the run would, in a temporary folder, and their labels audited as the run does.
"""

import tempfile
from pathlib import Path

from aquila_sft.audit import report
from aquila_sft.config.runs import SftRun
from aquila_sft.data import text_share
from aquila_sft.data.ledger import why_left_out
from aquila_sft.doctor import examine, findings
from aquila_sft.doctor.examine import Absent
from aquila_sft.doctor.training import look_at_training, shape_of
from aquila_sft.doctor.view import View
from aquila_sft.errors import UserError


def look_at_sft(view: View) -> None:
    run: SftRun = view.run
    base = view.attempt(examine.base_of, run)
    tokenizer = view.attempt(chat_tokenizer, run, base)
    found = None
    if tokenizer:
        system = f"system line {run.tokenizer.system!r}" if run.tokenizer.system else "no system line"
        view.say("template", f"ChatML, {system}; answers and their <|im_end|> are supervised")
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "data"
            found = view.attempt(examine.conversations, run, tokenizer, view.cfg.sample, prepared)
            if found:
                look_at_conversations(view, found)
                files, first = examine.conversation_files(run), None if found.is_exact else view.cfg.sample
                audited = report.Audited(run, tokenizer, base, files, prepared, found.report, first)
                view.add(report.audit(audited, view.say))
    else:
        view.attempt(examine.conversation_files, run)
    rows = found and found.rows + view_text(view, tokenizer, found.rows)
    shape = shape_of(view, base, len(tokenizer) if tokenizer else None)
    if run.lora:
        view.add(findings.of_adapter(run.lora, shape))
    plan = look_at_training(view, shape, rows, "conversations")
    if plan and found:
        view.say("epochs", f"{plan.epochs:.2f} of {rows:,} rows")
        if plan.epochs > 10:
            view.warning("many-epochs", f"every conversation is seen {plan.epochs:.0f} times; train shorter")
        blank = 1 - plan.end / plan.places
        if blank > 0.1:
            view.warning(
                "blank-rows",
                f"train.tokens_per_step={run.train.tokens_per_step:,}: {blank:.0%} of all rows are blank, they fill "
                "the last step; lower it",
            )


def view_text(view: View, tokenizer, conversation_rows: int) -> int:
    """Rows of pretraining text in an epoch."""
    text = view.attempt(text_share.prepared_of, view.run)
    if not text:
        return 0
    view.attempt(text_share.same_ids, text, tokenizer)
    text_rows = text_share.rows_of_epoch(view.run, conversation_rows)
    if order := view.attempt(text_share.order_of, view.run, text):
        view.say("text", text_share.told(order, text_rows, conversation_rows))
    return text_rows


def chat_tokenizer(run: SftRun, base: Path | None):
    """The run's tokenizer, checked as the run checks it."""
    from aquila_sft import chat_template, inputs

    if run.tokenizer.path or run.tokenizer.ranks:
        tokenizer = examine.tokenizer_asked_for(run)
    elif base:
        tokenizer = examine.tokenizer_of(base)
    elif run.model.path == "random":
        raise UserError("model.path=random has no tokenizer of its own: add tokenizer.path=<folder>")
    else:
        raise Absent("the base's tokenizer")
    tokenizer.chat_template = chat_template.chatml(run.tokenizer.system)
    inputs.add_chat_tokens(run, tokenizer)
    chat_template.turn_end_id(tokenizer)
    inputs.give_padding(tokenizer)
    return tokenizer


def look_at_conversations(view: View, found: examine.Conversations) -> None:
    run, report = view.run, found.report
    about = "" if found.is_exact else f", estimated from the first {found.sampled:,}"
    view.say("conversations", f"{found.records:,} records, {found.rows:,} rows, {found.filled:.1%} full{about}")
    view.say("tokens", f"{found.tokens:,}, {found.answer_tokens:,} of them supervised")
    languages = ", ".join(f"{name} {counts.get('kept', 0):,}" for name, counts in report["by_language"].items())
    view.say("languages", f"{languages}; held back {report['held_back']:,}, left out {report['left_out']:,}")
    if report["left_out"] > 0.1 * report["read"]:
        view.warning(
            "left-out", f"{report['left_out']:,} of {report['read']:,} records are left out: {why_left_out(report)}"
        )
    if report["shortened"] > 0.2 * report["read"]:
        view.warning(
            "shortened",
            f"train.max_length={run.train.max_length}: {report['shortened'] / report['read']:.0%} of the "
            "conversations lose their first exchanges; raise it",
        )
    if not report["held_back"]:
        view.warning("nothing-held-back", f"data.holdout_fraction={run.data.holdout_fraction:g} holds nothing back")
    if found.filled < 0.6 and run.data.packing:
        view.warning(
            "rows-empty", f"rows are {found.filled:.0%} full; lower train.max_length or raise data.pack_window"
        )
