"""All of the audit, told line by line: what is looked at, one conversation of each source, what is wrong.

Audited (rows, files, tokenizer, base, ledger) -> audit() -> [Finding, …] -> stop()
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aquila_sft import runtime
from aquila_sft.audit import embedding, rows, sample, template
from aquila_sft.chat_template import IM_END, IM_START, encode_messages
from aquila_sft.config.runs import SftRun
from aquila_sft.data import quarantine, sft_set
from aquila_sft.data.conversations import spelt_out
from aquila_sft.data.rows import PackedRows
from aquila_sft.doctor.findings import ERROR, WARNING, Finding, error, warning
from aquila_sft.errors import UserError

SHOWN = 8  # sources of which a conversation is printed
WIDTH = 48  # of a turn's content that is printed, from its begin and its end
GREEN, PLAIN = "\033[32m", "\033[0m"

Say = Callable[[str, str], None]


@dataclasses.dataclass
class Audited:
    """What is looked at. `base`: its folder, None for fresh weights, and where it is not here yet."""

    cfg: SftRun
    tokenizer: object
    base: Path | None
    files: list[Path]
    prepared: Path  # the folder with train/ and held-back/
    ledger: dict
    first: int | None = None  # only the first conversations were prepared, so many


def audit(of: Audited, say: Say) -> list[Finding]:
    """Findings, those that audit.allow names as warnings; what was looked at and one conversation a source are said."""
    begun = time.monotonic()
    findings = list(template.look(of.tokenizer, of.cfg.tokenizer.system, of.base))
    findings += lost(of)
    marks = rows.Marks.of(of.tokenizer)
    findings += look_at_rows(of, marks, say)
    findings += look_at_base(of, marks, say)
    allowed = of.cfg.audit.allow
    findings = [dataclasses.replace(f, level=WARNING) if f.code in allowed else f for f in findings]
    errors = sum(f.level == ERROR for f in findings)
    told = f"{errors} error(s), {len(findings) - errors} warning(s)" if findings else "nothing is wrong"
    say("audit", f"{told}; {time.monotonic() - begun:.1f} s")
    return findings


def stop(findings: list[Finding]) -> None:
    """Prints all of them; raises UserError with the first error, if there is one."""
    for finding in sorted(findings, key=lambda f: f.level):
        runtime.say(str(finding))
    errors = [f for f in findings if f.level == ERROR]
    if errors:
        more = f" (and {len(errors) - 1} more, see above)" if len(errors) > 1 else ""
        raise UserError(f"label audit: {errors[0].text} [{errors[0].code}]{more}; nothing was trained")


# ---- rows ----


def look_at_rows(of: Audited, marks: rows.Marks, say: Say) -> Iterator[Finding]:
    cfg, tokenizer = of.cfg, of.tokenizer
    length = cfg.train.max_length
    folders = [of.prepared / "train", *sorted((of.prepared / "held-back").glob("*"))]
    parts = {str(folder.relative_to(of.prepared)): PackedRows(folder) for folder in folders}
    tally = rows.Tally()
    pairs, without = sample.patterns(tokenizer)
    looked = {name: rows.look(name, part, marks, pairs, tally, threads=runtime.cores()) for name, part in parts.items()}
    conversations, tokens = (sum(getattr(part, n) for part in looked.values()) for n in ("conversations", "tokens"))
    num_rows = sum(len(part) for part in parts.values())

    def example(code: str) -> str:
        part, item = tally.first[code]
        return shown(parts[part], item, tokenizer)

    for code, text in rows.FAULTS.items():
        if count := tally.counts[code]:
            yield error(code, f"{count:,} of {conversations:,} conversations: {text}; the first: {example(code)}")
    for name, part in parts.items():
        if fault := sample.unpacked(part, length):
            yield error("packing", f"{name}: {fault}")
            break

    batches = 0
    for name, part in parts.items():
        batches += min(sample.ROWS, len(part))
        wrong = list(sample.wrong_batches(part, length, tokenizer.pad_token_id, cfg.seed))
        if wrong:
            row, what = wrong[0]
            yield error("batch", f"{len(wrong)} of {min(sample.ROWS, len(part))} rows of {name}: row {row}: {what}")
            break

    decoded, smuggling = special_text(of, parts, looked, without)
    yield from smuggling
    compared = against_files(of, parts, looked)
    if any(tally.counts[code] for code in rows.SUPERVISION):
        compared.wrong = []  # told by number already
    yield from compared_findings(of, compared, parts, looked)

    spelling = f", {len(without)} special strings in a sample only" if without else ""
    absent = f"{len(compared.absent):,} of them in none" if compared.absent else "all are there"
    say("looked at all", f"{num_rows:,} rows, {conversations:,} conversations, {tokens:,} tokens: turns, turn ends,")
    say("", f"what is supervised, special ids and strings{spelling}, packing")
    say("at a sample", f"{batches:,} rows as batches; {compared.read:,} conversations read again, of {len(of.files):,}")
    say("", f"file(s), against their rows: {absent}; {decoded} of special strings decoded")
    show_sources(compared, parts, of.ledger, tokenizer, say)


def special_text(of: Audited, parts: dict, looked: dict, without: list[str]) -> tuple[str, list[Finding]]:
    """How many suspects were decoded, of how many, and what was found; strings `without` a pair of ids by a sample."""
    suspects, decoded, hits = 0, 0, []
    for name, part in parts.items():
        generator = np.random.Generator(np.random.PCG64(of.cfg.seed))
        found = generator.permutation(looked[name].suspects)[: sample.CONVERSATIONS]
        more = generator.permutation(looked[name].conversations)[: 200 if without else 0]
        suspects, decoded = suspects + len(looked[name].suspects), decoded + len(found)
        hits += [(name, *hit) for hit in sample.smuggling(part, np.union1d(found, more), of.tokenizer)]
    told = f"{decoded:,} suspects" if decoded == suspects else f"{decoded:,} of {suspects:,} suspects"
    if not hits:
        return told, []
    _, _, text, around = hits[0]
    return told, [
        error(
            "special-text",
            f"{len(hits):,} conversation(s) hold the text of a special token, the first {text}: it is learnt as plain "
            "text, but other tools make the special token of it wherever it stands; remove it (data rendered twice?), "
            f"or audit.allow=[special-text] if it is meant: {printable(around)}",
        )
    ]


def against_files(of: Audited, parts: dict, looked: dict) -> sample.Compared:
    longest = max((int(np.diff(part.offsets).max(initial=0)) for part in parts.values()), default=0)
    weights = rows.weights_of(longest)
    order = {name: np.argsort(part.hashes, kind="stable") for name, part in looked.items()}
    ordered = {name: part.hashes[order[name]] for name, part in looked.items()}

    def find(ids: list[int]) -> tuple:
        hashed = rows.hash_of(ids, weights)
        if hashed is not None:
            for name, hashes in ordered.items():
                at = int(np.searchsorted(hashes, np.uint64(hashed)))
                if at < len(hashes) and int(hashes[at]) == hashed:
                    return (name, int(order[name][at])), hashed
        return None, hashed

    complete = of.ledger["read"] <= sample.CONVERSATIONS
    first = min(of.first or sample.CONVERSATIONS, sample.CONVERSATIONS) if complete or of.first else None
    again = sample.read_again(of.files, first, of.tokenizer, of.cfg.tokenizer.system, sft_set.policy_of(of.cfg))
    compared = sample.compare(again, parts, find, of.tokenizer)
    compared.complete = complete
    return compared


def compared_findings(of: Audited, compared: sample.Compared, parts: dict, looked: dict) -> Iterator[Finding]:
    """What is in no row has to be among what the ledger left out; what is in a row has to be what the file says."""
    if compared.wrong:
        yield error(
            "not-the-answer",
            f"{len(compared.wrong):,} of {compared.read:,} conversations that were read again: what is supervised is "
            f"not what the assistant says; {compared.wrong[0]}",
        )
    if lost := neither_kept_nor_left_out(of, compared.absent):
        yield error(
            "not-in-rows",
            f"{len(lost):,} of {compared.read:,} conversations that were read again are in no row and not in the "
            "quarantine: the rows are not those of these files, or of another template; the first: "
            f"{lost[0]}; give overwrite=true to make them again",
        )
    if compared.complete:
        strange = {
            name: np.flatnonzero(~np.isin(part.hashes, np.array(sorted(compared.expected), dtype=np.uint64)))
            for name, part in looked.items()
        }
        if count := sum(map(len, strange.values())):
            name = next(name for name, items in strange.items() if len(items))
            yield error(
                "not-of-files",
                f"{count:,} prepared conversations are in no file; the first: "
                f"{shown(parts[name], int(strange[name][0]), of.tokenizer)}; give overwrite=true to make them again",
            )


def neither_kept_nor_left_out(of: Audited, absent: list[str]) -> list[str]:
    """Those of the places that the quarantine does not name; it has the files' names of the run that prepared them."""
    names = (sft_set.read_json(of.prepared / sft_set.PREPARED) or {}).get("files", [])
    then = dict(zip(map(str, of.files), names, strict=False))
    waiting = {}
    for where in absent:
        file, _, number = where.rpartition(":")
        waiting[f"{then.get(file, file)}:{number}"] = where
    for place in quarantine.places(of.prepared / quarantine.FILE) if waiting else ():
        waiting.pop(place, None)
        if not waiting:
            break
    return list(waiting.values())


# ---- losses, and the base ----


def lost(of: Audited) -> Iterator[Finding]:
    """Answers that were cut or left out because of the length of a row."""
    ledger, allowed = of.ledger, of.cfg.audit.lost_share
    cut, left_out = ledger["answer_tokens_cut"], ledger.get("answer_tokens_left_out", 0)
    total = ledger["answer_tokens"] + cut + left_out
    if total and (cut + left_out) / total > allowed:
        yield error(
            "answers-lost",
            f"{(cut + left_out) / total:.1%} of {total:,} answer tokens are lost, more than audit.lost_share="
            f"{allowed:g}: {cut:,} with the first exchanges of {ledger['shortened']:,} conversations, {left_out:,} in "
            "conversations whose last exchange is longer than a row; raise "
            f"train.max_length={of.cfg.train.max_length}, or audit.lost_share if that is meant",
        )


def look_at_base(of: Audited, marks: rows.Marks, say: Say) -> Iterator[Finding]:
    tokenizer = of.tokenizer
    if of.base is None:
        say("template ids", "no base to look at" if of.cfg.model.path != "random" else "fresh weights, not looked at")
        return
    matrix = embedding.embedding_of(of.base)
    if matrix is None:
        say("template ids", f"not looked at: {of.base} has no embedding under a known name")
        return
    if len(broken := embedding.not_finite(matrix)):
        yield error(
            "broken-embedding",
            f"{len(broken):,} of {len(matrix):,} rows of the base's embedding hold NaN or infinity, the first that of "
            f"id {broken[0]}: {of.base} is damaged, or its training went astray; take another base",
        )
        return
    frame, _ = encode_messages(tokenizer, [{"role": "user", "content": ""}], default_system=of.cfg.tokenizer.system)
    part = PackedRows(of.prepared / "train")
    used = np.asarray(part.tokens[:200_000]).astype(np.int64)
    known = used < marks.entries
    used = used[known][~marks.is_special[used[known]] & ~np.isin(used[known], frame)]
    verdict = embedding.judge(matrix, [marks.start, marks.end], embedding.control_ids(tokenizer), used)
    names = dict(zip((marks.start, marks.end), (IM_START, IM_END), strict=True))
    if verdict.untrained:
        told = "; ".join(f"{names[i]} ({i}): {why}" for i, why in verdict.untrained.items())
        text = f"the base was never trained on {told}"
        data = of.cfg.data
        of_world = data.bundled and data.files is None and data.manifest is None  # its base reads no conversation
        if of.cfg.lora and of_world:
            yield warning("untrained-ids", f"{text}; the demonstration's adapter has to do without")
        elif of.cfg.lora:
            yield error(
                "untrained-ids",
                f"{text}; LoRA leaves the embedding as it is: use recipe=sft, a base that knows them, or "
                "audit.allow=[untrained-ids]",
            )
        else:
            yield warning("untrained-ids", f"{text}; full tuning trains them, from nothing")
    elif verdict.undecided:
        say("template ids", f"whether the base knows them cannot be told: {verdict.undecided}")
    else:
        say("template ids", "trained in the base, as its embedding shows")


# ---- what is printed of a conversation ----


def show_sources(compared: sample.Compared, parts: dict, ledger: dict, tokenizer, say: Say) -> None:
    if not compared.of_source:
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    named = "in green" if colour else "between « and »"
    sources = dict(sorted(compared.of_source.items()))
    say("supervised", f"{named}; one conversation of each source")
    for source, (part, item) in list(sources.items())[:SHOWN]:
        runtime.say(f"    {source}")
        turns = lines(parts[part], item, tokenizer, colour)
        if len(turns) > 6:
            turns = [*turns[:4], f"… {len(turns) - 5} turns …", turns[-1]]
        for line in turns:
            runtime.say(f"      {line}")
    if more := len(ledger["by_source"]) - min(SHOWN, len(sources)):
        say("", f"and {more:,} more source(s)")


def lines(part: PackedRows, item: int, tokenizer, colour: bool) -> list[str]:
    """A line for each turn, the middle of long contents left away; supervised stretches marked."""
    left, right = (GREEN, PLAIN) if colour else ("«", "»")
    a, b = int(part.offsets[item]), int(part.offsets[item + 1])
    ids, targets = np.asarray(part.tokens[a:b]), np.asarray(part.targets[a:b])
    opens = np.flatnonzero(ids == tokenizer.convert_tokens_to_ids(IM_START))
    told = []
    for turn in np.split(np.arange(b - a), opens[opens > 0]):
        pieces = []
        for piece in np.split(turn, np.flatnonzero(np.diff(targets[turn].astype(np.int8))) + 1):
            text = sample.decoded(tokenizer, ids[piece])
            text = elided(text.removesuffix("\n") if piece[-1] == turn[-1] else text)
            pieces.append(f"{left}{text}{right}" if targets[piece[0]] and text else text)
        told.append("".join(pieces))
    return told


def elided(text: str) -> str:
    text = printable(text)
    if len(text) <= 2 * WIDTH:
        return text
    return f"{text[:WIDTH]} … {len(text) - 2 * WIDTH:,} characters … {text[-WIDTH:]}"


def printable(text: str) -> str:
    """In one line, of signs that a terminal shows: what it would obey is spelt out."""
    return spelt_out(text.replace("\r", "␍").replace("\n", "⏎"))


def shown(part: PackedRows, item: int, tokenizer) -> str:
    """A conversation in one line, for a finding: its first turns behind the system line."""
    turns = lines(part, item, tokenizer, colour=False)
    text = " ".join(turns[1:] if len(turns) > 2 and "<|im_start|>system" in turns[0] else turns)
    return text[:260] + (" …" if len(text) > 260 else "")
