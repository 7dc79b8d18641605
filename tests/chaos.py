"""kill -9 at any instant, the same command again, and a comparison with the run that nobody disturbed.

    python tests/chaos.py 100          a hundred kills over all recipes and instants, and the score

A small model, the real recipes. The process kills itself (dying.py), so that the instant lies in what it is meant for.
A run is killed up to three times before it may end. Equal means: every file of final/, of the last checkpoints
(weights, optimizer, scheduler), of the adapter, the ledger, every logged figure but time and memory, to the last bit.
"""

import collections
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import warm
from dying import INSTANTS
from tiny import SENTENCES, TINY_ARCHITECTURE, tiny_conversations, tiny_model, tiny_tokenizer, write_jsonl

DYING = Path(__file__).with_name("dying.py")
# For the server too, which reads them when it imports: threads that spin starve each other on a busy machine, and a run
# that is all local looks up no host.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
RECIPES = ("pretrain", "anneal", "sft", "sft_lora")
KILLS_A_RUN = 3


# ---- what is killed ----


class World:
    """Shards, a base and conversations in a folder, and the unbroken run of each recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = tiny_tokenizer(folder / "tok")
        tiny_model(folder / "base", tokenizer)
        write_jsonl(folder / "chat.jsonl", tiny_conversations(30))
        for name, lines in (
            ("en", [line for line in SENTENCES if line.isascii()]),
            ("zh", [line for line in SENTENCES if not line.isascii()]),
        ):
            texts = [f"{i}. " + " ".join((lines[i % len(lines) :] + lines)[:8]) for i in range(20)]
            write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        self.prepare()
        self.unbroken: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        for recipe in RECIPES:
            self.unbroken[recipe], began = folder / f"{recipe}-unbroken", time.monotonic()
            self.finish(recipe, self.unbroken[recipe])
            self.seconds[recipe] = time.monotonic() - began

    def prepare(self) -> None:
        folder = self.folder
        words = {
            "recipe": "prepare",
            "scale": "mini",
            "data.files": f"{{english: {folder}/en.jsonl, chinese: {folder}/zh.jsonl}}",
            "tokenizer.path": folder / "tok",
            "output_dir": folder / "prepared",
            "prepare.holdout_fraction": 0.1,
        }
        done = warm.run([f"{key}={value}" for key, value in words.items()])
        assert done.returncode == 0, done.stderr

    def words(self, recipe: str, out: Path) -> list[str]:
        words = {
            "recipe": recipe,
            "scale": "mini",
            "output_dir": out,
            "train.max_length": 64 if recipe in ("pretrain", "anneal") else 128,
            "train.tokens_per_step": 512,
            "train.micro_batch_rows": 2,
            "train.logging_steps": 1,
            "train.save_steps": 2,
            "train.eval_steps": 3,
            "train.keep_checkpoints": 2,
        }
        if recipe in ("pretrain", "anneal"):
            words |= {
                "data.shards": self.folder / "prepared",
                "data.sources": "{english: 1, chinese: 1}",
                "train.max_steps": 8,
                "train.total_tokens": "null",
                **TINY_ARCHITECTURE,
            }
            if recipe == "anneal":
                words["model.path"] = self.unbroken["pretrain"] / "checkpoints/step-000006"
        else:
            words |= {
                "model.path": self.folder / "base",
                "data.files": self.folder / "chat.jsonl",
                "train.max_steps": "null",
                "train.num_epochs": 2.5,
                "data.holdout_fraction": 0.3,
            }
        return [f"{key}={value}" for key, value in words.items()]

    def finish(self, recipe: str, out: Path) -> None:
        done = warm.run(self.words(recipe, out))
        assert done.returncode == 0, done.stderr

    def killed(self, recipe: str, out: Path, instant: str, seed: str) -> bool:
        """True when the process died at the instant; False when it ended first."""
        words = [instant, seed, self.seconds[recipe], *self.words(recipe, out)]
        done = warm.run(words, script=DYING)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode != 0

    def differences(self, recipe: str, out: Path) -> list[str]:
        """What differs from the unbroken run; nothing, if all is well."""
        return [name for name, of_a_run in EQUAL.items() if of_a_run(out) != of_a_run(self.unbroken[recipe])]


def written(folder: Path) -> dict | str | None:
    """The files of a folder with a manifest, by content."""
    from aquila_sft import checkpoint

    if not folder.is_dir():
        return None
    return checkpoint.problem(folder) or json.loads((folder / checkpoint.MANIFEST).read_text())["files"]


def figures(out: Path) -> list[dict]:
    of_time = ("seconds", "tokens_per_s", "peak_memory_bytes", "data_wait_share")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in of_time} for line in lines]


EQUAL = {
    "final": lambda out: written(out / "final"),
    "checkpoints": lambda out: {p.name: written(p) for p in sorted((out / "checkpoints").iterdir())},
    "adapter": lambda out: written(out / "adapter"),
    "ledger": lambda out: json.loads((out / "ledger.json").read_text()),
    "metrics": figures,
    "names": lambda out: sorted(p.name for p in out.iterdir()),
}


def rounds(world: World, kills: int, seed: str) -> collections.Counter:
    """Kills spread over recipes and instants; {(recipe, instant, 'equal' or what differs): kills}."""
    chance, score, deck = random.Random(seed), collections.Counter(), []
    for number in itertools.count():
        if (count := sum(score.values())) == kills:
            return score
        if not deck:
            deck = chance.sample(list(INSTANTS), len(INSTANTS))
        chosen, deck = sorted(deck[:KILLS_A_RUN], key=list(INSTANTS).index), deck[KILLS_A_RUN:]  # as a run meets them
        recipe = RECIPES[number % len(RECIPES)]
        out = world.folder / f"{recipe}-{number}"
        tried = (i for i in chosen if world.killed(recipe, out, i, f"{seed}-{number}-{i}"))
        instants = list(itertools.islice(tried, kills - count))
        world.finish(recipe, out)
        verdict = ", ".join(world.differences(recipe, out)) or "equal"
        score.update((recipe, instant, verdict) for instant in instants)
        if verdict == "equal":
            shutil.rmtree(out)
        else:
            print(f"{recipe} after kills {instants}: {verdict} differ, kept in {out}", flush=True)


def table(score: collections.Counter) -> str:
    lines = [f"{'killed …':<18}" + "".join(f"{recipe:>10}" for recipe in RECIPES)]
    for instant in INSTANTS:
        cells = []
        for recipe in RECIPES:
            all_of = sum(n for (r, i, _), n in score.items() if (r, i) == (recipe, instant))
            cells.append(f"{score[recipe, instant, 'equal']}/{all_of}" if all_of else "-")
        lines.append(f"{instant:<18}" + "".join(f"{cell:>10}" for cell in cells))
    equal = sum(n for (*_, verdict), n in score.items() if verdict == "equal")
    return "\n".join([*lines, f"{equal} of {sum(score.values())} kills ended bitwise where the unbroken run ends"])


def main(kills: int, seed: str) -> int:
    folder, began = Path(tempfile.mkdtemp(prefix="chaos-")), time.monotonic()
    world = World(folder)
    score = rounds(world, kills, seed)
    print(table(score))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes, seed {seed}")
    if any(verdict != "equal" for *_, verdict in score):
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, sys.argv[2] if len(sys.argv) > 2 else "1"))
