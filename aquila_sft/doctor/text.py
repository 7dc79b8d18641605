"""recipe=tokenizer and recipe=prepare on paper: the text, its languages, tokens and shards."""

import math
from pathlib import Path

from aquila_sft import bpe
from aquila_sft.config.runs import PrepareRun, TokenizerRun
from aquila_sft.data import decontaminate
from aquila_sft.data.ledger import why_left_out
from aquila_sft.doctor import examine
from aquila_sft.doctor.view import View
from aquila_sft.errors import UserError


def look_at_tokenizer(view: View) -> None:
    run: TokenizerRun = view.run
    if run.tokenizer.ranks:
        from aquila_sft.tokenizer import read_ranks

        path = Path(run.tokenizer.ranks).expanduser()
        if not path.is_file():
            return view.error("input", f"tokenizer.ranks={path}: no such file")
        if found := view.attempt(read_ranks, path):
            view.say("vocabulary", f"{path}: {len(found[0]):,} ranks, to be converted")
        return
    view.attempt(bpe.check_vocab_size, run.bpe.vocab_size)
    view.say("vocabulary", f"{run.bpe.vocab_size:,} entries, {2 if run.bpe.vocab_size <= 2**16 else 4} bytes a token")
    seen = view.attempt(look_at_text, view)
    # An entry stands for some four bytes: with fewer than a hundred for each, the last pairs were seen a few times.
    if seen and seen.file_bytes < 100 * run.bpe.vocab_size:
        view.warning(
            "little-text",
            f"bpe.vocab_size={run.bpe.vocab_size:,} from {seen.file_bytes / 1e3:,.0f} kB of text: the last entries "
            "are learnt from a few occurrences; lower it, or give more text",
        )


def look_at_prepare(view: View) -> None:
    run: PrepareRun = view.run
    tokenizer = None
    if run.tokenizer.path or run.tokenizer.ranks:
        tokenizer = view.attempt(examine.tokenizer_asked_for, run)
    if run.prepare.decontaminate:
        view.attempt(look_at_benchmarks, view)
    if run.prepare.holdout_fraction == 0 or run.prepare.holdout_max_bytes == 0:
        view.warning("nothing-held-back", "prepare.holdout_fraction=0: no text is left for bits per byte")
    seen = view.attempt(look_at_text, view)
    if not (seen and tokenizer):
        return
    from aquila_sft.data.text_set import Encoder

    ids = view.attempt(lambda: Encoder(tokenizer)(seen.sampled[:200]))
    counted = sum(map(len, ids or []))
    if not counted:
        return
    per_token = sum(len(text.encode()) for text in seen.sampled[:200]) / counted
    tokens = seen.file_bytes / per_token
    size = int(tokens * (2 if len(tokenizer) <= 2**16 else 4))
    shards = math.ceil(tokens / run.prepare.shard_tokens)
    view.say("tokens", f"about {tokens:,.0f} ({per_token:.2f} bytes each), {shards:,} shard(s) or more")
    view.say("disk", f"about {size / 1e9:,.3f} GB; {view.free_disk / 1e9:,.1f} GB are free")
    if size > view.free_disk:
        view.error("disk", f"about {size / 1e9:,.1f} GB of shards, {view.free_disk / 1e9:,.1f} GB are free")
    if shards > 20_000:
        view.warning(
            "many-shards", f"prepare.shard_tokens={run.prepare.shard_tokens:,} makes {shards:,} files or more; raise it"
        )


def look_at_benchmarks(view: View) -> None:
    folder = Path(view.run.prepare.decontaminate)
    items = decontaminate.read(folder.expanduser())
    view.say("benchmarks", f"{len(items):,} items of {len({item.benchmark for item in items})} in {folder}")


def look_at_text(view: View) -> examine.Documents:
    seen = examine.texts(view.run.data, view.run.scale, view.cfg.sample)
    names = ", ".join(f"{source} ({len(files)} file(s))" for source, files in seen.files.items())
    view.say("text", f"{names}: {seen.file_bytes / 1e6:,.1f} MB on the disk")
    total = seen.languages.total() or 1
    shares = ", ".join(f"{name} {size / total:.0%}" for name, size in seen.languages.most_common())
    view.say("languages", f"{shares or 'none'} of the {len(seen.sampled):,} documents looked at")
    left_out = seen.report["left_out"]
    if not seen.sampled:
        raise UserError(f"data.files: no document in {names}; left out: {why(seen.report)}")
    if left_out > 0.1 * (left_out + len(seen.sampled)):
        view.warning(
            "left-out",
            f"data.files: {left_out:,} of {left_out + len(seen.sampled):,} records are no "
            f"documents: {why(seen.report)}",
        )
    return seen


def why(report: dict) -> str:
    return why_left_out(report) or "nothing"
