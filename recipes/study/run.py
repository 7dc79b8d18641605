"""Runs of a study, each a process of train.py with its evaluation behind it, several at a time.

    Run -> train.py recipe=sft …, a command a stage -> <out>/runs/<name>/<stage>/ with eval/ in the last

What is finished is not begun again, what was broken off goes on: train.py's own doing. Of several at a time each has
its share of the cores, and one of the GPUs that CUDA_VISIBLE_DEVICES names (without it, of all there are).
"""

import functools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from aquila_sft.errors import UserError
from recipes.study.plan import OWN, Run, Settings

TRAIN = Path(__file__).parents[2] / "train.py"
DONE = "study.json"  # in the folder of a command that ended well: its words


def word(value: object) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(word, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def words(settings: Settings) -> list[str]:
    return [f"{key}={word(value)}" for key, value in settings.items()]


def jobs_of(run: Run, plan: dict, text: dict[str, str]) -> list[tuple[Path, list[str]]]:
    """The folder and the words of train.py of every stage."""
    out = Path(plan["out"])
    made, base = [], plan["base"]
    for number, (stage, folder) in enumerate(zip(run.stages, folders_of(run, plan), strict=True), 1):
        chosen = stage.get("sources") or list(plan["data"])
        settings = {
            "recipe": "sft",
            "scale": plan["scale"],
            "seed": run.seed,
            "model.path": base,
            "data.files": [str(out / "train" / f"{source}.jsonl") for source in chosen],
            "data.decontaminate": str(out / "items"),
            "data.cache": str(out / "cache"),
            "output_dir": str(folder),
            "train.save_steps": 10**6,
        } | own(stage)
        if stage.get("data.text.share"):
            settings.setdefault("data.text.shards", plan["text"])
        if number == len(run.stages):
            tasks = ["references", "instruct_zh", "instruct_en", *(["text"] if text else [])]
            settings["evaluate"] = {"tasks": tasks, "references": held_back(plan)} | plan["evaluate"]
            if text:
                settings["evaluate"]["text"] = text
        made.append((folder, words(settings)))
        base = f"{folder}/final"
    return made


def base_command(plan: dict, text: dict[str, str]) -> list[str]:
    """The base before tuning: text, and answers where its folder knows the marks of a chat. Empty for neither."""
    answers = knows_chats(plan["base"])
    tasks = ["references"] * answers + ["text"] * bool(text)
    about = {"recipe": "eval", "scale": plan["scale"], "model.path": plan["base"], "eval.tasks": tasks}
    about |= {"eval.references": held_back(plan)} if answers else {}
    about |= {"data.files": text} if text else {}
    return words(about | {"output_dir": str(Path(plan["out"]) / "base")}) if tasks else []


def find_base(base: str) -> None:
    """A folder, or from the Hub. Raises UserError, once instead of in every run."""
    from aquila_sft import hub, runtime

    runtime.settle(offline=False)
    try:
        hub.model_folder(base, None)
    except UserError as error:
        raise UserError(f"base: {error}") from None


@functools.cache
def knows_chats(base: str) -> bool:
    """Whether it is a folder, and its tokenizer has what conversations are written with."""
    from aquila_sft.stages.eval import needs_chat
    from aquila_sft.tokenizer import load_tokenizer

    folder = Path(base).expanduser()
    if not folder.is_dir():
        return False
    tokenizer = load_tokenizer(folder)
    try:
        needs_chat(folder, tokenizer)
    except UserError:
        return False
    return True


def held_back(plan: dict) -> list[str]:
    return [str(Path(plan["out"]) / "held-back" / f"{source}.jsonl") for source in plan["data"]]


def own(stage: Settings) -> Settings:
    """A stage's settings of train.py."""
    return {key: value for key, value in stage.items() if key not in OWN}


def done_in(folder: Path) -> list[str]:
    """The words of the command that ended well in that folder; none, where none did."""
    try:
        return json.loads((folder / DONE).read_text("utf-8"))
    except (OSError, ValueError):
        return []


def is_finished(run: Run, plan: dict, text: dict[str, str]) -> bool:
    """Whether every stage was trained as the plan now says; only then its figures are the plan's."""
    return all(done_in(folder) == command for folder, command in jobs_of(run, plan, text))


def folders_of(run: Run, plan: dict) -> list[Path]:
    """Of its stages."""
    return [Path(plan["out"]) / "runs" / run.name / str(number) for number in range(1, len(run.stages) + 1)]


def run_all(jobs: dict[str, list[tuple[Path, list[str]]]], at_once: int, say: Callable[[str], None]) -> dict[str, str]:
    """Each job's commands in order, jobs side by side; {job: why it failed}. Ctrl-C ends all in good order."""
    waiting: queue.Queue = queue.Queue()
    for job in jobs.items():
        waiting.put(job)
    failed: dict[str, str] = {}
    is_over = threading.Event()

    def work(slot: int) -> None:
        while not is_over.is_set():
            try:
                name, commands = waiting.get_nowait()
            except queue.Empty:
                return
            for folder, command in commands:
                if done_in(folder) == command:
                    continue
                say(f"  {name}")
                try:
                    why = run_one(folder, command, slot, at_once)
                except OSError as error:
                    why = str(error)
                if why:
                    failed[name] = why
                    say(f"  {name}: {why}")
                    break

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:  # the processes have it too: same group
        is_over.set()
        for thread in threads:
            thread.join()
        raise
    return failed


def run_one(folder: Path, command: list[str], slot: int, at_once: int) -> str | None:
    """None when it ended well, else why."""
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    mine = cores[slot::at_once]
    env = dict(os.environ)
    if cores:
        env["OMP_NUM_THREADS"] = str(max(1, len(mine)))
    if at_once > 1 and (gpus := gpus_here()):
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    log = folder.with_name(f"{folder.name}.log")
    status = train(command, log, env, mine if at_once > 1 else [])
    if status:
        return f"{reason(log, status)} ({log})"
    (folder / DONE).write_text(json.dumps(command), "utf-8")
    return None


def reason(log: Path, status: int) -> str:
    """What train.py said last of an end that was none; of a process that was killed its status and its last line."""
    lines = [line.split("\r")[-1] for line in log.read_text("utf-8", "replace").strip().splitlines()] or [""]
    said = (line for line in reversed(lines) if line.startswith(("error: ", "stopped: ")))
    return next(said, f"status {status}; its last line: {lines[-1]}")


def gpus_here() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(torch.cuda.device_count())] if named is None else [n for n in named.split(",") if n]


def train(command: list[str], log: Path, env: dict[str, str], cores: list[int]) -> int:
    """train.py in a process of its own, on these cores (none: all); its exit status."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *command], stdout=file, stderr=subprocess.STDOUT, env=env
        )
        if cores:
            os.sched_setaffinity(process.pid, cores)
        return process.wait()
