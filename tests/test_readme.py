"""The README's commands, as a new user types them."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm
import yaml
from tiny import SENTENCES, tiny_conversations, tiny_ranks, tiny_tokenizer, write_jsonl, write_ranks
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


def commands(name: str) -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(rf"<!-- tested: {name} -->\n(.*?)<!-- /tested -->", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", "").split("\n") if line.strip()]


def ran(command: str, folder: Path) -> subprocess.CompletedProcess:
    """The program itself, without the launcher, which has tests of its own."""
    program = re.match(r"(accelerate launch|python) train\.py ", command)
    return warm.run(shlex.split(command[program.end() :]), cwd=folder, timeout=300)


def test_adapting_a_llama_folder_on_ones_own_jsonl(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tok")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )  # untied
    LlamaForCausalLM(config).save_pretrained(tmp_path / "my-llama")
    tokenizer.save_pretrained(tmp_path / "my-llama")
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    write_jsonl(
        tmp_path / "my.jsonl",
        [
            {"messages": [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]]}
            for row in tiny_conversations(150)
        ],
    )
    found = commands("adapt")
    assert len(found) == 5
    for command in found:
        done = ran(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    told = json.loads((tmp_path / "outputs/mini/mine/summary.json").read_text())
    assert told["status"] == "done" and told["loss"] < told["first_loss"]
    assert json.loads((tmp_path / "outputs/mini/sft_lora/summary.json").read_text())["merge_difference"] < 1e-4
    assert json.loads((tmp_path / "outputs/mini/sft-smoke/summary.json").read_text())["steps"] == 2


# What the test changes in the commands for the real thing: sizes, and nothing else.
SMALL_MODEL = (
    "model.hidden_size=32 model.intermediate_size=64 model.num_attention_heads=2 model.num_key_value_heads=1 "
    "model.head_dim=16 model.num_hidden_layers=2 model.vocab_size=null"
)
SMALL_RUN = "train.max_steps=2 train.max_length=64 train.tokens_per_step=128"
SMALL = {"pretrain": f"{SMALL_MODEL} {SMALL_RUN}", "anneal": SMALL_RUN, "sft": SMALL_RUN.replace("64", "128")}


@pytest.mark.slow
def test_the_way_from_text_to_a_tuned_model_at_the_real_scale(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tok")
    write_ranks(tmp_path / "qwen.tiktoken", tiny_ranks(tokenizer))
    write_jsonl(tmp_path / "my.jsonl", tiny_conversations(60))
    for name, is_english in (("en", True), ("zh", False)):
        lines = [line for line in SENTENCES if line.isascii() is is_english]
        records = [{"text": " ".join(lines[i:] + lines[:i])} for i in range(len(lines))]
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    found = commands("real") + commands("fresh")
    recipes = ["tokenizer", "prepare", "pretrain", "anneal", "sft", "sft"]
    assert [re.search(r"recipe=(\w+)", c)[1] for c in found] == recipes
    for command in found:
        recipe = re.search(r"recipe=(\w+)", command)[1]
        more = SMALL_MODEL if "run_name=fresh" in command else SMALL.get(recipe, "")
        command = re.sub(r"step-\d+", "step-000002", command)
        done = ran(f"{command} {more}", tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    told = json.loads((tmp_path / "outputs/135m/sft/summary.json").read_text())
    assert told["status"] == "done" and told["demo"] is False and told["steps"] == 2
    assert json.loads((tmp_path / "outputs/135m/fresh/summary.json").read_text())["steps"] == 30


def test_every_setting_that_the_readme_names_exists():
    """`group.key=` anywhere in the README is a setting of some recipe, or an axis of the study's plan."""
    sys.path.insert(0, str(ROOT))
    from aquila_sft.config.runs import SCHEMAS
    from aquila_sft.door import setting_names

    known = {name for schema in SCHEMAS.values() for name in setting_names(schema)}
    plan = yaml.safe_load((ROOT / "recipes/study/plan.yaml").read_text("utf-8"))
    known |= {f"axes.{axis}" for axis in plan["axes"]}
    for page in ("README.md", "README.zh-CN.md"):
        named = set(re.findall(r"(?<![\w.])([a-z]+(?:\.[a-z_]+)+)=", (ROOT / page).read_text("utf-8")))
        assert named and named <= known, named - known


def test_the_chinese_page_has_the_commands_and_the_output_of_the_english_one():
    pages = [(ROOT / page).read_text("utf-8") for page in ("README.md", "README.zh-CN.md")]
    english, chinese = (
        {
            line.split(" #")[0].strip()
            for line in page.split("\n")
            if re.match(r" {4}(python|accelerate|make|pip|torchrun) ", line)
        }
        for page in pages
    )
    assert len(chinese) > 15 and chinese == english, chinese ^ english
    first, second = (re.search(r"<!-- demo output -->\n(.*?)<!-- /demo output -->", p, re.DOTALL)[1] for p in pages)
    assert first == second and "facts right, zh" in first
