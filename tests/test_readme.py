"""The README's commands, as a new user types them."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tiny import tiny_conversations, tiny_tokenizer, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


def commands(name: str) -> list[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(rf"<!-- tested: {name} -->\n(.*?)<!-- /tested -->", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.split("\n") if line.strip()]


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
        words = shlex.split(command.replace("python train.py", f"{sys.executable} {ROOT / 'train.py'}"))
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    told = json.loads((tmp_path / "outputs/mini/mine/summary.json").read_text())
    assert told["status"] == "done" and told["loss"] < told["first_loss"]
    assert json.loads((tmp_path / "outputs/mini/sft_lora/summary.json").read_text())["merge_difference"] < 1e-4
    assert json.loads((tmp_path / "outputs/mini/sft-smoke/summary.json").read_text())["steps"] == 2


def test_every_setting_that_the_readme_names_exists():
    """`group.key=` anywhere in the README is a setting of some recipe."""
    sys.path.insert(0, str(ROOT))
    from aquila_sft.config import SCHEMAS
    from aquila_sft.door import setting_names

    known = {name for schema in SCHEMAS.values() for name in setting_names(schema)}
    for page in ("README.md", "README.zh-CN.md"):
        named = set(re.findall(r"\b([a-z]+\.[a-z_]+)=", (ROOT / page).read_text("utf-8")))
        assert named and named <= known, named - known
