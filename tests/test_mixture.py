"""The order of a pretraining run: exact at block edges, every row once an epoch, a pure function of (seed, place)."""

import time

import numpy as np
import pytest

from aquila_sft.data.mixture import MixtureOrder, block_counts, permuted, shares
from aquila_sft.errors import UserError


def order(seed: int = 1, stage: str = "pretrain", block_rows: int = 100) -> MixtureOrder:
    return MixtureOrder(
        {"a.en": 1000, "b.en": 90, "b.zh": 333},
        {"a.en": 0.5, "b.en": 0.2, "b.zh": 0.3},
        block_rows=block_rows,
        seed=seed,
        stage=stage,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 64, 65, 1000, 4097])
def test_permuted_is_a_permutation_of_any_size(size):
    for key in ("x", "y"):
        assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


def test_keys_give_different_permutations_and_neighbours_are_scattered():
    one, other = permuted(np.arange(10000), 10000, "1/a/0"), permuted(np.arange(10000), 10000, "1/a/1")
    assert (one == other).mean() < 0.01 and (one == np.arange(10000)).mean() < 0.01
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.05


def test_the_mixture_is_exact_at_every_block_edge():
    parts, _ = order()(np.arange(1000))
    for edge in range(100, 1001, 100):
        assert np.bincount(parts[:edge]).tolist() == [edge // 2, edge // 5, edge * 3 // 10]


def test_within_a_block_the_mixture_is_off_by_less_than_the_block():
    parts, _ = order()(np.arange(1000))
    counts = np.cumsum(np.eye(3)[parts], 0)
    exact = np.arange(1, 1001)[:, None] * np.array([0.5, 0.2, 0.3])
    assert np.abs(counts - exact).max() < 25  # far below 100: a block is shuffled, not sorted by part


def test_every_row_comes_once_an_epoch():
    parts, rows = order()(np.arange(20000))
    assert np.bincount(rows[parts == 0], minlength=1000).tolist() == [10] * 1000  # 10,000 places of 1,000 rows


def test_every_epoch_and_every_block_comes_in_an_order_of_its_own():
    # blocks of one row: they shuffle nothing
    alone = MixtureOrder({"a.en": 1000}, {"a.en": 1.0}, block_rows=1, seed=1, stage="pretrain")
    _, rows = alone(np.arange(3000))
    assert len({tuple(epoch) for epoch in rows.reshape(3, 1000).tolist()}) == 3
    parts, _ = order()(np.arange(1000))
    assert len({tuple(block) for block in parts.reshape(10, 100).tolist()}) == 10


def test_any_split_of_the_places_gives_the_same_order():
    whole = order()(np.arange(500))
    for world in (2, 5):
        pieces = [order()(np.arange(start, start + 500 // world)) for start in range(0, 500, 500 // world)]
        assert np.concatenate([p[0] for p in pieces]).tolist() == whole[0].tolist()
        assert np.concatenate([p[1] for p in pieces]).tolist() == whole[1].tolist()


def test_seed_and_stage_change_the_order():
    rows = [
        order(seed, stage)(np.arange(300))[1].tolist()
        for seed, stage in ((1, "pretrain"), (2, "pretrain"), (1, "anneal"))
    ]
    assert rows[0] != rows[1] and rows[0] != rows[2]


def test_drawn_counts_what_the_order_gives():
    parts, _ = order()(np.arange(1234))
    assert list(order().drawn(1234).values()) == np.bincount(parts, minlength=3).tolist()
    assert order().epochs(1000)["b.en"] == pytest.approx(200 / 90)


def test_place_a_thousand_million_costs_no_more_than_the_first():
    large = MixtureOrder({"a": 859_375_000}, {"a": 1.0}, block_rows=10_000, seed=1, stage="pretrain")
    began = time.perf_counter()
    large(np.array([10**9]))
    assert time.perf_counter() - began < 0.05


def test_remainders_are_rounded_to_fill_the_block():
    assert block_counts({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 100).tolist() == [34, 33, 33]


def test_a_share_below_one_row_of_a_block_is_refused():
    with pytest.raises(UserError, match="data.block_rows=100"):
        block_counts({"a": 0.999, "b": 0.001}, 100)


PARTS = {"wiki.en": ("wiki", "en", 600), "wiki.zh": ("wiki", "zh", 300), "books.en": ("books", "en", 100)}


def test_without_weights_shares_follow_the_tokens():
    assert shares(PARTS, None, None) == {"books.en": 0.1, "wiki.en": 0.6, "wiki.zh": 0.3}


def test_languages_are_weighed_first_then_sources_within_them():
    found = shares(PARTS, {"en": 1, "zh": 1}, {"wiki": 3, "books": 1})
    assert found == pytest.approx({"books.en": 0.125, "wiki.en": 0.375, "wiki.zh": 0.5})


def test_a_weight_of_nought_leaves_a_source_out():
    assert shares(PARTS, None, {"wiki": 1, "books": 0}) == pytest.approx({"wiki.en": 2 / 3, "wiki.zh": 1 / 3})


@pytest.mark.parametrize(
    "languages, sources, told",
    [
        ({"fr": 1}, None, "data.languages.fr=1: the shards have no such language; they have en, zh"),
        (None, {"web": 1}, "data.sources.web=1: the shards have no such source"),
        ({"zh": 1}, {"books": 1}, "leave nothing"),
    ],
)
def test_weights_that_fit_no_shard_are_refused(languages, sources, told):
    with pytest.raises(UserError, match=told):
        shares(PARTS, languages, sources)
