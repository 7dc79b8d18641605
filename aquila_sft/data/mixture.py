"""Which row of which part is trained on at which place of a run: a pure function, so that going on needs no state.

    place -> block, slot in it -> part and how many of its rows came before -> epoch, row

Rows are drawn in blocks. A block holds of every part a fixed number of rows (largest remainder), shuffled; so the
mixture is exact at every block's edge, and within a block off by less than its size. A part's rows come in a new order
in every epoch; the block in which an epoch ends has rows of both. Shuffling is a keyed permutation of integers (a
Feistel network with cycle walking), computed where it is asked for: nothing is stored, sample 10⁹ costs as much as the
first, and any number of processes agrees.
"""

import hashlib

import numpy as np

from aquila_sft.config.runs import PretrainRun
from aquila_sft.data.shards import Prepared
from aquila_sft.errors import UserError

ROUNDS = 6


class MixtureOrder:
    """The order of a run. `rows`: rows of every part; `shares`: part -> its share of the rows drawn, adding up to 1."""

    def __init__(
        self, rows: dict[str, int], shares: dict[str, float], *, block_rows: int, seed: int, stage: str
    ) -> None:
        self.parts = list(shares)
        self.rows = np.array([rows[name] for name in self.parts], dtype=np.int64)
        self.counts = block_counts(shares, block_rows)
        self.edges = np.concatenate([[0], np.cumsum(self.counts)])
        self.block_rows, self.key = block_rows, f"{seed}/{stage}"

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices into `parts`, rows of those parts) for int64 [n] places; both int64 [n]."""
        blocks, offsets = np.divmod(np.asarray(places, dtype=np.int64), self.block_rows)
        slots = np.empty_like(offsets)
        for block in np.unique(blocks):
            at = blocks == block
            slots[at] = permuted(offsets[at], self.block_rows, f"{self.key}/block/{block}")
        parts = np.searchsorted(self.edges, slots, side="right") - 1
        epochs, turns = np.divmod(blocks * self.counts[parts] + slots - self.edges[parts], self.rows[parts])
        rows = np.empty_like(turns)
        for part, epoch in {*zip(parts.tolist(), epochs.tolist(), strict=True)}:
            at = (parts == part) & (epochs == epoch)
            rows[at] = permuted(turns[at], int(self.rows[part]), f"{self.key}/{self.parts[part]}/{epoch}")
        return parts, rows

    def shares(self) -> dict[str, float]:
        """Share of every part in the rows of a block."""
        return {name: count / self.block_rows for name, count in zip(self.parts, self.counts.tolist(), strict=True)}

    def __str__(self) -> str:
        return ", ".join(f"{name} {share:.1%}" for name, share in self.shares().items())

    def drawn(self, places: int) -> dict[str, int]:
        """Rows of every part among the first `places`."""
        blocks, rest = divmod(places, self.block_rows)
        tail, _ = self(np.arange(blocks * self.block_rows, blocks * self.block_rows + rest))
        counts = blocks * self.counts + np.bincount(tail, minlength=len(self.parts))
        return dict(zip(self.parts, counts.tolist(), strict=True))

    def epochs(self, places: int) -> dict[str, float]:
        """How often every part is gone through in the first `places`."""
        return {name: n / rows for (name, n), rows in zip(self.drawn(places).items(), self.rows.tolist(), strict=True)}


def shares_of_run(run: PretrainRun, prepared: Prepared) -> dict[str, float]:
    """Share of tokens of every part that the run asks for."""
    return shares(about(prepared), run.data.languages, run.data.sources)


def order_of_run(run: PretrainRun, prepared: Prepared) -> MixtureOrder:
    """The order of a run over its shards. Raises UserError."""
    of_parts = shares_of_run(run, prepared)
    return order(prepared, of_parts, run.train.max_length, run.data.block_rows, run.seed, run.recipe)


def order(
    prepared: Prepared, of_parts: dict[str, float], max_length: int, block_rows: int, seed: int, stage: str
) -> MixtureOrder:
    """Over rows of `max_length` tokens. Raises UserError."""
    rows = {name: -(-part.tokens // max_length) for name, part in prepared.parts.items()}
    return MixtureOrder(rows, of_parts, block_rows=block_rows, seed=seed, stage=stage)


def about(prepared: Prepared) -> dict[str, tuple[str, str, int]]:
    """Source, language and tokens of every part."""
    return {name: (part.source, part.language, part.tokens) for name, part in prepared.parts.items()}


def repeated_too_often(epochs: dict[str, float], max_epochs: float) -> list[str]:
    """A line for every part that would be gone through more often than data.max_epochs allows."""
    return [
        f"{name} would be gone through {times:.3g} times and data.max_epochs={max_epochs:g}: train shorter, lower its "
        "weight, add text, or raise data.max_epochs"
        for name, times in epochs.items()
        if times > max_epochs
    ]


def block_counts(shares: dict[str, float], block_rows: int) -> np.ndarray:
    """Rows of every part in a block, adding up to block_rows: floors, and the largest remainders rounded up."""
    exact = np.array(list(shares.values())) * block_rows
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")
    counts[largest[: block_rows - counts.sum()]] += 1
    for name, count in zip(shares, counts, strict=True):
        if not count:
            raise UserError(
                f"{name} has a share of {shares[name]:.2%}, less than one row in data.block_rows={block_rows}; "
                "raise data.block_rows, or give its source a weight of 0"
            )
    return counts


def permuted(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """A permutation of 0 … size − 1 that `key` chooses, at `indices`; int64."""
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
    out = indices.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)  # the network permutes a power of four: walk on until back inside
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (scrambled(right ^ round_key) & mask)
        out[outside] = (left << shift) | right
        outside = out >= size
    return out.astype(np.int64)


def scrambled(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shares(
    parts: dict[str, tuple[str, str, int]],
    languages: dict[str, float] | None,
    sources: dict[str, float] | None,
    group: str = "data",
) -> dict[str, float]:
    """Share of tokens of every part that is trained on. `parts`: name -> (source, language, tokens).

    A language's share is its weight, or its share of the tokens of the chosen sources; within a language a source's is
    its weight, or its share of that language's tokens. Raises UserError for a name that no part has.
    """
    for key, weights, place in (("sources", sources, 0), ("languages", languages, 1)):
        there = {about[place] for about in parts.values()}
        for name, weight in (weights or {}).items():
            if weight and name not in there:
                raise UserError(
                    f"{group}.{key}.{name}={weight}: the shards have no such {key[:-1]}; they have "
                    f"{', '.join(sorted(there))}"
                )
    chosen = {
        name: (source, language, tokens)
        for name, (source, language, tokens) in sorted(parts.items())
        if (sources is None or sources.get(source)) and (languages is None or languages.get(language)) and tokens
    }
    if not chosen:
        raise UserError(
            f"{group}.sources={sources} and {group}.languages={languages} leave nothing of {', '.join(sorted(parts))}"
        )
    of_language: dict[str, float] = {}
    of_source: dict[str, float] = {}
    for source, language, tokens in chosen.values():
        of_language[language] = of_language.get(language, 0) + tokens
        of_source[language] = of_source.get(language, 0) + (sources[source] if sources else tokens)
    total = sum(languages[name] if languages else tokens for name, tokens in of_language.items())
    return {
        name: (languages[language] if languages else of_language[language])
        / total
        * (sources[source] if sources else tokens)
        / of_source[language]
        for name, (source, language, tokens) in chosen.items()
    }
