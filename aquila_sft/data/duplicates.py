"""Documents that are copies of an earlier one, or nearly: found on disk, in memory that does not grow with them.

    text -> 5-grams of units -> MinHash, PERMUTATIONS minima -> BANDS keys, a hash of ROWS minima each
    slice of documents -> KeyWriter -> files: the keys of the texts and of every band, sorted; the signatures
    band, range of keys -> search: of all slices, what has one key stands together -> documents with an earlier one

Two documents whose sets of 5-grams overlap by s (Jaccard) share a band's key with probability s**ROWS, and at least
one of all bands' with 1 - (1 - s**ROWS)**BANDS: 99.99 % at 0.8, 98.8 % at 0.7, 53 % at 0.5. What meets in a band is
compared by its whole signature, so that a chance meeting costs a look and no document. The signature estimates s with
a standard deviation of sqrt(s (1 - s) / PERMUTATIONS), 0.042 at 0.7.

A document is left out when an earlier one in the order of the input is like it: a local rule, which needs no clusters
in memory and does not depend on who finds what first. Of a key's documents each is compared with the first and the
previous.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aquila_sft.data.mixture import scrambled
from aquila_sft.data.units import ngram_hashes

SHINGLE = 5  # units
BANDS, ROWS = 24, 5
PERMUTATIONS = BANDS * ROWS
SEED = 1  # of the MinHash library's hash functions
EXACT = 0  # the first row of keys: the hash of the whole text; the bands follow
RECORDS = 2**22  # keys that are in memory at once, 16 bytes each
PAIRS = 2**14  # pairs that are compared at once, a kilobyte each
GROUP = 64  # slices whose copies lie in one file: a slice that looked through all ranges would open thousands
ROW_BITS = 32  # a document's number is its slice, then its row in it

KEY = np.dtype([("key", "<u8"), ("document", "<u8")])


def shingles(text: str, units: np.ndarray) -> np.ndarray:
    """The hashes of all 5-grams; of a text with fewer units, of the whole."""
    return ngram_hashes(units, min(SHINGLE, len(units))) if len(units) else np.array([exact_key(text)], dtype=np.uint64)


def exact_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def signatures(texts: list[str], units: list[np.ndarray]) -> np.ndarray:
    """uint32 [texts, PERMUTATIONS]; units: what unit_hashes gives for the texts."""
    from rensa import RMinHash

    grams = [shingles(text, of) for text, of in zip(texts, units, strict=True)]
    edges = np.cumsum([0, *map(len, grams)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(grams), edges, PERMUTATIONS, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), PERMUTATIONS)


def band_keys(of: np.ndarray) -> np.ndarray:
    """uint64 [BANDS, documents] of signatures."""
    keys = np.zeros((len(of), BANDS), dtype=np.uint64)
    for row in range(ROWS):
        keys = scrambled(keys + of.reshape(len(of), BANDS, ROWS)[:, :, row] + np.uint64(row + 1))
    return keys.T


class KeyWriter:
    """The keys and signatures of one slice's documents, as they come."""

    def __init__(self, folder: Path, *, near: bool) -> None:
        self.folder, self.near = folder, near
        self.keys: list[np.ndarray] = []
        self.signatures = open(folder / "signatures.bin", "wb")

    def add(self, texts: list[str], units: list[np.ndarray]) -> None:
        self.add_keys([exact_key(text) for text in texts], signatures(texts, units) if self.near else None)

    def add_keys(self, exact: list[int], of: np.ndarray | None) -> None:
        """of: signatures, where near copies are looked for."""
        keys = np.array([exact], dtype=np.uint64)
        if self.near:
            keys = np.concatenate([keys, band_keys(of)])
            self.signatures.write(of.tobytes())
        self.keys.append(keys)

    def finish(self) -> None:
        self.signatures.close()
        keys = np.concatenate(self.keys, axis=1) if self.keys else np.empty((1 + BANDS * self.near, 0), np.uint64)
        order = np.argsort(keys, axis=1, kind="stable")
        np.save(self.folder / "keys.npy", np.take_along_axis(keys, order, axis=1))
        np.save(self.folder / "rows.npy", order.astype(np.uint32))


def search(slices: list[Path], band: int, first: int, last: int, threshold: float | None) -> np.ndarray:
    """Numbers of the documents with an earlier one like it among those whose key of `band` is in first … last.

    `slices`: the folders of KeyWriter, in the order of the input. uint64, sorted. threshold None: equal keys suffice.
    """
    found = [np.empty(0, dtype=np.uint64)]
    like = None if threshold is None else (lambda a, b: similar(slices, a, b, threshold))
    for records in gathered(slices, band, first, last):
        for later, earlier in pairs(records):
            for start in range(0, len(later), PAIRS):
                a, b = later[start : start + PAIRS], earlier[start : start + PAIRS]
                found.append(a if like is None else a[like(a, b)])
    return np.unique(np.concatenate(found))


def gathered(slices: list[Path], band: int, first: int, last: int) -> Iterator[np.ndarray]:
    """KEY records, a few million at a time, all of one key together, but for a key that alone has more than that."""
    places = [edges(folder, band, first, last) for folder in slices]
    total = sum(end - start for start, end in places)
    if total > RECORDS and first < last:
        number = max(range(len(slices)), key=lambda i: places[i][1] - places[i][0])
        middle = int(np.load(slices[number] / "keys.npy", mmap_mode="r")[band, sum(places[number]) // 2])
        for low, high in ((first, middle - 1), (middle, middle), (middle + 1, last)):
            if low <= high:
                yield from gathered(slices, band, low, high)
        return
    batch, size, leader = [], 0, None
    for number, (folder, (start, end)) in enumerate(zip(slices, places, strict=True)):
        for at in range(start, end, RECORDS):
            records = read_keys(folder, band, number, at, min(end, at + RECORDS))
            batch.append(records)
            size += len(records)
            if size >= RECORDS and first == last:  # one key with very many documents: its first goes on before the next
                leader = batch[0][:1] if leader is None else leader
                yield np.concatenate(batch)
                batch, size = [leader, records[-1:]], 2
    if size:
        records = np.concatenate(batch)
        batch.clear()  # and so once in memory, sorted, while they are looked through
        records = records[np.argsort(records["key"], kind="stable")]  # slices came in order: documents stay in theirs
        yield records


def edges(folder: Path, band: int, first: int, last: int) -> tuple[int, int]:
    keys = np.load(folder / "keys.npy", mmap_mode="r")[band]
    low, high = np.array([first, last], dtype=np.uint64)
    return int(np.searchsorted(keys, low)), int(np.searchsorted(keys, high, side="right"))


def read_keys(folder: Path, band: int, number: int, start: int, end: int) -> np.ndarray:
    records = np.empty(end - start, dtype=KEY)
    records["key"] = np.load(folder / "keys.npy", mmap_mode="r")[band, start:end]
    rows = np.load(folder / "rows.npy", mmap_mode="r")[band, start:end]
    records["document"] = rows.astype(np.uint64) | np.uint64(number << ROW_BITS)
    return records


def pairs(records: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(later, earlier) documents: each with the first of its key, and with the previous where that is another one."""
    keys, documents = records["key"], records["document"]
    follows = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    if not len(follows):
        return
    begins = np.concatenate([[True], keys[1:] != keys[:-1]])
    firsts = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))[follows]
    yield documents[follows], documents[firsts]
    others = firsts != follows - 1
    yield documents[follows[others]], documents[follows[others] - 1]


def similar(slices: list[Path], a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the signatures of a[i] and b[i] agree in at least this share; bool."""
    numbers, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    of = np.empty((len(numbers), PERMUTATIONS), dtype=np.uint32)
    size = of.itemsize * PERMUTATIONS
    slice_of = (numbers >> np.uint64(ROW_BITS)).astype(np.int64)
    rows = (numbers & np.uint64(2**ROW_BITS - 1)).astype(np.int64)
    for number in np.unique(slice_of):
        with open(slices[number] / "signatures.bin", "rb") as file:
            for i in np.flatnonzero(slice_of == number):
                of[i] = np.frombuffer(os.pread(file.fileno(), size, int(rows[i]) * size), dtype=np.uint32)
    return (of[places[: len(a)]] == of[places[len(a) :]]).mean(axis=1) >= threshold


def ranges(documents: int) -> list[tuple[int, int]]:
    """All keys in ranges of about RECORDS documents each."""
    count = max(1, -(-documents // RECORDS))
    limits = [(2**64 * i) // count for i in range(count + 1)]
    return [(low, high - 1) for low, high in zip(limits, limits[1:], strict=False)]


# ---- as tasks: one for each range of a band's keys


def tasks(folders: list[Path], *, near: bool) -> list[str]:
    """'<band>-<first key>-<last key>.npy'; folders: those of KeyWriter, in the order of the input."""
    documents = sum(np.load(folder / "keys.npy", mmap_mode="r").shape[1] for folder in folders)
    return [
        f"{band:02d}-{first:016x}-{last:016x}.npy"
        for band in range(1 + BANDS * near)
        for first, last in ranges(documents)
    ]


def make(folders: list[Path], task: str, threshold: float | None, target: Path) -> None:
    band, first, last = task.removesuffix(".npy").split("-")
    like = None if int(band) == EXACT else threshold
    found = search(folders, int(band), int(first, 16), int(last, 16), like)
    with open(target, "wb") as file:
        np.save(file, found)


def group_tasks(slices: int) -> list[str]:
    return [f"{first:06d}.npz" for first in range(0, slices, GROUP)]


def gather(matched: Path, task: str, target: Path) -> None:
    """equal, like: numbers of a group's documents with an earlier one such; matched: the folder of all tasks' files."""
    first = int(task.removesuffix(".npz"))
    nothing = np.empty(0, dtype=np.uint64)
    found = {"equal": [nothing], "like": [nothing]}
    for path in sorted(matched.glob("*.npy")):
        kind = "equal" if path.name.startswith(f"{EXACT:02d}-") else "like"
        found[kind].append(numbers_of(np.load(path, mmap_mode="r"), first, first + GROUP))
    with open(target, "wb") as file:
        np.savez(file, **{kind: np.unique(np.concatenate(numbers)) for kind, numbers in found.items()})


def numbers_of(numbers: np.ndarray, first: int, end: int) -> np.ndarray:
    """Of documents' numbers, ascending, those in slices first … end - 1."""
    edges = np.array([first, end], dtype=np.uint64) << np.uint64(ROW_BITS)
    return numbers[slice(*np.searchsorted(numbers, edges))]


def copies(gathered_in: Path, number: int, count: int) -> np.ndarray:
    """(equal to, like) an earlier document: bool [2, count] of slice `number`; gathered_in: the folder of gather()."""
    found, marks = np.load(gathered_in / f"{number // GROUP * GROUP:06d}.npz"), np.zeros((2, count), bool)
    for kind, mark in zip(("equal", "like"), marks, strict=True):
        mark[numbers_of(found[kind], number, number + 1) & np.uint64(2**ROW_BITS - 1)] = True
    return marks
