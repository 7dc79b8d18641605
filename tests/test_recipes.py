"""Recipes compose and pass the typed door; every value has a source; slips cost one line."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from aquila_sft import cli
from aquila_sft.errors import UserError

ROOT = Path(__file__).parents[1]
RECIPES = cli.choices("recipe")
SCALES = cli.choices("scale")
TAGGED = ("model", "optim", "schedule", "lora", "data", "tokenizer", "bpe", "sized")  # groups whose values are choices


def load(*words: str):
    sys.path.insert(0, str(ROOT))
    import train as program

    return program.compose_run(list(words))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_at_every_scale(recipe, scale):
    run = load(f"recipe={recipe}", f"scale={scale}", *(["of=sft"] if recipe == "check" else []))
    assert (run.recipe, run.scale, run.output_dir) == (recipe, scale, f"outputs/{scale}/{recipe}")
    assert run.demo == (scale == "mini")


def test_the_135m_model_is_the_published_one():
    model = load("recipe=sft", "scale=135m").model
    assert (
        model.hidden_size,
        model.num_hidden_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.intermediate_size,
        model.vocab_size,
    ) == (576, 30, 9, 3, 1536, 151851)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["recipe=sftt"], ["recipe=sftt", "did you mean sft?"]),
        ([], ["recipe"]),
        (["recipe=sft", "scale=135"], ["scale=135", "did you mean 135m?"]),
        (["recipe=sft", "optim.lrr=1e-4"], ["optim.lrr=1e-4", "did you mean optim.lr?"]),
        (["recipe=sft", "lr=1e-4"], ["lr=1e-4", "did you mean optim.lr?"]),
        (["recipe=sft", "optim.lr=fast"], ["optim.lr=fast", "not a number"]),
        (["recipe=sft", "optim.lr=null"], ["optim.lr", "null"]),
        (["recipe=sft", "train.max_length=1.5"], ["train.max_length=1.5", "whole number"]),
        (["recipe=sft", "kernel=cuda"], ["kernel=cuda", "auto, triton, torch"]),
        (["recipe=sft", "train.tokens_per_step=1000"], ["train.tokens_per_step=1000", "896 or 1024"]),
        (
            ["recipe=sft", "train.max_steps=5", "train.num_epochs=1"],
            ["exactly one", "train.max_steps=5", "train.num_epochs=1"],
        ),
        (["recipe=sft", "train.max_steps=0"], ["train.max_steps=0"]),
        (["recipe=sft", "+new=1"], ["+new=1"]),
        (["recipe=sft", "seed=1", "seed=2"], ["seed", "twice"]),
        (["recipe=sft", "run_name=a/b"], ["run_name='a/b'"]),
        (["recipe=sft", "model.path=x"], ["model.path=x", "scale="]),
        (["recipe=sft", "data.files=x.jsonl"], ["data.files=x.jsonl", "scale="]),
        (["recipe=pretrain", "scale=135m"], ["recipe=prepare", "data.shards=", "scale=mini"]),
        (["recipe=anneal", "scale=135m", "data.shards=x"], ["recipe=pretrain", "model.path=", "scale=mini"]),
        (["recipe=prepare", "scale=135m"], ["recipe=tokenizer", "tokenizer.path="]),
        (
            ["recipe=prepare", "scale=135m", "data.corpora=null", f"tokenizer.ranks={ROOT / 'train.py'}"],
            ["data.files is not set"],
        ),
        (["recipe=prepare", "scale=mini", "tokenizer.path=."], ["tokenizer.path=.", "no vocabulary"]),
        (["recipe=prepare", "data.files=x.txt"], ["data.files=x.txt", "scale="]),
        (["recipe=pretrain", "data.shards=x"], ["data.shards=x", "scale="]),
        (["recipe=pretrain", "scale=mini", "data.shards=/no/where"], ["data.shards=/no/where"]),
        (["recipe=pretrain", "scale=mini", "model.path=x"], ["model.path=x", "recipe=anneal"]),
        (["recipe=anneal", "scale=mini", "model.path=random"], ["model.path=random", "recipe=pretrain"]),
        (["recipe=pretrain", "data.languages={en:0}"], ["data.languages", "more than 0"]),
        (["recipe=pretrain", "data.languages={en:-1}"], ["data.languages.en=-1"]),
        (["recipe=pretrain", "schedule.decay_steps=null"], ["schedule.kind=wsd", "schedule.decay_steps"]),
        (["recipe=prepare", "scale=mini", "data.files={a b: x.txt}"], ["source name 'a b'"]),
        (["recipe=prepare", "scale=mini", "data.files={中文: x.txt}"], ["source name '中文'", "Latin letters"]),
        (["recipe=prepare", "scale=mini", "data.files={}"], ["data.files={}", "not a file"]),
        (["recipe=prepare", "scale=mini", "prepare.slice_mb=1e-9"], ["prepare.slice_mb=1e-09", "0.001"]),
        (["recipe=prepare", "scale=mini", "prepare.slice_mb=inf"], ["prepare.slice_mb=inf"]),
        (["recipe=pretrain", "data.max_epochs=nan"], ["data.max_epochs=nan"]),
        (["recipe=pretrain", "model.initializer_range=-1"], ["model.initializer_range=-1"]),
        (["recipe=pretrain", "model.rope_theta=0"], ["model.rope_theta=0"]),
        (["recipe=pretrain", "model.sliding_window=0"], ["model.sliding_window=0"]),
        (["recipe=prepare", f"output_dir={ROOT}/train.py/x"], [f"output_dir={ROOT}/train.py/x", "is a file"]),
        (["recipe=sft", "scale=mini", "data.files=/no/where.jsonl", "model.path=random"], ["tokenizer"]),
        (
            ["recipe=sft", "scale=mini", "data.files=/no/where.jsonl", "model.path=random", "tokenizer.path=."],
            ["data.files=/no/where.jsonl", "no such file"],
        ),
        (["recipe=sft_lora", "scale=mini", "lora.r=0"], ["lora.r=0"]),
        (["recipe=sft", "optim.betas=0.9"], ["optim.betas=0.9", "not a list"]),
        (["recipe=sft", "lora.r=8"], ["lora.r=8", "recipe=sft_lora"]),
        (["recipe=sft", "demo=false"], ["demo=false", "no setting"]),
        (["recipe=sft", "hydra.run.dir=x"], ["hydra.run.dir=x", "no setting"]),
        (["recipe=tokenizer", "scale=135m"], ["data.files is not set"]),
        (["recipe=tokenizer", "tokenizer.ranks=/no/qwen.tiktoken"], ["/no/qwen.tiktoken", "no such file"]),
        (["recipe=chat", "prompt=a", "prompts=b"], ["prompt=", "prompts="]),
    ],
)
def test_a_slip_is_answered_with_one_line_and_status_2(words, parts, tmp_path):
    if not words:
        words = ["scale=mini"]
    done = warm.run(words, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in (".lock",)]  # nothing left behind


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "chat"])
def test_triton_asked_for_without_a_gpu_stops_before_anything_is_made(recipe, tmp_path):
    done = warm.run([f"recipe={recipe}", "kernel=triton"], cwd=tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert re.fullmatch("error: kernel=triton: .*; use kernel=auto or torch\n", done.stderr), done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]


@pytest.mark.parametrize("words", [["--help"], ["recipe=sftt"], ["recipe=sft", "optim.lrr=1"]])
def test_help_and_slips_answer_in_under_two_seconds_without_torch(words):
    code = (
        "import sys, runpy; sys.argv = ['train.py', *%r]\ntry: runpy.run_path(%r, run_name='__main__')\n"
        "except SystemExit: pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code % (words, str(ROOT / "train.py"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # not the clock: other work on the machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界",
        "a, b = c",
        "it's",
        '"quoted" inside',
        "{x: [1, 2",
        "${seed}",
        "back\\slash\\",
        "100%",
        "a=b=c",
        " leading",
        "tab\there",
        "[in brackets]",
        "#no comment",
        "~ + @ $x",
    ],
)
def test_free_text_reaches_the_stage_as_typed(text):
    assert load("recipe=chat", f"prompt={text}").prompt == text


def test_a_list_of_files_with_blanks_and_chinese_names_is_a_list():
    run = load("recipe=sft", "scale=mini", "data.files=[my data.jsonl, 数据.jsonl,a=b.parquet]")
    assert run.data.files == ["my data.jsonl", "数据.jsonl", "a=b.parquet"]


def test_files_of_several_sources_keep_their_names():
    run = load("recipe=prepare", "scale=135m", "data.files={wiki_zh: 我的 数据/*.jsonl, wiki-en: a=b.txt}")
    assert run.data.files == {"wiki_zh": ["我的 数据/*.jsonl"], "wiki-en": ["a=b.txt"]}


def test_a_source_may_have_several_files_and_globs_their_brackets():
    run = load("recipe=prepare", "scale=135m", "data.files={wiki: [a b.jsonl, c[0-9].txt], web: d[ab].jsonl}")
    assert run.data.files == {"wiki": ["a b.jsonl", "c[0-9].txt"], "web": ["d[ab].jsonl"]}


def test_weights_on_the_command_line_replace_the_recipes_own():
    assert load("recipe=anneal", "data.sources={world: 1}").data.sources == {"world": 1}
    assert load("recipe=anneal", "scale=135m", "data.sources={a: 1, b: 2}").data.sources == {
        "a": 1,
        "b": 2,
    }  # null there


def test_naming_one_length_unsets_the_recipes_own():
    train_cfg = load("recipe=sft", "train.max_steps=5").train
    assert (train_cfg.max_steps, train_cfg.num_epochs, train_cfg.total_tokens) == (5, None, None)


def test_smoke_has_a_run_directory_of_its_own():
    assert load("recipe=sft", "debug=smoke").output_dir == "outputs/mini/sft-smoke"


def test_an_override_is_quoted_for_hydra_only_where_a_person_means_text():
    assert cli.prepare_overrides(["recipe=sft", "optim.betas=[0.9,0.95]"])[1] == "optim.betas=[0.9,0.95]"
    with pytest.raises(UserError, match="key=value"):
        cli.prepare_overrides(["recipe=sft", "verbose"])


def values():
    for group in TAGGED:
        for file in sorted((ROOT / "recipes" / group).rglob("*.yaml")):
            for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
                found = re.match(r"\s*\w+:\s+([^#{]+?)\s*(#.*)?$", line)
                if found and found[1] != "null":
                    yield f"{file.relative_to(ROOT)}:{number}", found[2] or ""


def test_every_value_has_a_tag_and_every_tag_resolves():
    known = set(re.findall(r"^## \[([\w:.-]+)\]$", (ROOT / "recipes/SOURCES.md").read_text("utf-8"), re.MULTILINE))
    untagged, unknown, used = [], [], set()
    for where, comment in values():
        tags = re.findall(r"\[([a-z][\w:.-]*)\]", comment)
        used |= set(tags)
        untagged += [where] if not tags else []
        unknown += [f"{where} [{t}]" for t in tags if t not in known]
    for file in (ROOT / "recipes/recipe").glob("*.yaml"):
        used |= set(re.findall(r"\[([a-z][\w:.-]*)\]", file.read_text("utf-8")))
    assert not untagged and not unknown
    assert len(list(values())) > 60
    assert known <= used | {"assumed"}, f"SOURCES.md explains what no recipe uses: {known - used}"
