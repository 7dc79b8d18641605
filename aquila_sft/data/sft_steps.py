"""How records become packed rows: steps of tasks, as tasks.py has them.

    index     benchmark items -> their n-grams                                                      one task
    read      slice -> of what the rules of hygiene.py let pass: benchmark items, keys, signatures  a task a slice
    match     range of keys of a band, of all slices -> conversations with an earlier one like them a task a range
    copies    of all ranges -> the same for each slice                             a task for every 64 slices
    tokenize  slice -> ids and targets of what stays; ledger and quarantine                         a task a slice
    rows      all slices -> train/ and held-back/<language>/, packed; one ledger, one quarantine    one task

Each step is left out where nothing asks for it. The text itself is never copied: `tokenize` reads the slice again, and
the rules, which are pure, say the same again. In memory is a batch of conversations, or the sizes of one slice's.
"""

import contextlib
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from aquila_sft.config.data import ConversationPolicy, DamagedBlocks, Detector, Fault
from aquila_sft.data import conversations, duplicates, packing, quarantine, sources
from aquila_sft.data.conversations import CALL, RESULT, Conversation
from aquila_sft.data.hygiene import Messages, Verdict, judge, said_by
from aquila_sft.data.index_step import INDEX, index_of
from aquila_sft.data.ledger import Ledger
from aquila_sft.data.slices import Slice
from aquila_sft.data.tasks import Step, of_slices, slice_tasks, write_json
from aquila_sft.data.units import unit_hashes

BATCH = 512  # conversations tokenized together
COPIED = 2**22  # tokens in memory while a part is put together

Encoder = Callable[[list[Messages]], list[tuple[list[int], list[bool]]]]
Found = tuple[str, object, Verdict]  # where it stood, the record (what was read, where it is none), what became of it

# What is known of a conversation beside its ids; number: the first 64 bits of its sha256; group: its place in
# groups.json, [[language, source], …].
ITEM = np.dtype([("tokens", "<u4"), ("answer_tokens", "<u4"), ("bytes", "<u8"), ("number", "<u8"), ("group", "<u4")])

AS_IT_IS = ConversationPolicy(
    **dict.fromkeys(
        ("system_tags", "control_characters", "html", "markers", "placeholders", "identity", "disclaimers"), Fault.keep
    ),
    tools=Fault.leave_out,
    last_turn=Fault.mend,
    too_long=Fault.mend,
    duplicates=Fault.keep,
    detector=Detector.script,
)


@dataclasses.dataclass(frozen=True)
class RowPolicy:
    """What the rows depend on besides data and tokenizer."""

    max_length: int
    holdout_fraction: float
    holdout_max: int
    pack_window: int
    seed: int
    packing: bool = True
    clean: ConversationPolicy = dataclasses.field(default_factory=lambda: AS_IT_IS)
    unreadable: DamagedBlocks = DamagedBlocks.stop
    decontaminate: str | None = None
    ngram_words: int = 13
    ngram_characters: int = 13

    @property
    def looks_for_copies(self) -> bool:
        return self.clean.duplicates is not Fault.keep


@dataclasses.dataclass(frozen=True)
class Work:
    """What every task is given: where it works, on what, and how."""

    folder: Path
    slices: tuple[Slice, ...]
    policy: RowPolicy
    encode: Encoder  # to be pickled, where there is more than one process
    is_durable: bool = True
    first: int | None = None  # records of a slice that are looked at; None: all

    def judged(self, task: str) -> Iterator[Found]:
        return itertools.islice(judged(self.slices[int(task)], self.policy), self.first)

    settings = "data"

    @property
    def steps(self) -> tuple[Step, ...]:
        return STEPS


# ---- records


def judged(piece_of: Slice, policy: RowPolicy) -> Iterator[Found]:
    """Every record of a slice, and what the rules say."""
    for piece in piece_of.pieces:
        file = Path(piece.file)
        name = f"{file.parent.name}/{file.name}"
        broken: list[object] = []
        read = sources.read(file, None, piece.begin, piece.end, piece.first, broken.append)
        try:
            for where, record in read:
                if record is not None:
                    yield where, record, judge(record, name, policy.clean)
                else:
                    what = broken.pop()
                    what = quarantine.text_of(what) if isinstance(what, bytes) else what
                    yield where, what, Verdict([], "unknown", name, [], "not a JSON object")
        except sources.Unreadable as error:
            if policy.unreadable is DamagedBlocks.stop:
                raise
            yield error.where or str(file), str(error), Verdict([], "unknown", name, [], "file that cannot be read")


def marked(found: Iterable[Found], reason_of: Callable[[int, Verdict], str | None]) -> Iterator[Found]:
    """With a reason for what passed the rules and is left out all the same; reason_of(its number among those, it)."""
    numbers = itertools.count()
    for where, record, verdict in found:
        if verdict.reason is None and (reason := reason_of(next(numbers), verdict)):
            verdict = dataclasses.replace(verdict, reason=reason)
        yield where, record, verdict


TOO_LONG = "longer than a row"
COPY, NEAR_COPY = "copy of an earlier conversation", "nearly a copy of an earlier conversation"


# ---- read, match


def read_tasks(work: Work) -> list[str]:
    return slice_tasks(work) if work.policy.looks_for_copies or work.policy.decontaminate else []


def make_read(work: Work, task: str, folder: Path) -> None:
    """keys.npy, rows.npy, signatures.bin of what passes the rules; benchmarks.json: which of it holds an item."""
    folder.mkdir()
    index = index_of(work)
    keys = duplicates.KeyWriter(folder, near=work.policy.clean.near_duplicates is not None)
    passed = (verdict.messages for _, _, verdict in work.judged(task) if not verdict.reason)
    benchmarks = {}
    number = 0
    while batch := list(itertools.islice(passed, BATCH)):
        exact = [int(conversations.sha256(messages)[:16], 16) for messages in batch]
        keys.add_keys(exact, signatures(batch) if keys.near else None)
        for messages in batch if index else ():
            if benchmark := index(unit_hashes("\n".join(m["content"] for m in messages))):
                benchmarks[number] = benchmark
            number += 1
    keys.finish()
    write_json(folder / "benchmarks.json", benchmarks)


def signatures(batch: list[Messages]) -> np.ndarray:
    """Half of each signature is of what is asked, half of what is answered.

    Many questions about one text share most of their words, and so do answers to one question in two wordings:
    conversations that are alike are alike in both.
    """
    of = []
    for role in ("user", "assistant"):
        texts = ["\n".join(said_by(messages, role)) for messages in batch]
        of.append(duplicates.signatures(texts, [unit_hashes(text) for text in texts]))
    half = duplicates.BANDS // 2 * duplicates.ROWS
    return np.concatenate([of[0][:, :half], of[1][:, half:]], axis=1)


def match_tasks(work: Work) -> list[str]:
    if not work.policy.looks_for_copies:
        return []
    return duplicates.tasks(of_slices(work, "read"), near=work.policy.clean.near_duplicates is not None)


def make_match(work: Work, task: str, target: Path) -> None:
    duplicates.make(of_slices(work, "read"), task, work.policy.clean.near_duplicates, target)


def copies_tasks(work: Work) -> list[str]:
    return duplicates.group_tasks(len(work.slices)) if work.policy.looks_for_copies else []


def make_copies(work: Work, task: str, target: Path) -> None:
    duplicates.gather(work.folder / "match", task, target)


def reasons_of(work: Work, task: str) -> Callable[[int, Verdict], str | None]:
    """Why what passed the rules is left out all the same, as the steps before found it."""
    benchmarks = json.loads((work.folder / "read" / task / "benchmarks.json").read_text()) if read_tasks(work) else {}
    equal = like = np.zeros(0, dtype=bool)
    if work.policy.looks_for_copies:
        count = np.load(work.folder / "read" / task / "keys.npy", mmap_mode="r").shape[1]
        equal, like = duplicates.copies(work.folder / "copies", int(task), count)

    def reason(number: int, verdict: Verdict) -> str | None:
        if benchmark := benchmarks.get(str(number)):
            return f"item of {benchmark}"
        if number >= len(equal) or not (equal[number] or like[number]):
            return None
        return COPY if equal[number] else NEAR_COPY

    return reason


# ---- tokenize


def make_tokenize(work: Work, task: str, folder: Path) -> None:
    """tokens.bin, targets.bin, items.npy, groups.json of what stays; ledger.json, quarantine.jsonl.zst of a slice."""
    folder.mkdir()
    ledger = Ledger()
    groups: dict[tuple[str, str], int] = {}
    items = []
    found = marked(work.judged(task), reasons_of(work, task))
    with (
        quarantine.Writer(folder / quarantine.FILE) as left_out,
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "targets.bin", "wb") as targets,
    ):
        for conversation, _, ids, is_target in tokenized(found, work.encode, work.policy, ledger, left_out.add):
            np.asarray(ids, dtype=np.uint32).tofile(tokens)
            np.asarray(is_target, dtype=bool).tofile(targets)
            group = groups.setdefault((conversation.language, conversation.source), len(groups))
            number = int(conversation.sha256()[:16], 16)
            items.append((len(ids), sum(is_target), conversations.answer_bytes(conversation.messages), number, group))
    np.save(folder / "items.npy", np.array(items, dtype=ITEM))
    write_json(folder / "groups.json", list(groups))
    write_json(folder / "ledger.json", ledger.state())


def tokenized(
    found: Iterable[Found],
    encode: Encoder,
    policy: RowPolicy,
    ledger: Ledger,
    left_out: Callable[[str, str, Verdict, object], None] = lambda *about: None,
) -> Iterator[tuple[Conversation, str, list[int], list[bool]]]:
    """What stays, its place, ids and targets. The rest is counted in the ledger and handed to `left_out`."""
    found = iter(found)
    while batch := list(itertools.islice(found, BATCH)):
        encoded = encode([countable(record, verdict) for _, record, verdict in batch])
        for (where, record, verdict), (ids, is_target) in zip(batch, encoded, strict=True):
            ledger.read += 1
            reason, about = verdict.reason, {"tokens": len(ids), "answer_tokens": sum(is_target)}
            if reason is None:
                whole = Conversation(verdict.messages, verdict.language, verdict.source)
                kept = whole, ids, is_target
                if len(ids) > policy.max_length:
                    kept = fitted(whole, encode, policy.max_length) if policy.clean.too_long is Fault.mend else None
                if not kept:
                    reason = TOO_LONG
                    ledger.lose(verdict.language, verdict.source, about["answer_tokens"])
            if reason is not None:
                ledger.refuse(reason, verdict.language, verdict.source, where, **about)
                left_out(reason, where, verdict, record)
                continue
            for what in verdict.mended:
                ledger.mend(what, verdict.language, where)
            if kept[0] is not whole:
                exchanges = (len(whole.messages) - len(kept[0].messages)) // 2
                ledger.shorten(whole.language, whole.source, exchanges, sum(is_target) - sum(kept[2]))
            conversation, kept_ids, kept_targets = kept
            yield conversation, where, kept_ids, kept_targets


def countable(record: object, verdict: Verdict) -> Messages:
    """Messages that can be rendered, so that what is left out is counted in tokens, too."""
    text = conversations.any_text(record).encode("utf-8", "replace").decode()
    messages = verdict.messages or [{"role": "user", "content": text}]
    told = {CALL: "assistant", RESULT: "user", "system": "user"}
    rest = [m | {"role": told.get(m["role"], m["role"])} for m in messages[1:]]
    first = messages[0]["role"]
    return [messages[0] | {"role": first if first == "system" else told.get(first, first)}, *rest]


def fitted(
    conversation: Conversation, encode: Encoder, max_length: int
) -> tuple[Conversation, list[int], list[bool]] | None:
    """The conversation without as many of its oldest exchanges as it takes to fit; None when the last one does not.

    An answer is whole or absent, never cut. How many to drop is found by bisection: a row-long tail of a
    330-message conversation costs eight encodings, not 150.
    """
    shorter = [conversation.messages]
    while (rest := conversations.without_leading_exchange(shorter[-1])) is not None:
        shorter.append(rest)
    low, high, best = 1, len(shorter) - 1, None
    while low <= high:
        middle = (low + high) // 2
        ids, is_target = encode([shorter[middle]])[0]
        if len(ids) <= max_length:
            best, high = (dataclasses.replace(conversation, messages=shorter[middle]), ids, is_target), middle - 1
        else:
            low = middle + 1
    return best


# ---- rows


def rows_tasks(work: Work) -> list[str]:
    return ["set"]


def make_rows(work: Work, task: str, folder: Path) -> None:
    """The prepared set: the parts, each with its rows, ledger.json and the quarantine of all slices."""
    folder.mkdir()
    ledger = Ledger()
    held_back: Counter = Counter()
    with contextlib.ExitStack() as stack:
        parts: dict[str, PartWriter] = {}
        left_out = stack.enter_context(open(folder / quarantine.FILE, "wb"))
        for made in of_slices(work, "tokenize"):
            ledger.merge(json.loads((made / "ledger.json").read_text("utf-8")))
            left_out.write((made / quarantine.FILE).read_bytes())  # compressed streams may follow one another
            items = np.load(made / "items.npy")
            groups = json.loads((made / "groups.json").read_text("utf-8"))
            languages = np.array([language for language, _ in groups])[items["group"]] if groups else np.empty(0, str)
            is_held = are_held_back(items["number"], languages, work.policy, held_back)
            for part in ("train", *(f"held-back/{language}" for language in sorted(set(languages[is_held].tolist())))):
                chosen = np.flatnonzero(~is_held if part == "train" else is_held & (languages == part[10:]))
                if len(chosen):
                    if part not in parts:
                        parts[part] = stack.enter_context(PartWriter(folder / part))
                    parts[part].add_chosen(made, items, chosen)
            for (number, held), counts in group_counts(items, is_held).items():
                language, source = groups[number]
                ledger.keep(language, source, counts[1], counts[2], records=counts[0], held_back=held)
    report = ledger.as_dict() | {"rows": {part: pack(folder / part, work.policy) for part in parts}}
    if index := index_of(work):
        report["decontaminated_against"] = index.figures
    else:
        report["decontaminated_against"] = "nothing: data.decontaminate is not set"
    write_json(folder / "ledger.json", report)


def are_held_back(numbers: np.ndarray, languages: np.ndarray, policy: RowPolicy, held_back: Counter) -> np.ndarray:
    """By the hashes of their contents, as long as their language has room; counted in `held_back`. bool."""
    hashed = numbers < np.uint64(min(int(policy.holdout_fraction * 2**64), 2**64 - 1))
    is_held = np.zeros(len(numbers), dtype=bool)
    for language in sorted(set(languages.tolist())):
        room = policy.holdout_max - held_back[language]
        chosen = np.flatnonzero(hashed & (languages == language))[: max(0, room)]
        is_held[chosen] = True
        held_back[language] += len(chosen)
    return is_held


def group_counts(items: np.ndarray, is_held: np.ndarray) -> dict[tuple[int, bool], tuple[int, int, int]]:
    """(group, held back) -> conversations, tokens, answer tokens."""
    counts = {}
    for number in np.unique(items["group"]).tolist():
        for held in (False, True):
            some = items[(items["group"] == number) & (is_held == held)]
            if len(some):
                counts[number, held] = len(some), int(some["tokens"].sum()), int(some["answer_tokens"].sum())
    return counts


class PartWriter:
    """Appends conversations to one part's flat files, those of rows.PackedRows."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.position = folder, 0

    def __enter__(self) -> "PartWriter":
        self.files = {
            name: open(self.folder / f"{name}.bin", "wb") for name in ("tokens", "targets", "offsets", "bytes")
        }
        self.files["offsets"].write(np.int64(0).tobytes())
        return self

    def __exit__(self, *_) -> None:
        for file in self.files.values():
            file.close()

    def add(self, ids: list[int], is_target: list[bool], answer_bytes: int) -> None:
        """One."""
        self.position += len(ids)
        self.write(ids, is_target, np.array([self.position]), np.array([answer_bytes]))

    def write(self, tokens, targets, offsets: np.ndarray | None = None, sizes: np.ndarray | None = None) -> None:
        self.files["tokens"].write(np.asarray(tokens, dtype=np.uint32).tobytes())
        self.files["targets"].write(np.asarray(targets, dtype=bool).tobytes())
        for name, values in (("offsets", offsets), ("bytes", sizes)):
            if values is not None:
                self.files[name].write(values.astype(np.int64).tobytes())

    def add_chosen(self, made: Path, items: np.ndarray, chosen: np.ndarray) -> None:
        """The chosen ones, ascending, of what make_tokenize left in `made`, a few at a time."""
        ends = np.cumsum(items["tokens"], dtype=np.int64)
        tokens = np.memmap(made / "tokens.bin", dtype=np.uint32, mode="r")
        targets = np.memmap(made / "targets.bin", dtype=bool, mode="r")
        is_chosen = np.zeros(len(items), dtype=bool)
        is_chosen[chosen] = True
        start = 0
        while start < len(items):
            begin = int(ends[start - 1]) if start else 0
            end = max(start + 1, int(np.searchsorted(ends, begin + COPIED, side="right")))
            here = np.repeat(is_chosen[start:end], items["tokens"][start:end])
            span = slice(begin, int(ends[end - 1]))
            self.write(tokens[span][here], targets[span][here])
            start = end
        offsets = self.position + np.cumsum(items["tokens"][chosen], dtype=np.int64)
        self.write([], [], offsets, items["bytes"][chosen])
        self.position = int(offsets[-1])


def pack(part: Path, policy: RowPolicy) -> dict:
    """row_sizes.bin and row_items.bin of a part, window by window; how many rows, and how full.

    What is held back is packed in any case: it makes no difference to its figures.
    """
    lengths = np.diff(np.fromfile(part / "offsets.bin", dtype=np.int64))
    count = 0
    if part.name == "train" and not policy.packing:
        np.ones(len(lengths), dtype=np.int64).tofile(part / "row_sizes.bin")
        np.arange(len(lengths), dtype=np.int64).tofile(part / "row_items.bin")
        return {"rows": len(lengths), "filled": round(float(lengths.mean()) / policy.max_length, 4)}
    with open(part / "row_sizes.bin", "wb") as sizes, open(part / "row_items.bin", "wb") as items:
        for rows in packing.windows(lengths, policy.max_length, window=policy.pack_window, seed=policy.seed):
            np.array([len(row) for row in rows], dtype=np.int64).tofile(sizes)
            np.array([item for row in rows for item in row], dtype=np.int64).tofile(items)
            count += len(rows)
    return {"rows": count, "filled": round(int(lengths.sum()) / (count * policy.max_length), 4)}


STEPS = (
    INDEX,
    Step("read", read_tasks, make_read),
    Step("match", match_tasks, make_match),
    Step("copies", copies_tasks, make_copies),
    Step("tokenize", slice_tasks, make_tokenize),
    Step("rows", rows_tasks, make_rows),
)
