"""Which updates are left out, and when it is too many."""

import json
import math

import pytest
import torch

from aquila_sft.guard import WINDOW, Guard


def guard(**settings) -> Guard:
    return Guard(**{"spike_sigma": 6.0, "max_skipped": 3, "device": "cpu"} | settings)


def judge(guard: Guard, step: int, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm), step))


def warmed(**settings) -> Guard:
    found = guard(**settings)
    noise = torch.randn(WINDOW, 2, generator=torch.Generator().manual_seed(0))
    for step, (loss, norm) in enumerate(noise.tolist()):
        assert not judge(found, step, 3 + 0.1 * loss, 1 + 0.05 * norm)
    return found


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_no_number_is_left_out_from_the_first_step_on(loss, norm):
    found = guard()
    assert judge(found, 0, loss, norm) and not judge(found, 1, 3.0)
    assert math.isfinite(found.mean.sum() + found.variance.sum()) and found.skipped == 1


def test_means_are_those_of_the_good_updates():
    found = guard()
    losses = [3.0, 4.0, math.nan, 8.0]
    for step, loss in enumerate(losses):
        judge(found, step, loss)
    assert found.mean.tolist() == pytest.approx([5.0, 1.0])
    assert found.variance.tolist() == pytest.approx([14 / 3, 0.0], abs=1e-6)  # ((3-5)² + (4-5)² + (8-5)²) / 3


@pytest.mark.parametrize(
    "loss, norm, is_left_out",
    [(3.5, 1.0, False), (3.9, 1.0, True), (3.0, 1.5, True), (3.0, 1.2, False), (0.0, 0.0, False)],
)
def test_a_spike_is_far_above_the_mean_of_loss_or_norm(loss, norm, is_left_out):
    assert judge(warmed(), WINDOW, loss, norm) == is_left_out


def test_there_is_no_spike_before_enough_was_seen_nor_with_sigma_0():
    found = guard()
    assert not judge(found, 0, 3.0) and not judge(found, 1, 1000.0)
    assert not judge(warmed(spike_sigma=0.0), WINDOW, 1000.0)


def test_one_too_many_is_remembered_with_its_step_and_nothing_is_updated_after_it():
    found = guard(max_skipped=2)
    bad = [judge(found, step, math.nan if step in (4, 6, 7) else 3.0) for step in range(10)]
    assert bad == [step in (4, 6, 7, 8, 9) for step in range(10)]
    assert (found.since, found.crossed) == (4, 7)


def test_skipped_updates_are_forgiven_after_ten_good_ones_each():
    found = guard(max_skipped=2)
    for step in range(200):
        judge(found, step, math.nan if step % 20 == 0 else 3.0)
    assert found.crossed == -1 and found.skipped == 10
    found = guard(max_skipped=2)
    for step in range(30):
        judge(found, step, math.nan if step % 2 == 0 else 3.0)
    assert found.crossed == 4 and found.since == 0


def test_a_guard_goes_on_where_its_state_in_json_was():
    one = warmed()
    judge(one, WINDOW, math.nan)
    other = guard()
    other.restore(json.loads(json.dumps(one.state())))
    for step, loss in enumerate([3.1, 2.9, 7.0, 3.0], WINDOW + 1):
        assert judge(one, step, loss) == judge(other, step, loss)
    assert one.state() == other.state()
