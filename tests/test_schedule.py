"""Learning rates: what optim.lr is multiplied with at every step."""

import pytest

from aquila_sft.config.model import Schedule, ScheduleKind
from aquila_sft.schedule import multiplier, remarks


def schedule(kind: str, warmup=0, decay=0.2, decay_kind="linear", low=0.0) -> Schedule:
    return Schedule(
        kind=ScheduleKind[kind],
        warmup_steps=warmup,
        min_lr_ratio=low,
        decay_steps=decay,
        decay_kind=ScheduleKind[decay_kind],
    )


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (schedule("constant"), [1, 1, 1, 1]),
        (schedule("constant", warmup=2), [1 / 3, 2 / 3, 1, 1]),
        (schedule("linear"), [1, 0.75, 0.5, 0.25]),
        (schedule("linear", low=0.2), [1, 0.8, 0.6, 0.4]),
        (schedule("cosine"), [1, 0.853553, 0.5, 0.146447]),
        (schedule("one_minus_sqrt"), [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]),
        (schedule("wsd", decay=2), [1, 1, 1, 0.5]),
        (schedule("wsd", warmup=0.25, decay=0.5), [0.5, 1, 1, 0.5]),
        (schedule("wsd", decay=2, decay_kind="one_minus_sqrt"), [1, 1, 1, 1 - 0.5**0.5]),
        (schedule("wsd", warmup=2, decay=100), [1 / 3, 2 / 3, 1, 0.5]),
        (schedule("linear", warmup=100), [0.2, 0.4, 0.6, 0.8]),
    ],
)
def test_four_steps_of_every_kind(wanted, expected):
    assert [multiplier(step, wanted, 4) for step in range(4)] == pytest.approx(expected, abs=1e-6)


def test_what_is_longer_than_the_run_is_said():
    assert remarks(schedule("wsd", warmup=4, decay=0.5), 4) == []
    assert "schedule.warmup_steps=5 and the run has 4" in remarks(schedule("cosine", warmup=5), 4)[0]
    assert "schedule.decay_steps=9 and the run has 4" in remarks(schedule("wsd", decay=9), 4)[0]
