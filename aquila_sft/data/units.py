"""Text as a row of units that mean about as much in any language: a word, or one Chinese or Japanese character.

    "GPU上的Mixed-precision训练" -> NFKC, lower case -> gpu | 上 | 的 | mixed | precision | 训 | 练 -> uint64 each
    units -> n-grams -> uint64 each            signs and blanks count for nothing

Copies and benchmark items are found by such n-grams: word n-grams in English, character n-grams in Chinese, and both
at once where a text mixes them. All of it is arithmetic on whole arrays: no Python per word.
"""

import functools
import unicodedata

import numpy as np

from aquila_sft.data.mixture import scrambled

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
INVERSE = pow(BASE, -1, 2**64)
ALONE = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF), (0x3041, 0x3096), (0x30A1, 0x30FA))


def unit_hashes(text: str) -> np.ndarray:
    """One hash for each word or Han or Kana character, uint64 [units]."""
    codes = np.frombuffer(unicodedata.normalize("NFKC", text).lower().encode("utf-32-le", "replace"), dtype="<u4")
    kinds = kind_of_character()[codes]
    in_word = kinds == 1
    alone = kinds == 2
    beside = np.concatenate([[False], in_word, [False]])
    starts = np.flatnonzero(alone | (in_word & ~beside[:-2]))
    ends = np.flatnonzero(alone | (in_word & ~beside[2:])) + 1
    return span_hashes(scrambled(codes.astype(np.uint64) + np.uint64(BASE)), starts, ends)


def ngram_hashes(units: np.ndarray, n: int) -> np.ndarray:
    """One hash for every n units in a row, uint64 [max(0, units - n + 1)]."""
    starts = np.arange(max(0, len(units) - n + 1))
    return span_hashes(units, starts, starts + n)


def span_hashes(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """One hash for each values[start:end], the same wherever the span lies; uint64.

    With s(i) the sum of values[j] * BASE**j over j < i, (s(end) - s(start)) / BASE**start is the span's polynomial;
    modulo 2**64 the division is a multiplication by the inverse.
    """
    powers, inverses = powers_up_to(max(1 << (len(values) - 1).bit_length(), 2**12) if len(values) else 2**12)
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return scrambled((sums[ends] - sums[starts]) * inverses[starts])


@functools.lru_cache(maxsize=4)
def powers_up_to(size: int) -> tuple[np.ndarray, np.ndarray]:
    def of(base: int) -> np.ndarray:
        factors = np.full(size, base, dtype=np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return of(BASE), of(INVERSE)


@functools.cache
def kind_of_character() -> np.ndarray:
    """uint8 [0x110000]: 0 between words, 1 part of a word, 2 a unit by itself."""
    kinds = np.zeros(0x110000, dtype=np.uint8)
    for first, last in ((0, 0xD7FF), (0xE000, 0x323AF), (0xE0100, 0xE01EF)):
        kinds[first : last + 1] = [
            c.isalnum() or unicodedata.category(c)[0] == "M" for c in map(chr, range(first, last + 1))
        ]
    for first, last in ALONE:
        kinds[first : last + 1] = 2
    return kinds
