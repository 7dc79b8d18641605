"""recipe=eval: benchmarks as recipes/eval/ defines them, instruction following, bits per byte; a table like the card's.

model -> items -> scorer with its journal -> lm-eval -> results.md, results.csv, results.json, answers.jsonl
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from aquila_sft import narration, prerequisites, run_dir, runtime
from aquila_sft.config.model import Model
from aquila_sft.config.runs import EvalRun, Run
from aquila_sft.errors import UserError
from aquila_sft.evaluation import benchmarks
from aquila_sft.evaluation import items as read_items
from aquila_sft.saved_model import find_model, is_local

GPU_TOKENS, CPU_TOKENS = 65_536, 4_096  # of one forward pass


def check(cfg: EvalRun) -> list[str]:
    """The benchmarks that are asked for. Raises UserError where something they need is not given."""
    names = benchmarks.asked(cfg.eval.tasks)
    if any(name in benchmarks.GROUPS["card"] for name in names) and cfg.eval.data is None:
        raise UserError("eval.data is not set: add eval.data=hub, or eval.data=<folder with the benchmarks' files>")
    if "references" in names and cfg.eval.references is None:
        raise UserError("eval.tasks=references reads conversations: add eval.references=<file, list or glob>")
    if cfg.eval.before is not None and "text" not in names:
        raise UserError(f"eval.before={cfg.eval.before} is compared on plain text: add text to eval.tasks=")
    return names


def run(cfg: EvalRun, compose_run: Callable) -> None:
    names = check(cfg)
    narration.opening(cfg)
    prerequisites.fill(cfg, compose_run)
    models = [cfg.model.path, *([cfg.eval.before] if cfg.eval.before else [])]
    runtime.settle(offline=cfg.eval.data != "hub" and all(map(is_local, models)))
    out = Path(cfg.output_dir)
    run_dir.make_folder(out)
    with runtime.StopSignal(), run_dir.locked(out) if runtime.is_main() else contextlib.nullcontext():
        with runtime.main_process_first():
            folder = find_model(cfg.model, cfg.scale)
            before = find_model(model_before(cfg), cfg.scale) if cfg.eval.before else None
            given = read(cfg, names, out)
        join_processes()
        begun = time.monotonic()
        found = measure(cfg, names, given, folder, before, out)
    if runtime.is_main():
        finish(cfg, out, folder, found, time.monotonic() - begun)


def of_training(cfg: Run, compose_run: Callable) -> EvalRun:
    """What `evaluate={tasks: […], …}` of a training asks for, checked; `text` in it: the files of eval.tasks=[text]."""

    def word(value: object) -> str:
        if isinstance(value, dict):
            return f"{{{','.join(f'{name}: {word(files)}' for name, files in value.items())}}}"
        return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)

    names = {"text": "data.files"}
    words = [f"{names.get(key, f'eval.{key}')}={word(value)}" for key, value in cfg.evaluate.items()]
    paths = [f"model.path={cfg.output_dir}/final", f"output_dir={cfg.output_dir}/eval"]
    found = compose_run(["recipe=eval", f"scale={cfg.scale}", *paths, *words])
    check(found)
    return found


def after_training(cfg: EvalRun, compose_run: Callable) -> None:
    """In the main process alone: the others have done their part."""
    if runtime.is_main():
        with runtime.alone():
            run(cfg, compose_run)


def model_before(cfg: EvalRun) -> Model:
    return dataclasses.replace(cfg.model, path=cfg.eval.before, revision=None, subfolder=None)


def read(cfg: EvalRun, names: list[str], out: Path) -> dict:
    """Everything that is asked, before a model is loaded: {name: items by part, records or texts}."""
    from aquila_sft.data import documents

    given: dict = {}
    for name in names:
        if name in benchmarks.GROUPS["card"]:
            benchmark = benchmarks.load(name)
            given[name] = read_items.read(benchmark, cfg.eval.data, out / "data", cfg.eval.limit)
        elif name == "ifeval":
            from aquila_sft.evaluation import instruct

            given[name] = instruct.ifeval_records(cfg.eval.data, out / "data", cfg.eval.limit)
        elif name in ("instruct_zh", "instruct_en"):
            from aquila_sft.evaluation import instruct

            given[name] = read_items.json_lines(instruct.OWN[name])[: cfg.eval.limit]
        elif name == "references":
            from aquila_sft.evaluation import instruct

            given[name] = instruct.read_references(cfg.eval.references, cfg.eval.limit)
        elif name == "text":
            from aquila_sft.evaluation import plain_text

            files = documents.find(cfg.data, Path(f"outputs/{cfg.scale}/world"))
            given[name] = plain_text.read(files, cfg.data.text_column, cfg.eval.limit)
    return given


def join_processes() -> None:
    """Answers are exchanged as objects, on the CPU: gloo does that beside any device."""
    if runtime.world_size() > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")


def load_scorer(cfg: EvalRun, folder: Path, out: Path):
    """A Scorer and what it computes with."""
    import os

    import torch

    from aquila_sft import device as devices
    from aquila_sft import model as models
    from aquila_sft import settle, swap
    from aquila_sft.evaluation.journal import Journal
    from aquila_sft.evaluation.scorer import Scorer, Settings, autocast_of
    from aquila_sft.tokenizer import load_tokenizer, tokenizer_sha256

    runtime.set_threads(runtime.world_size())
    device = devices.of_this_machine()
    kernel, _ = swap.choose_kernel(cfg.kernel, device)
    precision, _ = devices.choose_precision(cfg.eval.precision, device)
    tokenizer = load_tokenizer(folder, converted_to=out / "tokenizer")
    tokenizer.model_max_length = 10**9  # texts are cut to the model by us
    model = models.load(folder).eval()
    if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} entries and the model's embedding {rows} rows")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    model.to(device)
    swap.install(model, kernel, asked=cfg.kernel.value == "triton")
    for check in (settle.check_head, settle.check_loss):
        check(model, device, autocast_of(device, precision.value)())
    identity = {
        "model": run_dir.folder_sha256(folder, "*.safetensors", "config.json"),
        "tokenizer": tokenizer_sha256(tokenizer),
        "arithmetic": f"{device} {kernel} {precision.value}",
    }
    batch_tokens = cfg.eval.batch_tokens or (GPU_TOKENS if device == "cuda" else CPU_TOKENS)
    settings = Settings(batch_tokens, cfg.eval.share_prefixes, autocast_of(device, precision.value))
    return Scorer(model, tokenizer, Journal(out / "journal", run_dir.digest(identity)), settings), identity


def measure(cfg: EvalRun, names: list[str], given: dict, folder: Path, before: Path | None, out: Path) -> dict:
    """{scores, other tables, answers by task, about} of everything that was asked."""
    from aquila_sft.evaluation import bits, engine, instruct, plain_text, results

    scorer, identity = load_scorer(cfg, folder, out)
    if scorer.journal.answers:
        runtime.say(f"  goes on: {len(scorer.journal.answers):,} answers of this model are there already")
    defined = {name: benchmarks.load(name) for name in names if name in benchmarks.GROUPS["card"]}
    rows = {name: [engine.task(b, part, given[name][part]) for part in b.parts] for name, b in defined.items()}
    chats, text = [], None
    if set(benchmarks.INSTRUCT) & set(names):
        needs_chat(folder, scorer.tokenizer)
    for name, follow in (("ifeval", instruct.ifeval_follow), *((own, instruct.own_follow) for own in instruct.OWN)):
        if name in names:
            limit = cfg.eval.max_new_tokens
            chats.append(instruct.chat_task(name, scorer, given[name], limit, choosing_of(cfg), follow))
    if "text" in names:
        text = plain_text.task(given["text"])
    tasks = [*(task for listed in rows.values() for task in listed), *chats, *([text] if text else [])]
    outcomes = engine.run(scorer, tasks) if tasks else {}  # by task
    scores = {name: results.row(defined[name], given[name], outcomes) for name in defined}
    other = {}
    if chats:
        other["Instruction following, with the chat template"] = instruct.table(chats)
    if "references" in names:
        outcomes["references"] = instruct.references(scorer, given["references"])
        other["Reference answers"] = bits.table("answers", outcomes["references"])
    if text:
        if before:
            first, _ = load_scorer(cfg, before, out)
            outcomes["text before"] = engine.run(first, [plain_text.task(given["text"])])["text"]
        other["Bits per byte of text"] = bits.table("documents", outcomes["text"], outcomes.get("text before"))
    return {
        "scores": [*scores.values(), *results.averages(scores).values()],
        "other": other,
        "outcomes": outcomes,
        "tokens": of_all_processes(scorer.tokens),
        "identity": identity,
    }


def choosing_of(cfg: EvalRun):
    """How answers in chats are chosen, token by token."""
    from aquila_sft.evaluation.choosing import Choosing

    asked = cfg.eval
    seed = cfg.seed if asked.temperature else 0
    return Choosing(asked.temperature, asked.top_p if asked.temperature else 1.0, asked.repetition_penalty, seed)


def of_all_processes(count: int) -> int:
    if runtime.world_size() == 1:
        return count
    import torch
    import torch.distributed as dist

    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def needs_chat(folder: Path, tokenizer) -> None:
    from aquila_sft.chat_template import encode_messages

    try:
        encode_messages(tokenizer, [{"role": "user", "content": ""}], add_generation_prompt=True)
    except UserError as error:
        raise UserError(f"{folder} is not tuned for chat ({error}); leave instruct out of eval.tasks=") from None


def finish(cfg: EvalRun, out: Path, folder: Path, found: dict, seconds: float) -> None:
    from aquila_sft import device as devices
    from aquila_sft.evaluation import results

    about = {
        "tasks": ", ".join(cfg.eval.tasks),
        "data": cfg.eval.data or "–",
        "limit": cfg.eval.limit or "all items",
        "arithmetic": found["identity"]["arithmetic"],
        "weights": found["identity"]["model"][:16],
        "seconds": round(seconds, 1),
        "tokens": found["tokens"],
        "peak memory": f"{devices.peak_memory_bytes() / 1e9:.2f} GB",
    }
    if set(benchmarks.CHATS) & set(found["outcomes"]):
        about["answers"] = f"{cfg.eval.max_new_tokens} tokens at most, {choosing_of(cfg).told()}"
    name = cfg.model.path or str(folder)
    text = results.write(out, name, found["scores"], found["other"], about)
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for task, outcomes in found["outcomes"].items():
            for number, outcome in enumerate(outcomes):
                line = {"task": task, "item": number, **outcome.as_line()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    run_dir.write_json(
        out / "summary.json", {"status": "done", "stage": "eval", "recipe": "eval", "model": name, **about}
    )
    runtime.say(text)
    narration.closing(cfg, f"{out}/results.md, results.csv, results.json, answers.jsonl", what_next={})
