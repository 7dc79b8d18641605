r"""Every token of every prepared conversation: what is supervised against what ought to be, told from the ids.

    tokens, targets, offsets (memory-mapped) -> chunks of whole conversations -> Tally: conversations at fault, by kind

    <|im_start|> assistant \n  The answer . <|im_end|> \n
                               ^^^^^^^^^^^^^^^^^^^^^^^ expected targets: behind the header, up to and with the turn end

The marks cut a conversation into turns and the ids behind <|im_start|> say whose turn it is, so no text is decoded and
the work is a few passes of numpy over each chunk, in as many threads as there are cores (numpy lets go of the lock).
"""

import collections
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from aquila_sft.chat_template import ROLES, encode_messages, special_ids, turn_end_id

CHUNK = 2**20  # tokens, about: what a pass keeps in a core's cache

# What can be wrong with a conversation, in the words of a finding.
FAULTS = {
    "no-target": "no token of it is supervised: it trains nothing",
    "all-target": "every token of it is supervised, the questions too",
    "turn-end": "an answer's end is not supervised: a model trained on it does not stop",
    "answer-not-supervised": "tokens of an answer are not supervised",
    "not-the-answer": "tokens that are not the assistant's are supervised",
    "doubled-begin": "it begins twice: a begin token stands behind a begin token",
    "special-ids": "a content holds ids of special tokens, which end its turn or begin another",
    "broken-turns": "its ids are no sequence of turns <|im_start|>role … <|im_end|>, each answer behind a question",
    "unknown-ids": "it holds ids that the vocabulary does not have",
}
SUPERVISION = ("no-target", "all-target", "turn-end", "answer-not-supervised", "not-the-answer")


@dataclasses.dataclass(frozen=True)
class Marks:
    """The ids that a vocabulary spells the template with."""

    start: int
    end: int
    newline: list[int]  # behind a turn end
    headers: dict[str, list[int]]  # role -> "role\n"
    may_begin_answer: np.ndarray  # bool [V]: entries that begin with the header's newline, and go on
    is_special: np.ndarray  # bool [V]
    begin: int | None  # of a text
    entries: int

    @classmethod
    def of(cls, tokenizer) -> "Marks":
        end, headers = turn_end_id(tokenizer), {}
        for role in ROLES:
            ids, _ = encode_messages(tokenizer, [{"role": role, "content": ""}], default_system=None)
            at = ids.index(end)
            headers[role] = ids[1:at]
        entries = len(tokenizer)
        special, begins = np.zeros(entries, dtype=bool), np.zeros(entries, dtype=bool)
        special[special_ids(tokenizer)] = True
        newline = tokenizer.convert_ids_to_tokens(headers["assistant"][-1])
        begins[[i for text, i in tokenizer.get_vocab().items() if text.startswith(newline)]] = True
        return cls(ids[0], end, ids[at + 1 :], headers, begins, special, tokenizer.bos_token_id, entries)


class Tally:
    """Conversations at fault: how many of each kind, and the first as (part, number)."""

    def __init__(self) -> None:
        self.counts: collections.Counter = collections.Counter()
        self.first: dict[str, tuple[str, int]] = {}

    def add(self, code: str, part: str, items: np.ndarray) -> None:
        if len(items := np.unique(items)):
            self.counts[code] += len(items)
            self.first[code] = min(self.first.get(code, (part, int(items[0]))), (part, int(items[0])))


@dataclasses.dataclass
class Looked:
    """One part, looked at: its size, a hash of every conversation, and those that a pattern of ids was found in."""

    conversations: int
    tokens: int
    hashes: np.ndarray  # uint64 [conversations]
    suspects: np.ndarray  # conversations that hold one of the patterns


def look(part: str, rows, marks: Marks, patterns: list[tuple[int, int]], tally: Tally, threads: int) -> Looked:
    """rows: PackedRows. patterns: pairs of ids, one behind the other, that are worth decoding (sample.py)."""
    offsets = np.asarray(rows.offsets)
    weights = weights_of(int(np.diff(offsets).max(initial=0)))

    def look_at(span: tuple[int, int]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        first, last = span
        begin, end = int(offsets[first]), int(offsets[last])
        tokens, targets = np.asarray(rows.tokens[begin:end]), np.asarray(rows.targets[begin:end])
        chunk = Chunk(tokens, targets, offsets[first : last + 1] - begin, marks)
        return (
            {code: items + first for code, items in chunk.faults().items()},
            chunk.hashes(weights),
            chunk.holding(patterns) + first,
        )

    hashes, suspects = [], []
    with ThreadPoolExecutor(threads) as pool:
        for faults, of_chunk, found in pool.map(look_at, chunks(offsets)):
            for code, items in faults.items():
                tally.add(code, part, items)
            hashes.append(of_chunk)
            suspects.append(found)
    together = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
    return Looked(len(offsets) - 1, int(offsets[-1]), together, np.concatenate([np.empty(0, dtype=int), *suspects]))


def chunks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Spans of whole conversations, of about CHUNK tokens; one longer than that is a chunk of its own."""
    first, total = 0, len(offsets) - 1
    while first < total:
        last = int(np.searchsorted(offsets, offsets[first] + CHUNK, "right")) - 1
        last = min(max(last, first + 1), total)
        yield first, last
        first = last


def weights_of(length: int) -> np.ndarray:
    """Random odd numbers, one a place: a conversation's hash is the sum of (id + 1) x that of its place, mod 2^64."""
    return np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, length, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)


def hash_of(ids: list[int], weights: np.ndarray) -> int | None:
    """None: longer than any that was prepared."""
    if len(ids) > len(weights):
        return None
    return int(((np.asarray(ids, dtype=np.uint64) + np.uint64(1)) * weights[: len(ids)]).sum())


class Chunk:
    """Whole conversations, flat: tokens and targets [N], starts of the conversations and N."""

    def __init__(self, tokens: np.ndarray, targets: np.ndarray, bounds: np.ndarray, marks: Marks) -> None:
        self.tokens, self.targets, self.bounds, self.marks = tokens, targets, bounds, marks
        self.starts = bounds[:-1]

    def items(self, places: np.ndarray) -> np.ndarray:
        """The conversations that places lie in."""
        return np.searchsorted(self.starts, places, "right") - 1

    def hashes(self, weights: np.ndarray) -> np.ndarray:
        place = np.arange(len(self.tokens)) - np.repeat(self.starts, np.diff(self.bounds))
        return np.add.reduceat((self.tokens + np.uint64(1)) * weights[place], self.starts)

    def holding(self, patterns: list[tuple[int, int]]) -> np.ndarray:
        found = [np.empty(0, dtype=int)]
        for first, second in patterns:
            at = np.flatnonzero(self.tokens == first)
            at = at[at + 1 < len(self.tokens)]
            found.append(at[self.tokens[at + 1] == second])
        return np.unique(self.items(np.concatenate(found)))

    def faults(self) -> dict[str, np.ndarray]:
        """Conversations at fault, by kind. What is no sequence of turns is not judged any further."""
        tokens, targets, marks = self.tokens, self.targets, self.marks
        faults: dict[str, np.ndarray] = {}
        unknown = np.flatnonzero(tokens >= marks.entries)
        faults["unknown-ids"] = self.items(unknown)
        known = np.where(tokens < marks.entries, tokens, marks.newline[0]) if len(unknown) else tokens

        counts = np.add.reduceat(targets, self.starts, dtype=np.int64)
        faults["no-target"] = np.flatnonzero(counts == 0)
        faults["all-target"] = np.flatnonzero(counts >= np.diff(self.bounds) - 1)  # the first token is never a label

        special = np.flatnonzero(marks.is_special[known])
        is_mark = (tokens[special] == marks.start) | (tokens[special] == marks.end)
        begins = special[tokens[special] == marks.begin] if marks.begin is not None else special[:0]
        repeated = begins[1:][self.items(begins[1:]) == self.items(begins[:-1])]
        at = special[is_mark]
        opens, of = tokens[at] == marks.start, self.items(at)
        again = opens[1:] & opens[:-1] & (at[1:] == at[:-1] + 1) & (of[1:] == of[:-1])
        faults["doubled-begin"] = np.union1d(self.items(repeated), of[1:][again])

        # <|im_start|> and <|im_end|> in turn, from the first token to what stands behind the last turn end
        same = of[1:] == of[:-1]
        is_last = np.append(~same, True)[: len(of)]
        out_of_turn = np.zeros(len(self.starts), dtype=bool)
        out_of_turn[of[1:][same & (opens[1:] == opens[:-1])]] = True
        broken = np.zeros(len(self.starts), dtype=bool)
        broken[tokens[self.starts] != marks.start] = True
        broken[of[is_last & opens]] = True
        in_content = out_of_turn.copy()
        in_content[self.items(special[~is_mark])] = True
        in_content[faults["doubled-begin"]] = False
        faults["special-ids"] = np.flatnonzero(in_content)

        sound = ~(broken | out_of_turn)[of]
        first, last = at[sound & opens], at[sound & ~opens]  # of each turn: its marks
        of = of[sound & opens]
        is_last = np.append(of[1:] != of[:-1], True)[: len(of)]
        following = np.where(is_last, self.bounds[of + 1], np.append(first[1:], 0)[: len(of)])
        right = following - last == 1 + len(marks.newline)
        for n, token in enumerate(marks.newline, 1):
            right &= tokens[np.minimum(last + n, len(tokens) - 1)] == token
        is_answer, is_question, header = self.roles(first, last)
        broken[of[~right | (header == 0)]] = True
        asked = np.append(False, is_question[:-1] & (of[1:] == of[:-1]))[: len(of)]
        broken[of[is_answer & ~asked]] = True
        faults["broken-turns"] = np.flatnonzero(broken)

        first, last, header = (x[is_answer & ~broken[of]] for x in (first, last, header))
        change = np.zeros(len(tokens) + 1, dtype=np.int8)
        change[first + 1 + header] += 1  # an answer is empty at the least: its end stands there
        change[last + 1] -= 1
        expected = np.cumsum(change[:-1], dtype=np.int8).view(bool)
        faults["turn-end"] = self.items(last[~targets[last]])
        wrong = np.flatnonzero(expected != targets)
        wrong = wrong[~(broken | out_of_turn)[self.items(wrong)]]
        missing = wrong[expected[wrong]]
        faults["answer-not-supervised"] = self.items(missing[tokens[missing] != marks.end])
        faults["not-the-answer"] = self.items(wrong[~expected[wrong]])
        return faults

    def roles(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each turn: is it the assistant's, is it the user's, how many ids name its role; 0 where none does."""
        tokens, marks = self.tokens, self.marks
        of_role, header = {}, np.zeros(len(first), dtype=np.int64)
        for role, ids in marks.headers.items():
            named = first + len(ids) <= last
            for n, token in enumerate(ids[:-1], 1):
                named &= tokens[np.minimum(first + n, len(tokens) - 1)] == token
            behind = tokens[np.minimum(first + len(ids), len(tokens) - 1)]
            whole = named & (behind == ids[-1]) & (first + len(ids) < last)
            # A content that begins with line ends shares a token with the header's own: "\n\n" is one, and is learnt.
            shared = named & (behind != ids[-1]) & (behind < marks.entries)
            shared[shared] = marks.may_begin_answer[behind[shared]]
            header = np.where(whole, len(ids), np.where(shared, len(ids) - 1, header))
            of_role[role] = whole | shared
        return of_role["assistant"], of_role["user"], header
