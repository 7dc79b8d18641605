"""What evaluations in the loop cost, and how often they are therefore made."""

import pytest

from aquila_sft.config import PretrainTrain
from aquila_sft.evaluate import in_the_loop


def train(**settings) -> PretrainTrain:
    return PretrainTrain(**{"tokens_per_step": 1000, "save_steps": 50, "eval_share": 0.01} | settings)


def test_evaluations_fall_on_checkpoints_as_often_as_one_percent_of_the_compute_allows():
    # 3 x 1000 tokens a step x 1 % = 30 forward tokens a step: 4,000 take 134 steps, so every third checkpoint has one
    assert in_the_loop(train(), 4_000, 10_000) == (150, "evaluation every 150 steps, 0.89% of the compute")
    assert in_the_loop(train(), 1_500, 10_000) == (50, "evaluation every 50 steps, 1.00% of the compute")
    assert in_the_loop(train(eval_share=0.1), 4_000, 10_000)[0] == 50


def test_a_run_too_short_for_one_is_evaluated_before_and_after():
    for settings, tokens, steps in (({}, 4_000, 120), ({"eval_share": 0.0}, 10, 10**6), ({"eval_steps": 80}, 10, 80)):
        assert in_the_loop(train(**settings), tokens, steps) == (
            None,
            "evaluation before the first and after the last step",
        )
    assert in_the_loop(train(), 0, 1000) == (None, "nothing is held back to be evaluated")


def test_an_interval_that_was_asked_for_is_kept_and_its_price_said():
    every, told = in_the_loop(train(eval_steps=20), 4_000, 10_000)
    assert every == 20 and "6.67% of the compute: more than train.eval_share=0.01" in told
    assert "more than" not in in_the_loop(train(eval_steps=400), 4_000, 10_000)[1]


@pytest.mark.parametrize("recipe", ["pretrain", "anneal"])
@pytest.mark.parametrize("scale", ["mini", "135m"])
def test_no_recipe_asks_for_more_than_one_percent(recipe, scale):
    import train as program

    settings = program.compose_run([f"recipe={recipe}", f"scale={scale}"]).train
    assert settings.eval_steps is None and settings.eval_share == 0.01
