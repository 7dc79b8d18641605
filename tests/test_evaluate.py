"""What evaluations in the loop cost, how often they are therefore made, and what damage does to them."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shard_files import write_part

from aquila_sft import evaluate
from aquila_sft.config.model import PretrainTrain
from aquila_sft.data.shards import Part
from aquila_sft.data.text_rows import TextRows
from aquila_sft.evaluate import in_the_loop
from aquila_sft.log import MetricsFile


def train(**settings) -> PretrainTrain:
    common = {"tokens_per_step": 1000, "save_steps": 50, "intermediate_steps": None, "eval_share": 0.01}
    return PretrainTrain(**common | settings)


def test_evaluations_fall_on_checkpoints_as_often_as_one_percent_of_the_compute_allows():
    # 3 x 1000 tokens a step x 1 % = 30 forward tokens a step: 4,000 take 134 steps, so every third checkpoint has one
    assert in_the_loop(train(), 4_000, 10_000) == (150, "evaluation every 150 steps, 0.89% of the compute")
    assert in_the_loop(train(), 1_500, 10_000) == (50, "evaluation every 50 steps, 1.00% of the compute")
    assert in_the_loop(train(eval_share=0.1), 4_000, 10_000)[0] == 50


@pytest.mark.parametrize(
    ("kept", "every"),
    [
        (None, 150),  # what the budget allows
        (400, 200),  # half as often as checkpoints come in fours, and so at every model that is kept
        (150, 150),
        (100, 200),  # at every second one
        (120, 150),  # no checkpoint falls on most of them
    ],
)
def test_evaluations_fall_on_models_that_are_kept(kept, every):
    assert in_the_loop(train(intermediate_steps=kept), 4_000, 10_000)[0] == every


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


class OneNat(torch.nn.Linear):
    """Stands for a model that loses one nat on every target."""

    def forward(self, *, targets, per_token, **_):
        return SimpleNamespace(loss=(targets != -100).float())


def test_a_held_back_part_of_which_nothing_can_be_read_has_no_figures_and_the_others_have_theirs(tmp_path):
    parts = {}
    for name, damaged_at in (("a.en", None), ("b.en", -40)):  # before the checksum of 32 and the crc32 of 4: the ends
        about = {"vocab_size": 20, "tokenizer_sha256": "x", "source": name[0], "language": "en"}
        (path,) = write_part(tmp_path / name, [(np.arange(1, 18), 34)] * 3, shard_tokens=100, **about)
        content = bytearray(path.read_bytes())
        if damaged_at:
            content[damaged_at] ^= 1
            path.write_bytes(content)
        parts[name] = TextRows(Part(name, [path]), 8, leave_out_damaged=True)
    figures = evaluate.text(
        OneNat(1, 1),
        parts,
        max_bytes=10**6,
        rows_at_once=4,
        pad_id=0,
        marks=(None, None),
        autocast=contextlib.nullcontext,
    )
    assert list(figures) == ["a.en"]
    assert figures["a.en"]["loss"] == 1 and figures["a.en"]["text_bytes"] == 102


def test_an_evaluation_that_is_no_number_is_null_in_metrics_and_absent_from_the_summary(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", from_step=-1, last_step=9)
    metrics.write(step=1, seconds=0.1, eval_loss_en=math.nan, eval_bits_per_byte_en=math.inf, eval_loss_zh=2.0)
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (line["eval_loss_en"], line["eval_bits_per_byte_en"], line["eval_loss_zh"]) == (None, None, 2.0)
    assert evaluate.of_run(metrics.read())["eval_loss"] == {"zh": 2.0}


@pytest.mark.parametrize("was_training", [True, False])
def test_a_model_is_evaluated_without_dropout_and_gets_back_the_mode_that_it_had(was_training):
    modes = []

    class Watched(OneNat):
        def forward(self, **given):
            modes.append(self.training)
            return super().forward(**given)

    model = Watched(1, 1).train(was_training)
    targets = torch.tensor([[1, 2, -100, 7]])
    found = evaluate.nats(model, [{"targets": targets}, {"targets": targets}], 7, contextlib.nullcontext)
    assert modes == [False, False] and model.training is was_training
    assert found == (6, 6, 4, 4)  # nats and targets; the same without those of the end


def test_bits_per_byte_of_answers_are_bits_of_their_words_over_their_bytes():
    class Rows:
        bytes = np.array([10, 6])

        def __len__(self):
            return 1

        def batch(self, rows, length, pad_id):
            return {"labels": torch.tensor([[-100, 1, 2, 7]])}  # two words and the end of the turn, a nat each

    settings = dict(length=4, rows_at_once=1, pad_id=0, turn_end_id=7, autocast=contextlib.nullcontext)
    figures = evaluate.answers(OneNat(1, 1), {"en": Rows()}, **settings)["en"]
    assert figures == {"loss": 1, "answer_bytes": 16, "bits_per_byte": pytest.approx(2 / math.log(2) / 16)}
