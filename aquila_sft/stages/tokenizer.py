"""recipe=tokenizer: a vocabulary is learnt from text, or the published tiktoken one is converted.

Either way a folder that AutoTokenizer loads:

    text -> survey -> memory -> learn -> bytes per token -> final/
    tokenizer.ranks -> convert -> final/
"""

import contextlib
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aquila_sft import checkpoint, narration, run_dir, runtime
from aquila_sft.config.runs import TokenizerRun, shown
from aquila_sft.data import documents
from aquila_sft.data.ledger import Ledger, why_left_out
from aquila_sft.errors import UserError

NOT_IDENTITY = ("seed", "kernel", "bpe.memory_gb")  # nothing here is drawn or computed with them
CONVERTING = ("data.", "bpe.")  # settings that a conversion does not know
BATCH_BYTES = 2**20  # of text handed over at a time
NOT_DRAWN = "not drawn: the languages are balanced by bytes, within bpe.max_bytes"


def run(cfg: TokenizerRun, compose_run: Callable[[list[str]], object]) -> None:
    runtime.settle(offline=True)
    if runtime.world_size() > 1:
        raise UserError(f"recipe=tokenizer is one process's work; {runtime.world_size()} were launched")
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.StopSignal())
        files = {} if cfg.tokenizer.ranks else find_text(cfg)
        ranks = find_ranks(cfg) if cfg.tokenizer.ranks else None
        narration.opening(cfg)
        out = stack.enter_context(run_dir.opened(cfg, identity_of(cfg, ranks, files)))
        if out.is_finished() and out.final_is_whole():
            return closing(cfg, out, f"{out.final} is finished, made from the same input: reused, nothing done")
        stack.enter_context(out.recorded(cfg))
        with checkpoint.room(out.path):
            tokenizer, figures = convert(cfg, out, ranks) if ranks else learn(cfg, out, files)
            save(cfg, out, tokenizer)
        out.write_summary(cfg, "done", **figures)
        closing(cfg, out, f"{out.final} done")


def find_ranks(cfg: TokenizerRun) -> Path:
    if cfg.data.files is not None:
        raise UserError(
            f"data.files={shown(cfg.data.files)} is text to learn from, and tokenizer.ranks={cfg.tokenizer.ranks} a "
            "vocabulary that is learnt already; keep one"
        )
    ranks = Path(cfg.tokenizer.ranks).expanduser()
    if not ranks.is_file():
        raise UserError(f"tokenizer.ranks={ranks}: no such file")
    return ranks


def find_text(cfg: TokenizerRun) -> dict[str, list[Path]]:
    from aquila_sft.bpe import check_vocab_size

    check_vocab_size(cfg.bpe.vocab_size)
    return documents.find(cfg.data, Path(f"outputs/{cfg.scale}/world"), for_vocabulary=True)


def identity_of(cfg: TokenizerRun, ranks: Path | None, files: dict[str, list[Path]]) -> dict:
    """Settings and contents; the names of sources count, those of files do not."""
    left_out = ("data.files.", *(CONVERTING if ranks else ()))
    settings = {
        key: value
        for key, value in run_dir.identity_of(cfg).items()
        if key not in NOT_IDENTITY and not key.startswith(left_out)
    }
    contents = {f"data.{source}": run_dir.files_sha256(paths) for source, paths in files.items()}
    return settings | contents | ({"vocabulary": run_dir.files_sha256([ranks])} if ranks else {})


def convert(cfg: TokenizerRun, out: run_dir.RunDir, ranks: Path):
    """The tokenizer of a rank file, and the figures of the run."""
    from aquila_sft.tokenizer import convert_tiktoken, is_published

    aside = out.path / ".converted"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        tokenizer = convert_tiktoken(ranks, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    published = is_published(tokenizer)
    runtime.say(f"  {len(tokenizer):,} entries, {'' if published else 'not '}the published vocabulary")
    return tokenizer, {"entries": len(tokenizer), "published_vocabulary": published}


def learn(cfg: TokenizerRun, out: run_dir.RunDir, files: dict[str, list[Path]]):
    """A tokenizer learnt from the text of `files`, and the figures of the run."""
    from aquila_sft import bpe
    from aquila_sft.data import balance
    from aquila_sft.tokenizer import BOS, EOS, MAX_LENGTH, from_backend

    begun = time.monotonic()
    ledger = Ledger()
    shelves = balance.survey(document for document, _ in documents.read(files, cfg.data.text_column, ledger.refuse))
    if not shelves:
        write_ledger(out, ledger, files)
        names = ", ".join(path.name for paths in files.values() for path in paths[:3])
        why = why_left_out(ledger.as_dict())
        raise UserError(f"no text to learn from in {names}: " + (f"left out for {why}" if why else "it is empty"))
    if lost := ledger.total("left_out"):
        runtime.say(f"  {lost:,} records left out for {why_left_out(ledger.as_dict())}")
    drawn = balance.choose(shelves, cfg.bpe.max_bytes)
    runtime.say(f"  text read in {time.monotonic() - begun:.0f} s; used: {used(drawn)}")
    estimate = bpe.check(bpe.estimate(shelves, drawn, cfg.bpe.max_han_run), cfg.bpe.memory_gb)
    runtime.say(f"  learning {cfg.bpe.vocab_size:,} entries: about {estimate / 1e9:.2f} GB of memory …")
    out.begin()
    started = time.monotonic()
    ledger = Ledger()  # the text is read a second time
    backend = interruptible(lambda: bpe.learn(batches(cfg, files, drawn, ledger), cfg.bpe))
    entries, seconds = backend.get_vocab_size(), time.monotonic() - started
    runtime.say(f"  {entries:,} entries, learnt in {seconds:.0f} s")
    if entries < cfg.bpe.vocab_size:
        runtime.say(
            f"  fewer than bpe.vocab_size={cfg.bpe.vocab_size}: in this text no further pair stands "
            f"{cfg.bpe.min_frequency} times and is within bpe.max_token_bytes={cfg.bpe.max_token_bytes}"
        )
    measured = {}
    for language, d in drawn.items():
        low, high = (0, d.held_below) if d.held_bytes else (0, d.used_below)
        texts = shelves[language].texts(low, high, balance.HELD_BACK_BYTES)
        measured[language] = round(bpe.bytes_per_token(backend, texts), 4)
    on = {language: "held back" if d.held_bytes else "learnt from" for language, d in drawn.items()}
    runtime.say(f"  bytes a token: {', '.join(f'{name} {measured[name]:.2f} ({on[name]})' for name in measured)}")
    write_ledger(out, ledger, files)
    unit = 1 if sys.platform == "darwin" else 1024
    tokenizer = from_backend(backend, bos=BOS, eos=EOS, pad=bpe.PAD, max_length=MAX_LENGTH)
    return tokenizer, {
        "entries": entries,
        "published_vocabulary": False,
        "text_bytes": {language: d.used_bytes for language, d in drawn.items()},
        "bytes_per_token": measured,
        "bytes_per_token_on": on,
        "seconds": round(time.monotonic() - begun, 1),
        "estimated_memory_bytes": estimate,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def used(drawn: dict) -> str:
    return ", ".join(
        f"{language} {d.used_bytes / 1e6:.1f} of {d.all_bytes / 1e6:.1f} MB" for language, d in drawn.items()
    )


def batches(cfg: TokenizerRun, files: dict, drawn: dict, ledger: Ledger) -> Iterator[list[str]]:
    """The parts that are drawn, about BATCH_BYTES at a time; every document is entered in the ledger."""
    from aquila_sft.data.balance import content_hash, parts_of

    batch, batch_bytes = [], 0
    for document, where in documents.read(files, cfg.data.text_column, ledger.refuse):
        d = drawn[document.language]
        num_bytes = {"used_bytes": 0, "held_back_bytes": 0, "not_drawn_bytes": 0}
        for part in parts_of(document.text):
            encoded = part.encode()
            key = content_hash(encoded)
            if d.held_below <= key < d.used_below:
                num_bytes["used_bytes"] += len(encoded)
                batch.append(part)
                batch_bytes += len(encoded)
            else:
                num_bytes["held_back_bytes" if key < d.held_below else "not_drawn_bytes"] += len(encoded)
        for counter in (ledger.languages[document.language], ledger.sources[document.source]):
            counter.update(num_bytes)
            counter["kept"] += num_bytes["used_bytes"] > 0
            counter["held_back"] += num_bytes["used_bytes"] == 0 < num_bytes["held_back_bytes"]
        if num_bytes["not_drawn_bytes"] == sum(num_bytes.values()):
            ledger.refuse(NOT_DRAWN, document.language, document.source, where)
        if batch_bytes >= BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    yield batch


def write_ledger(out: run_dir.RunDir, ledger: Ledger, files: dict) -> None:
    report = ledger.as_dict()
    kept = ("kept", "held_back", "left_out", "reasons", "by_language", "by_source")
    run_dir.write_json(
        out.path / "ledger.json",
        {
            "files": {source: [str(path) for path in paths] for source, paths in files.items()},
            "read": sum(ledger.total(key) for key in ("kept", "held_back", "left_out")),
            **{f"{key}_bytes": ledger.total(f"{key}_bytes") for key in ("used", "held_back", "not_drawn")},
            **{key: report[key] for key in kept},
        },
    )


def interruptible(work: Callable[[], object]) -> object:
    """Its result, from a thread of its own: the library's code does not see a signal before it returns."""
    result, failure = [], []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failure:
        raise failure[0]
    return result[0]


def save(cfg: TokenizerRun, out: run_dir.RunDir, tokenizer) -> None:
    """final/, whole or absent, with the chat template of the settings."""
    from aquila_sft.chat_template import chatml
    from aquila_sft.tokenizer import save_tokenizer

    tokenizer.chat_template = chatml(cfg.tokenizer.system)
    aside = out.path / ".writing-final"
    shutil.rmtree(aside, ignore_errors=True)
    save_tokenizer(tokenizer, aside)
    out.begin()
    shutil.rmtree(out.final, ignore_errors=True)
    checkpoint.commit(aside, out.final, recipe=cfg.recipe, demo=cfg.demo)


def closing(cfg: TokenizerRun, out: run_dir.RunDir, state: str) -> None:
    summary = out.summary()
    narration.closing(
        cfg,
        f"{state}: {summary['entries']:,} entries",
        what_next={
            "make shards with it": f"python train.py recipe=prepare scale={cfg.scale} tokenizer.path={out.final}"
        },
    )
