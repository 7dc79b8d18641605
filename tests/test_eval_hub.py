"""`make verify-hub` against a stand-in: a Hub on loopback that holds a tiny model where the published ones are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hub import REPOSITORIES, fake_hub  # noqa: F401
from tiny import tiny_model, tiny_tokenizer

from aquila_sft.evaluation import results, verify_hub

ROOT = Path(__file__).parents[1]
COMMIT = "1123456789abcdef0123456789abcdef01234567"
PROMPTS = ["The river rises in the hills", "中国的首都是北京"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files of a checkpoint in its subfolder, and its next tokens."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = tiny_tokenizer(folder)
    model = tiny_model(folder, tokenizer, initializer_range=0.3)
    prompts = []
    for text in PROMPTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            top = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1).topk(3)
        shares = [
            [[i, round(p, 5)] for i, p in zip(a, b, strict=True)]
            for a, b in zip(top[1].tolist(), top[0].tolist(), strict=True)
        ]
        prompts.append({"text": text, "ids": ids, "top": {"9": shares}})
    golden = {"repo": "BAAI/Aquila-135M-Intermediate", "subfolders": {"9": "pretrain/iter_9_hf"}, "prompts": prompts}
    files = {f"pretrain/iter_9_hf/{f.name}": f.read_bytes() for f in folder.iterdir() if f.is_file()}
    return golden, files


def verify(hub, golden: dict, tmp_path) -> subprocess.CompletedProcess:
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "aquila_sft.evaluation.verify_hub", "--only", "tokens", "--golden", "golden.json"]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


def test_next_tokens_of_a_published_checkpoint_are_compared(published, fake_hub, tmp_path, monkeypatch):  # noqa: F811
    golden, files = published
    monkeypatch.setitem(REPOSITORIES, "models/BAAI/Aquila-135M-Intermediate", (COMMIT, files))
    done = verify(fake_hub, golden, tmp_path)
    assert done.returncode == 0 and "all of it agrees" in done.stdout, done.stdout + done.stderr
    other = json.loads(json.dumps(golden))
    other["prompts"][0]["top"]["9"][2][0][1] += 0.2  # a probability
    other["prompts"][1]["ids"][0] += 1
    done = verify(fake_hub, other, tmp_path)
    assert done.returncode == 1 and "2 differences" in done.stdout, done.stdout + done.stderr
    assert "behind token 3" in done.stdout and "ids [" in done.stdout


def test_without_access_it_says_so_in_one_line(published, fake_hub, tmp_path):  # noqa: F811
    fake_hub.mode = "private"
    done = verify(fake_hub, published[0], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot get model BAAI/Aquila-135M-Intermediate")
    assert len(done.stderr.strip().split("\n")) == 1


def test_rows_within_error_of_either_of_the_cards_columns_agree():
    def line(row: str, value: float) -> dict:
        return vars(results.Score(row, value, 1.2, 50.0, 1838))

    assert verify_hub.far_from_card([line("PIQA", 66.0), line("Winogrande", 52.5)]) == []
    assert verify_hub.far_from_card([line("PIQA", 55.0)]) == ["PIQA: 55.00, the card 66.38 and 67.52"]


def test_the_public_next_tokens_are_sourced_and_have_the_published_vocabularys_ids():
    golden = json.loads((ROOT / "data/golden_next_tokens.json").read_text("utf-8"))
    assert "lenslapse" in golden["source"] and golden["repo"] == "BAAI/Aquila-135M-Intermediate"
    assert golden["prompts"][0]["ids"] == [785, 6722, 315, 6323, 374, 279, 3283, 315]
    for prompt in golden["prompts"]:
        for step in golden["subfolders"]:
            assert len(prompt["top"][step]) == len(prompt["ids"])
            assert all(0 <= i < 151851 and 0 < share < 1 for top in prompt["top"][step] for i, share in top)
