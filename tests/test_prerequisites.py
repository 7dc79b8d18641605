"""What a recipe needs and was not given: made, found or named."""

import contextlib
import json
from pathlib import Path

import pytest
import warm

import train
from aquila_sft import prerequisites
from aquila_sft.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finished(recipe: str, scale: str = "135m") -> Path:
    """A run directory that says it is done, whatever it holds."""
    out = Path(f"outputs/{scale}/{recipe}")
    (out / "final").mkdir(parents=True)
    (out / "summary.json").write_text(json.dumps({"status": "done"}))
    return out


@pytest.mark.parametrize(
    "recipe, needs",
    [
        ("tokenizer", ()),
        ("prepare", ("tokenizer",)),
        ("anneal", ("tokenizer", "prepare", "pretrain")),
        ("sft_lora", ("tokenizer", "prepare", "pretrain", "anneal")),
        ("chat", ("tokenizer", "prepare", "pretrain", "anneal", "sft")),
    ],
)
def test_the_recipes_before_come_in_the_order_in_which_they_run(recipe, needs):
    assert prerequisites.all_needs(recipe) == needs


def test_only_scale_tokenizer_kernel_and_debug_reach_the_recipes_before():
    cfg = train.compose_run(["recipe=sft", "optim.lr=0.1", "train.num_epochs=1", "seed=5", "run_name=mine"])
    assert prerequisites.words("anneal", cfg) == ["recipe=anneal", "scale=mini"]
    cfg = train.compose_run(["recipe=sft", "scale=mini", "tokenizer.path=my tok", "kernel=torch", "debug=smoke"])
    *passed, name = prerequisites.words("pretrain", cfg)
    assert passed == ["recipe=pretrain", "scale=mini", "kernel=torch", "tokenizer.path=my tok", "debug=smoke"]
    assert name.startswith("run_name=pretrain-")  # another vocabulary, another base


@pytest.mark.parametrize(
    "words, missing, way",
    [
        (["recipe=prepare", "data.files=a.jsonl"], "recipe=tokenizer", "tokenizer.path="),
        (["recipe=pretrain"], "recipe=prepare", "data.shards="),
        (["recipe=anneal", "data.shards=x"], "recipe=pretrain", "model.path="),
        (["recipe=chat"], "recipe=sft", "model.path="),
    ],
)
def test_what_cannot_be_made_is_named_with_the_ways_on(words, missing, way):
    cfg = train.compose_run([*words, "scale=135m"])
    with pytest.raises(UserError) as error:
        prerequisites.fill(cfg, train.compose_run)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in (missing, way, "scale=mini"))


def test_at_the_real_scale_what_a_recipe_before_left_is_used_whatever_its_settings():
    prepared, trained = finished("prepare"), finished("pretrain")
    cfg = train.compose_run(["recipe=anneal", "scale=135m"])
    prerequisites.fill(cfg, train.compose_run)
    assert (cfg.data.shards, cfg.model.path) == (str(prepared / "final"), str(trained / "final"))


@pytest.mark.parametrize("recipe", ["eval", "chat"])
def test_a_model_is_evaluated_and_talked_to_where_tuning_left_it(recipe):
    tuned = finished("sft")
    cfg = train.compose_run([f"recipe={recipe}", "scale=135m"])
    prerequisites.fill(cfg, train.compose_run)
    assert cfg.model.path == str(tuned / "final")


def test_a_path_that_is_given_is_kept():
    finished("prepare")
    cfg = train.compose_run(["recipe=anneal", "scale=135m", "model.path=mine"])
    prerequisites.fill(cfg, train.compose_run)
    assert cfg.model.path == "mine"


@pytest.mark.slow
def test_smoke_goes_through_all_recipes_in_directories_of_their_own(tmp_path):
    done = warm.run(["recipe=sft", "debug=smoke"], timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    made = sorted(path.name for path in (tmp_path / "outputs/mini").iterdir())
    smoke = [f"{name}-smoke" for name in ("anneal", "prepare", "pretrain", "sft", "tokenizer")]
    assert made == sorted([*smoke, "world", "cache"])
    assert json.loads((tmp_path / "outputs/mini/sft-smoke/summary.json").read_text())["steps"] == 2
    # a recipe before that was made with other settings is not what this one stands on
    other = warm.run(["recipe=pretrain", "debug=smoke", "optim.lr=1e-5", "overwrite=true"], timeout=600)
    assert other.returncode == 0, other.stderr[-2000:]
    again = warm.run(["recipe=sft", "debug=smoke"], timeout=600)
    assert again.returncode == 2 and len(again.stderr.strip().splitlines()) == 1
    assert "recipe=pretrain, needed by recipe=sft" in again.stderr and "optim.lr" in again.stderr
    assert "model.path=" in again.stderr


@pytest.mark.parametrize("steps, chosen", [(4, "checkpoints/step-000004"), (6, "final")])
def test_an_anneal_begins_at_the_end_even_where_the_last_checkpoint_is_gone(steps, chosen):
    from aquila_sft import checkpoint

    out = finished("pretrain")
    (out / "summary.json").write_text(json.dumps({"status": "done", "steps": steps}))
    (out / "checkpoints/.writing").mkdir(parents=True)
    checkpoint.commit(out / "checkpoints/.writing", out / "checkpoints/step-000004")
    pretrain, anneal = (train.compose_run([f"recipe={name}", "scale=135m"]) for name in ("pretrain", "anneal"))
    assert prerequisites.made(pretrain, anneal) == f"outputs/135m/pretrain/{chosen}"


def test_what_is_given_is_not_made_again(monkeypatch):
    made = []
    monkeypatch.setattr(prerequisites, "make", lambda cfg, runs, compose_run: made.append(list(runs)))
    finished("prepare", scale="mini")
    for word in ("model.path=checkpoint", "tokenizer.path=vocabulary"):
        cfg = train.compose_run(["recipe=anneal", "scale=mini", word])
        with contextlib.suppress(UserError):  # nothing is really made here, and so something is missing
            prerequisites.fill(cfg, train.compose_run)
    assert made == [["tokenizer", "prepare"], ["prepare", "pretrain"]]
