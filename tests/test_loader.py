"""What the loop is fed: the places of a step, any number of processes, the ledger's entries, waiting."""

import json
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest
from shard_files import write_part

from aquila_sft import runtime
from aquila_sft.config.model import PretrainTrain
from aquila_sft.data import loader as loaders
from aquila_sft.data.consumed import Consumed, recount
from aquila_sft.data.loader import Loader
from aquila_sft.data.mixture import MixtureOrder
from aquila_sft.data.shards import Part
from aquila_sft.data.text_rows import TextRows
from aquila_sft.errors import UserError
from aquila_sft.plan import Plan
from aquila_sft.proof import check

LENGTH, ROWS = 16, 8


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("parts"), []
    random = np.random.default_rng(0)
    for name in ("a.en", "b.zh"):
        about = {"vocab_size": 1000, "tokenizer_sha256": "x", "source": name[0], "language": name[2:]}
        documents = (([1, *random.integers(3, 1000, random.integers(5, 40)), 2], 10) for _ in range(60))
        paths = write_part(folder / name, documents, shard_tokens=500, **about)
        found.append(TextRows(Part(name, paths), LENGTH))
    return found


@pytest.fixture
def make(parts, monkeypatch):
    """make(world, rank) -> the loader of that process."""

    def make(world: int = 1, rank: int = 0, **settings) -> Loader:
        monkeypatch.setattr(runtime, "world_size", lambda: world)
        monkeypatch.setattr(runtime, "rank", lambda: rank)
        train = PretrainTrain(
            **{"max_steps": 50, "tokens_per_step": ROWS * LENGTH, "max_length": LENGTH, "micro_batch_rows": 2}
            | settings
        )
        rows = {"a.en": len(parts[0]), "b.zh": len(parts[1])}
        order = MixtureOrder(rows, {"a.en": 0.7, "b.zh": 0.3}, block_rows=10, seed=1, stage="pretrain")
        return Loader(Plan(train, sum(rows.values()), "cpu", is_smoke=False), order, parts, LENGTH, pad_id=0)

    return make


def whole(loaded: list) -> np.ndarray:
    return np.concatenate([batch["input_ids"].numpy() for one in loaded for batch in one.batches])


def test_two_and_four_processes_read_what_one_reads_in_its_order_and_their_ledgers_add_up_to_its_own(
    make, parts, monkeypatch
):
    monkeypatch.setattr(parts[0], "damaged", set(range(0, len(parts[0]), 2)))
    for step in (0, 7):
        alone = make().load(step)
        assert 0 < alone.entry.damaged[0] < alone.entry.rows[0] and alone.entry.damaged[1] == 0
        for world in (2, 4):
            shares = []
            for rank in range(world):
                shares.append(make(world, rank).load(step))
            assert whole(shares).tolist() == whole([alone]).tolist()
            vector = sum(share.entry.vector() for share in shares)  # as processes add them up
            assert Consumed.of_vector(vector).state() == alone.entry.state()
            assert sum(share.targets for share in shares) == alone.targets == sum(alone.entry.targets)


def test_a_step_of_fewer_rows_than_its_places_is_filled_with_blank_ones_that_the_ledger_does_not_count(make):
    loader = make(max_steps=None, num_epochs=0.5)
    last = loader.load(loader.plan.steps - 1)
    count = loader.plan.end - (loader.plan.steps - 1) * ROWS
    assert 0 < count < ROWS and last.entry.rows.sum() == count
    assert (whole([last])[count:] == 0).all() and (whole([last])[:count, :2] != 0).all()


def test_the_sum_of_all_steps_is_what_a_walk_through_the_order_finds(make):
    loader, total = make(), Consumed.nothing(2)
    for step in range(20):
        total.add(loader.load(step).entry)
    again = recount(loader.order, loader.parts, [(0, 20 * ROWS)], LENGTH, pad_id=0)
    assert again.state() == total.state()
    assert total.rows.tolist() == [112, 48]  # 7 : 3 of 160
    assert Consumed.of_state(json.loads(json.dumps(total.state()))).state() == total.state()


def ledger_lines(loader: Loader, steps: list[list[int]]) -> list[dict]:
    """What metrics.jsonl would hold: a checkpoint after each list of steps."""
    total, lines = Consumed.nothing(2), []
    for group in steps:
        for step in group:
            total.add(loader.load(step).entry)
        rows = dict(zip(loader.order.parts, total.rows.tolist(), strict=True))
        lines.append({"step": len(lines) * 4 + 4, "ledger": total.hash, "rows": rows})
    return lines


GOOD = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_proof_accepts_a_right_run_and_says_how_much_it_read(make):
    loader = make()
    lines = ledger_lines(loader, GOOD)
    assert check(loader, lines) == "nothing lost, nothing twice: 96 rows counted, 96 of them read again"
    assert check(loader, lines, max_rows=70).endswith("96 rows counted, 64 of them read again")


@pytest.mark.parametrize(
    "steps, told",
    [
        ([GOOD[0], [4, 5, 6], GOOD[2]], "between steps 4 and 8 .* rows were lost"),
        ([GOOD[0], [4, 5, 6, 7, 7], GOOD[2]], "between steps 4 and 8 .* rows were trained on twice"),
        ([GOOD[0], [4, 5, 6, 16], GOOD[2]], "between steps 4 and 8 other rows or tokens"),  # as many of each part
    ],
)
def test_the_proof_finds_a_step_that_is_lost_doubled_or_exchanged(make, steps, told):
    with pytest.raises(UserError, match=told):
        check(make(), ledger_lines(make(), steps))


def test_the_proof_finds_one_other_token(make, monkeypatch):
    loader = make()
    own, lines = loaders.text_rows.arrays, ledger_lines(loader, GOOD)

    def other(*given):
        ids, targets, positions = own(*given)
        ids[0, 3] += 1
        return ids, targets, positions

    monkeypatch.setattr(loaders.text_rows, "arrays", other)
    with pytest.raises(UserError, match="other rows or tokens"):
        check(loader, lines)


def test_windows_left_out_move_what_comes_behind_them_and_nothing_else(make):
    loader = make()
    plain = [loader.place(step) for step in range(12)]
    loader.skip(3, 5)
    assert [loader.place(s) for s in range(12)] == [*plain[:3], *(p + 2 * ROWS for p in plain[3:])]
    loader.skip(6, 7)
    assert loader.skipped == [(24, 40), (64, 72)]
    assert [loader.place(s) for s in (2, 3, 5, 6)] == [16, 40, 56, 72]
    assert loader.trained_on(0, 7) == [(0, 24), (40, 64), (72, 80)]
    assert loader.trained_on(2, 4) == [(16, 24), (40, 48)] and loader.trained_on(3, 3) == []
    loader.skip(2, 6)  # swallows both windows before it
    assert loader.skipped == [(16, 72)] and [loader.place(s) for s in (1, 2, 3)] == [8, 72, 80]


def test_the_state_of_a_loader_and_its_ledger_stay_under_a_kibibyte(make):
    loader = make()
    loader.skipped = [(10**12 + 64 * i, 10**12 + 64 * i + 8) for i in range(3)]
    ledger = Consumed(np.full(16, 10**9), np.full(16, 2 * 10**12), np.full(16, 10**6), 2**127)
    assert len(json.dumps({"loader": loader.state(10**6), "ledger": ledger.state()})) < 1024


def test_any_step_is_loaded_at_once(make):
    loader = make(max_steps=10**9)
    loader.load(0)
    began = time.perf_counter()
    loader.load(10**9 - 1)
    assert time.perf_counter() - began < 0.05


def test_the_next_step_is_made_while_this_one_is_used(make, monkeypatch):
    loader, own = make(), Loader.load

    def slow(self, step):
        time.sleep(0.01)
        return own(self, step)

    monkeypatch.setattr(Loader, "load", slow)
    waits = []
    for loaded in loader.ahead(0, 20):
        waits.append(loaded.waited)
        time.sleep(0.04)
    assert waits[0] > 0.005  # there was nothing to compute meanwhile
    assert statistics.median(waits[1:]) < 0.005 * 0.04
    starved = [loaded.waited for loaded in loader.ahead(0, 5)]
    assert min(starved) > 0.005  # nor is waiting hidden


def test_a_source_repeated_too_often_is_refused(make):
    make().check_epochs(max_epochs=6)
    with pytest.raises(UserError, match=r"would be gone through .* times and data.max_epochs=2: train shorter"):
        make().check_epochs(max_epochs=2)


def test_the_ledger_s_hash_sees_place_part_row_ids_and_targets():
    def hashed(place=3, part=0, name="a.en", row=5, ids=(1, 2), targets=(2, -100)):
        counted = Consumed.nothing(2)
        rows = SimpleNamespace(part=SimpleNamespace(name=name), damaged=())
        counted.note(place, part, rows, row, np.array(ids), np.array(targets))
        return counted.hash

    others = [
        hashed(place=4),
        hashed(part=1, name="b.en"),
        hashed(row=6),
        hashed(ids=(1, 3)),
        hashed(targets=(1, -100)),
    ]
    assert hashed() == hashed() and len({hashed(), *others}) == 6
