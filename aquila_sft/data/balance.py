"""Which parts of a text are used when its languages are to have equal shares.

    documents -> survey -> {language: Shelf} -> choose -> {language: Drawn}, a range of hashes

Parts of documents are drawn by a hash of their content: the same text gives the same choice whatever its files are
called and in whatever order they are read. Chinese and English get equal numbers of bytes: the smaller one is used
whole, of the larger one (and of `other`) as much as that. Nothing is repeated. A language with less than MINORITY of
the other's bytes is by-catch, against which nothing is balanced. The parts with the smallest hashes are held back, for
measuring.
"""

import hashlib
import heapq
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from aquila_sft.data.documents import Document

PART_CHARACTERS = 2**15  # longer documents are drawn in parts
HELD_BACK_SHARE = 0.02  # of each language's parts,
HELD_BACK_BYTES = 1_000_000  # and at most
KEPT_BYTES = 4_000_000  # of each language's text, kept as a sample of what is drawn
MINORITY = 0.05
HASHES = 2**64


class Shelf:
    """What is known of one language: hash and size of every part, and the text of those with the smallest hashes."""

    def __init__(self) -> None:
        self.hashes, self.sizes = array("Q"), array("Q")
        self.front: list[tuple[int, bytes]] = []  # a heap, the largest hash on top
        self.front_bytes = 0

    def add(self, text: str) -> None:
        encoded = text.encode()
        key = content_hash(encoded)
        self.hashes.append(key)
        self.sizes.append(len(encoded))
        heapq.heappush(self.front, (-key, encoded))
        self.front_bytes += len(encoded)
        while self.front_bytes - len(self.front[0][1]) >= HELD_BACK_BYTES + KEPT_BYTES:
            self.front_bytes -= len(heapq.heappop(self.front)[1])

    def texts(self, low: int, high: int, most_bytes: float) -> list[str]:
        """Parts with a hash in [low, high), smallest first, until there are `most_bytes`; KEPT_BYTES at least."""
        texts, num_bytes = [], 0
        for key, text in sorted((-negative, text) for negative, text in self.front):
            if low <= key < high and num_bytes < most_bytes:
                texts.append(text.decode())
                num_bytes += len(text)
        return texts

    def in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes, ascending, and the bytes up to and with each of them."""
        hashes = np.frombuffer(self.hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], np.cumsum(np.frombuffer(self.sizes, np.uint64)[order].astype(np.int64))


@dataclass(frozen=True)
class Drawn:
    """Of one language: parts with a hash below `held_below` are held back, the others below `used_below` are used."""

    held_below: int
    used_below: int
    held_bytes: int
    used_bytes: int
    all_bytes: int


def survey(documents: Iterable[Document]) -> dict[str, Shelf]:
    shelves: dict[str, Shelf] = {}
    for document in documents:
        shelf = shelves.setdefault(document.language, Shelf())
        for part in parts_of(document.text):
            shelf.add(part)
    return dict(sorted(shelves.items()))


def choose(shelves: dict[str, Shelf], max_bytes: int | None) -> dict[str, Drawn]:
    """Equal bytes of zh and en, no more of `other`, and `max_bytes` in all; at least one part of each."""
    sorted_of = {language: shelf.in_order() for language, shelf in shelves.items()}
    held = {language: hold_back(*arrays) for language, arrays in sorted_of.items()}
    most = {language: int(sums[-1]) - held[language][1] for language, (_, sums) in sorted_of.items()}
    level = max(most.values())
    if {"zh", "en"} <= most.keys():
        small, large = sorted((most["zh"], most["en"]))
        level = small if small >= MINORITY * large else large
    if max_bytes is not None:
        level = min(level, level_within([min(n, level) for n in most.values()], max_bytes))
    return {language: draw(*arrays, *held[language], level) for language, arrays in sorted_of.items()}


def hold_back(hashes: np.ndarray, sums: np.ndarray) -> tuple[int, int]:
    """The hash below which parts are held back, and their bytes; a language of very few parts keeps them all."""
    count = int(np.searchsorted(hashes, np.uint64(HELD_BACK_SHARE * HASHES)))
    count = min(count, int(np.searchsorted(sums, HELD_BACK_BYTES, side="right")))
    count = int(np.searchsorted(hashes, hashes[count])) if count < len(hashes) else 0  # equal parts stay together
    return (int(hashes[count - 1]) + 1, int(sums[count - 1])) if count else (0, 0)


def draw(hashes: np.ndarray, sums: np.ndarray, held_below: int, held_bytes: int, level: int) -> Drawn:
    count = int(np.searchsorted(sums, held_bytes + level, side="right"))
    first = int(np.searchsorted(hashes, np.uint64(held_below)))
    if count < len(hashes):
        count = int(np.searchsorted(hashes, hashes[count]))  # equal parts stay together
    if count <= first:
        count = int(np.searchsorted(hashes, hashes[first], side="right"))
    used_below = int(hashes[count]) if count < len(hashes) else HASHES
    return Drawn(held_below, used_below, held_bytes, int(sums[count - 1]) - held_bytes, int(sums[-1]))


def level_within(sizes: list[int], total: int) -> int:
    """The largest level at which the sizes, each cut to it, add up to `total` at most."""
    for place, size in enumerate(sorted(sizes)):
        left = len(sizes) - place
        if size * left >= total:
            return total // left
        total -= size
    return max(sizes)


def content_hash(encoded: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


def parts_of(text: str) -> Iterator[str]:
    """A text cut into parts of at most PART_CHARACTERS, behind a newline that no blank follows if there is one.

    The published pre-tokenizer begins a new piece there anyway.
    """
    start = 0
    while len(text) - start > PART_CHARACTERS:
        end = text.rfind("\n", start, start + PART_CHARACTERS) + 1
        while end > start and text[end].isspace():
            end = text.rfind("\n", start, end - 1) + 1
        end = end if end > start else start + PART_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
