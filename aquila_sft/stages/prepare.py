"""recipe=prepare: text becomes tokenized shards, without copies and benchmark items, a share of it held back.

files -> tokenizer -> run directory -> data/: the steps of aquila_sft/data/steps.py
data/ -> ledger.json, final/: tokenizer/, train/, held-back/, MANIFEST.json
"""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aquila_sft import checkpoint, hub, narration, prerequisites, run_dir, runtime
from aquila_sft.config.data import Executor, PrepareData
from aquila_sft.config.runs import PrepareRun
from aquila_sft.data import documents, sources
from aquila_sft.data.index_step import index_of
from aquila_sft.data.ledger import why_left_out
from aquila_sft.data.shards import Prepared
from aquila_sft.errors import Stopped, UserError
from aquila_sft.inputs import give_padding, named_vocabulary

INPUT = "input.json"  # hashes of the input's files
VOCABULARY_FILES = ("tokenizer*.json", "special_tokens_map.json", "qwen.tiktoken")
# Nothing here is drawn or computed with the first two; the others say who works, and on how much at a time.
NOT_IDENTITY = ("seed", "kernel", "prepare.slice_mb", "prepare.workers", "prepare.executor", "prepare.tasks")
NOT_IDENTITY_GROUPS = ("data.files.", "data.corpora", "data.languages", "data.download_gb", "prepare.slurm")


def run(cfg: PrepareRun, compose_run: Callable[[list[str]], object]) -> None:
    from_hub = cfg.data.files is None and bool(cfg.data.corpora)
    runtime.settle(offline=not from_hub)
    if runtime.world_size() > 1:
        raise UserError(f"recipe=prepare is one process's work; {runtime.world_size()} were launched")
    narration.opening(cfg)
    prerequisites.fill(cfg, compose_run)
    vocabulary = find_vocabulary(cfg)
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.StopSignal())
        corpora = fetch(cfg.data) if from_hub else {}
        files = {name: corpus.files for name, corpus in corpora.items()}
        files = files or documents.find(cfg.data, Path(f"outputs/{cfg.scale}/world"))
        hashed = hashes_of(files, run_dir.read_json(Path(cfg.output_dir) / INPUT) or {})
        out = stack.enter_context(run_dir.opened(cfg, identity_of(cfg, vocabulary, files, hashed)))
        run_dir.write_json(out.path / INPUT, hashed)
        reused = out.is_finished() and is_whole(out)
        if not reused:
            with out.recorded(cfg), checkpoint.room(out.path):
                prepare(cfg, out, vocabulary, files, corpora)
        clear_work(out)  # it is done by now, whatever stops this
        closing(cfg, out, "is finished and of the same text and settings: reused, nothing done" if reused else "done")


def find_vocabulary(cfg: PrepareRun) -> Path:
    """The rank file or the tokenizer's folder."""
    if not (cfg.tokenizer.ranks or cfg.tokenizer.path):
        raise UserError(
            "recipe=prepare needs a tokenizer: add tokenizer.path=<folder>, or tokenizer=aquila "
            "tokenizer.ranks=<qwen.tiktoken> for the published vocabulary"
        )
    path = named_vocabulary(cfg.tokenizer)
    if path.is_dir() and not files_of(path):
        raise UserError(f"tokenizer.path={path} holds no vocabulary (none of {', '.join(VOCABULARY_FILES)})")
    return path


def files_of(vocabulary: Path) -> list[Path]:
    """What it consists of."""
    if vocabulary.is_file():
        return [vocabulary]
    return sorted(f for pattern in VOCABULARY_FILES for f in vocabulary.glob(pattern))


def hashes_of(files: dict[str, list[Path]], known: dict[str, dict]) -> dict[str, dict]:
    """{file: its sha256 and look}, several at once. One that looks as it is known is not read: not a terabyte a start.
    look: sources.settled_look, None for a file that could have changed again without looking so.
    """

    def hashed(file: Path) -> dict:
        before = sources.settled_look(file)
        return {"sha256": checkpoint.sha256(file), "look": before}

    paths = {str(path.absolute()): path for of_source in files.values() for path in of_source}
    kept = {n: known[n] for n, path in paths.items() if n in known and known[n]["look"] == sources.look(path)}
    new = [path for name, path in paths.items() if name not in kept]
    size = sum(path.stat().st_size for path in new)
    if size > 1e9:
        runtime.say(f"  hashing {size / 1e9:,.0f} GB of input, once")
    with ThreadPoolExecutor(runtime.cores()) as pool:
        return kept | dict(zip((str(path.absolute()) for path in new), pool.map(hashed, new), strict=True))


def identity_of(cfg: PrepareRun, vocabulary: Path, files: dict[str, list[Path]], hashed: dict[str, dict]) -> dict:
    """Settings and contents; the names of sources count, those of files do not."""
    from aquila_sft.data import decontaminate
    from aquila_sft.data.text_set import FORMAT

    settings = {
        key: value
        for key, value in run_dir.identity_of(cfg).items()
        if key not in NOT_IDENTITY and not key.startswith(NOT_IDENTITY_GROUPS)
    }
    contents = {
        f"data.files.{source}": run_dir.joined(hashed[str(path.absolute())]["sha256"] for path in paths)
        for source, paths in files.items()
    }
    if cfg.prepare.decontaminate:
        items = decontaminate.read(Path(cfg.prepare.decontaminate).expanduser())
        contents["prepare.decontaminate"] = decontaminate.sha256(items)
    return settings | contents | {"vocabulary": run_dir.files_sha256(files_of(vocabulary)), "format": FORMAT}


def is_whole(out: run_dir.RunDir) -> bool:
    """Sizes and headers only: who reads the shards checks their contents."""
    try:
        Prepared(out.final)
    except UserError as error:
        runtime.say(f"{error}: this is done now")
        return False
    return True


def fetch(data: PrepareData) -> dict[str, hub.DatasetFiles]:
    """The corpora of data.corpora, as many files of each as its share of data.download_gb allows."""
    weights = {name: weight for name, weight in data.corpora.items() if weight}
    manifests = {name: hub.manifest_of(name, "data.corpora") for name in weights}
    for name, about in manifests.items():
        if "language" not in about:
            raise UserError(
                f"data.corpora={name}: {about['repo']} holds conversations, not documents of a language; recipe=sft "
                f"trains on it (data.manifest={name}), and files of conversations can be given in data.files="
            )
    language_of = {name: about["language"] for name, about in manifests.items()}
    weight_of = {language: (data.languages or {}).get(language, 0.0) for language in set(language_of.values())}
    total = sum(weight_of.values())
    fetched = {}
    for name, weight in weights.items():
        language = language_of[name]
        beside = sum(w for other, w in weights.items() if language_of[other] == language)
        share = weight_of[language] / total * weight / beside if total else 0.0
        if share:
            at_most = None if data.download_gb is None else share * data.download_gb * 1e9
            fetched[name] = hub.dataset_files(name, manifests[name]["default_subset"], at_most)
    if not fetched:
        raise UserError(f"data.corpora={data.corpora} and data.languages={data.languages} leave no corpus")
    return fetched


def prepare(
    cfg: PrepareRun,
    out: run_dir.RunDir,
    vocabulary: Path,
    files: dict[str, list[Path]],
    corpora: dict[str, hub.DatasetFiles],
) -> None:
    from aquila_sft.data import slices, steps, tasks, text_set, workers
    from aquila_sft.tokenizer import save_tokenizer, tokenizer_sha256

    begun = time.monotonic()
    tokenizer = load_tokenizer(cfg, vocabulary, out)
    sha256 = tokenizer_sha256(tokenizer)
    slice_bytes = int(cfg.prepare.slice_mb * 2**20)
    folder = work_folder(out, slice_bytes)
    origin = slices.origin(files, slice_bytes)
    cut = slices.kept(folder, origin) or slices.cut(files, slice_bytes)
    slices.keep(folder, origin, cut)
    save_tokenizer(tokenizer, folder / "tokenizer")
    text_set.Encoder(tokenizer).save(folder / "encoder.json")
    work = steps.Work(
        folder=folder,
        slices=tuple(cut),
        policy=cfg.prepare,
        text_column=cfg.data.text_column,
        encoder=folder / "encoder.json",
        tokenizer_sha256=sha256,
        vocab_size=len(tokenizer),
    )
    if cfg.prepare.executor is Executor.processes:
        workers.run(work, cfg.prepare)
    elif not steps.is_done(work):
        workers.with_datatrove(work, cfg.prepare)
        if cfg.prepare.executor is Executor.slurm:
            raise Stopped("the jobs are submitted; when they are done, the same command finishes")
    parts = text_set.figures(steps.plan_of(work))
    report = about(cfg, files, work) | steps.ledger_of(work).as_dict()
    run_dir.write_json(out.path / "ledger.json", report)
    if not parts["train"]:
        raise UserError(nothing_left(report, files))
    out.begin()
    shutil.rmtree(out.final, ignore_errors=True)
    for left in [folder / "shards" / checkpoint.MANIFEST, *(folder / "shards").rglob(f"{tasks.ASIDE}*")]:
        checkpoint.remove(left)  # what a run was writing when it was killed
    shutil.copytree(folder / "tokenizer", folder / "shards" / "tokenizer", dirs_exist_ok=True)
    checkpoint.commit(
        folder / "shards",
        out.final,
        recipe=cfg.recipe,
        demo=cfg.demo,
        tokenizer_sha256=sha256,
        vocab_size=len(tokenizer),
        parts=parts["train"],
        held_back=parts["held-back"],
        sources={
            source: {"licence": None, "revision": None}
            | ({"licence": c.licence, "revision": c.revision, "repo": c.repo} if (c := corpora.get(source)) else {})
            for source in files
        },
    )
    write_summary(cfg, out, parts, report, time.monotonic() - begun)
    for name, part in parts["train"].items():
        held = parts["held-back"].get(name, {"documents": 0})["documents"]
        runtime.say(
            f"  {name}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
            f"{part['bytes_per_token']:.2f} bytes a token, {part['shards']} shard(s); {held:,} documents held back"
        )
    if report["left_out"]:
        runtime.say(f"  {report['left_out']:,} of {report['read']:,} records left out for {why_left_out(report)}")
    if not cfg.prepare.decontaminate:
        runtime.say("  no benchmark was looked for: prepare.decontaminate=<folder of benchmark items>")


def work_folder(out: run_dir.RunDir, slice_bytes: int) -> Path:
    """Where the tasks of this run leave what they make, and take up again; that of other settings is deleted."""
    identity = run_dir.read_json(out.path / "identity.json")["sha256"]
    folder = out.path / "data" / f"{identity[:16]}-{slice_bytes}"
    clear_work(out, but=folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear_work(out: run_dir.RunDir, but: Path | None = None) -> None:
    """Delete what tasks left. Whoever takes a folder up again believes what is in it, so half of one must not stay."""
    data = out.path / "data"
    if data.is_dir():
        checkpoint.clear_leftovers(data)
        for folder in data.iterdir():
            if folder != but:
                checkpoint.delete(folder)
        if but is None:
            data.rmdir()


def load_tokenizer(cfg: PrepareRun, vocabulary: Path, out: run_dir.RunDir):
    """With our chat template and a padding token, which the stages behind this one rely on."""
    from aquila_sft import chat_template
    from aquila_sft import tokenizer as tokenizers

    converted = out.path / "tokenizer"
    if vocabulary.is_file():
        tokenizer = tokenizers.convert_tiktoken(vocabulary, converted)
    else:
        tokenizer = tokenizers.load_tokenizer(vocabulary, converted_to=converted)
    tokenizer.chat_template = chat_template.chatml(cfg.tokenizer.system)
    if cfg.tokenizer.add_chat_tokens and (added := chat_template.add_chat_tokens(tokenizer)):
        runtime.say(f"  {added} chat tokens added to the vocabulary: {len(tokenizer):,} entries")
    give_padding(tokenizer)
    return tokenizer


def about(cfg: PrepareRun, files: dict[str, list[Path]], work) -> dict:
    """What the ledger says beside its counts: the input, and which benchmarks were looked for."""
    index = index_of(work)
    read = {s: [{"file": str(f), "bytes": f.stat().st_size} for f in paths] for s, paths in files.items()}
    return {
        "files": read,
        "decontaminated_against": index.figures if index else "nothing: prepare.decontaminate is not set",
    }


def nothing_left(report: dict, files: dict[str, list[Path]]) -> str:
    reasons = why_left_out(report)
    names = ", ".join(f.name for paths in files.values() for f in paths[:3])
    return f"no document is left to train on: {report['read']} records read from {names}; " + (
        f"left out for: {reasons}" if reasons else "the files are empty"
    )


def write_summary(cfg: PrepareRun, out: run_dir.RunDir, parts: dict, report: dict, seconds: float) -> None:
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    text_bytes, tokens = Counter(), Counter()
    for part in parts["train"].values():
        text_bytes[part["language"]] += part["text_bytes"]
        tokens[part["language"]] += part["tokens"]
    out.write_summary(
        cfg,
        "done",
        documents=sum(part["documents"] for part in parts["train"].values()),
        tokens=tokens.total(),
        text_bytes=text_bytes.total(),
        bytes_per_token={lang: round(text_bytes[lang] / tokens[lang], 4) for lang in sorted(tokens)},
        held_back=report["held_back"],
        left_out=report["left_out"],
        seconds=round(seconds, 1),
        tokens_per_s=round(report["tokens"] / seconds, 1),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    )


def closing(cfg: PrepareRun, out: run_dir.RunDir, state: str) -> None:
    summary = out.summary()
    all_sources = " data.sources=null" if cfg.demo and cfg.data.files else ""  # mini's mixture is of the bundled world
    narration.closing(
        cfg,
        f"{out.final} {state}: {summary['documents']:,} documents, {summary['tokens']:,} tokens",
        what_next={
            "train on it": f"accelerate launch train.py recipe=pretrain scale={cfg.scale} data.shards={out.final}"
            + all_sources
        },
    )
