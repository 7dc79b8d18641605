"""What a run was trained on, as a proof: rows by part and a hash over all of them, in a few hundred bytes.

    a row at its place -> blake2b of place, part, row, input ids and targets -> added up modulo 2^128

A sum does not care which process read a row, or when: every process adds up its own, and they exchange sums where a
checkpoint is made. So any number of processes, changed in mid-run too, ends with the hash of the same rows at the same
places, and the hash of the steps between two checkpoints is the difference of theirs. `recount` walks the order of a
run again, in one process and from its beginning: a row lost, read twice, at another place or with other tokens gives
another sum. It guards against mistakes and damage, not against someone who wants two sets of rows to agree.
"""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from aquila_sft.data import text_rows
from aquila_sft.data.mixture import MixtureOrder
from aquila_sft.data.rows import IGNORE
from aquila_sft.data.text_rows import TextRows

BITS, LIMB = 128, 16  # the sum, and the pieces in which processes exchange it: int64 adds 2^47 of them exactly
PLACES_AT_ONCE = 4096


@dataclasses.dataclass
class Consumed:
    """Rows, targets and damaged rows of every part, and the hash of all. Adding two adds what they stand for."""

    rows: np.ndarray  # int64 [parts]
    targets: np.ndarray  # int64 [parts]
    damaged: np.ndarray  # int64 [parts]; of the rows, those that were blank
    total: int = 0

    @classmethod
    def nothing(cls, parts: int) -> "Consumed":
        return cls(*np.zeros((3, parts), dtype=np.int64))

    @property
    def hash(self) -> str:
        return f"{self.total:0{BITS // 4}x}"

    def rows_of(self, parts: list[str]) -> dict[str, int]:
        return dict(zip(parts, self.rows.tolist(), strict=True))

    def add(self, other: "Consumed") -> None:
        self.rows, self.targets = self.rows + other.rows, self.targets + other.targets
        self.damaged = self.damaged + other.damaged
        self.total = (self.total + other.total) % 2**BITS

    def note(self, place: int, part: int, rows: TextRows, row: int, ids: np.ndarray, targets: np.ndarray) -> None:
        """One row of a part, as it goes into a batch."""
        digest = hashlib.blake2b(f"{place}/{rows.part.name}/{row}/".encode(), digest_size=BITS // 8)
        digest.update(ids.astype("<i4").tobytes())
        digest.update(targets.astype("<i4").tobytes())
        self.total = (self.total + int.from_bytes(digest.digest(), "little")) % 2**BITS
        self.rows[part] += 1
        self.targets[part] += int((targets != IGNORE).sum())
        self.damaged[part] += row in rows.damaged

    def vector(self) -> np.ndarray:
        """As int64 numbers that processes may add up."""
        limbs = [self.total >> at & (1 << LIMB) - 1 for at in range(0, BITS, LIMB)]
        return np.concatenate([np.array(limbs, dtype=np.int64), self.rows, self.targets, self.damaged])

    @classmethod
    def of_vector(cls, vector: np.ndarray) -> "Consumed":
        limbs, counts = vector[: BITS // LIMB], vector[BITS // LIMB :]
        total = sum(int(limb) << LIMB * i for i, limb in enumerate(limbs)) % 2**BITS
        return cls(*counts.reshape(3, -1).copy(), total)

    def state(self) -> dict:
        by_part = {name: getattr(self, name).tolist() for name in ("rows", "targets", "damaged")}
        return {"hash": self.hash} | by_part

    @classmethod
    def of_state(cls, state: dict) -> "Consumed":
        return cls(*(np.array(state[name]) for name in ("rows", "targets", "damaged")), int(state["hash"], 16))


def recount(
    order: MixtureOrder, parts: list[TextRows], ranges: Iterable[tuple[int, int]], length: int, pad_id: int
) -> Consumed:
    """What the places of `ranges` hold, read again from the shards, one after the other."""
    counted = Consumed.nothing(len(parts))
    for first, end in ranges:
        for start in range(first, end, PLACES_AT_ONCE):
            places = np.arange(start, min(start + PLACES_AT_ONCE, end))
            for place, part, row in zip(places.tolist(), *(a.tolist() for a in order(places)), strict=True):
                ids, targets, _ = text_rows.arrays([(parts[part], row)], length, pad_id)
                counted.note(place, part, parts[part], row, ids[0], targets[0])
    return counted
