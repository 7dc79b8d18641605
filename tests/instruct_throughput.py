"""Peak memory and throughput of preparing instruction data, beside the same steps as datasets.map calls.

    PYTHONPATH=. python tests/instruct_throughput.py <real data> <qwen.tiktoken> rows=10000 [processes=1] [only=ours]

Rows are put together from real ones: two questions and two answers, drawn at random, so that few are copies. Memory is
that of all processes together (proportional set size, sampled). The datasets twin holds all signatures and buckets in
memory, as such scripts do; it reads, judges, tokenizes with the same functions.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import train
from aquila_sft import chat_template
from aquila_sft.data import conversations, duplicates, hygiene, sft_set, sft_steps, sources
from aquila_sft.data.chat_encoder import Encoder
from aquila_sft.tokenizer import convert_tiktoken

SETS = ("alpaca_en", "alpaca_zh", "sharegpt_zh", "emollm_zh_system", "dolly_en", "flagai_aquila")


def write_rows(root: Path, file: Path, count: int) -> None:
    records = [r for name in SETS for path in root.glob(f"instruct_{name}/*.jsonl") for _, r in sources.read(path)]
    pairs = [
        (c[i]["value"], c[i + 1]["value"]) for r in records for c in [r["conversations"]] for i in range(len(c) - 1)
    ]
    draw = random.Random(0)
    with open(file, "w") as out:
        for number in range(count):
            (q, _), (r, _), (_, a), (_, b) = draw.choices(pairs, k=4)
            turns = [{"from": "human", "value": f"{q}\n{r}"}, {"from": "gpt", "value": f"{a}\n{b}"}]
            out.write(json.dumps({"id": number, "conversations": turns, "source": "drawn"}, ensure_ascii=False) + "\n")


class Memory(threading.Thread):
    """The most that this process and its children had at once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            self.peak = max(self.peak, sum(map(proportional, pids)))


def proportional(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def ours(run, tokenizer, files: list[Path], folder: Path) -> int:
    encode = Encoder(tokenizer, run.tokenizer.system, sft_set.aside_of(folder / "set") / "encoder.json")
    report = sft_set.prepare(files, folder / "set", encode, sft_set.policy_of(run), {}, run.data)
    return report["kept"] + report["held_back"]


def with_datasets(run, tokenizer, files: list[Path], folder: Path) -> int:
    import datasets

    policy, count = sft_set.policy_of(run), run.data.workers
    encode = Encoder(tokenizer, run.tokenizer.system, folder / "encoder.json")

    def judged(row: dict) -> dict:
        verdict = hygiene.judge(row, "drawn", policy.clean)
        return {"messages": json.dumps(verdict.messages), "reason": verdict.reason, "language": verdict.language}

    def keyed(batch: dict) -> dict:
        messages = [json.loads(text) for text in batch["messages"]]
        of = sft_steps.signatures(messages)
        keys = [conversations.sha256(m)[:16] for m in messages]
        return {"sha": keys, "signature": of.tolist(), "bands": duplicates.band_keys(of).T.astype("int64").tolist()}

    def tokenized(batch: dict) -> dict:
        encoded = encode([json.loads(text) for text in batch["messages"]])
        return {"input_ids": [ids for ids, _ in encoded], "targets": [targets for _, targets in encoded]}

    cache = str(folder / "datasets")
    rows = datasets.load_dataset("json", data_files=[str(f) for f in files], split="train", cache_dir=cache)
    rows = rows.map(judged, num_proc=count, remove_columns=rows.column_names)
    rows = rows.filter(lambda row: row["reason"] is None, num_proc=count)
    rows = rows.map(keyed, batched=True, batch_size=512, num_proc=count)
    seen, buckets, signatures, chosen = set(), {}, [], []
    for number, row in enumerate(rows.select_columns(["sha", "signature", "bands"])):
        signatures.append(row["signature"])
        meets = {buckets.setdefault((band, key), number) for band, key in enumerate(row["bands"])} - {number}
        alike = any(
            sum(a == b for a, b in zip(row["signature"], signatures[other], strict=True))
            >= policy.clean.near_duplicates * duplicates.PERMUTATIONS
            for other in meets
        )
        if row["sha"] not in seen and not alike:
            chosen.append(number)
        seen.add(row["sha"])
    rows = rows.select(chosen).map(tokenized, batched=True, batch_size=512, num_proc=count)
    rows = rows.filter(lambda row: len(row["input_ids"]) <= policy.max_length, num_proc=count)
    return len(rows)


def main(root: Path, ranks: Path, rows: int, processes: int, only: str | None) -> None:
    for name, how in {"ours": ours, "datasets": with_datasets}.items():
        if only in (None, name):  # each in a process of its own, so that none has the other's memory
            child = multiprocessing.get_context("spawn").Process(
                target=measured, args=(name, how, root, ranks, rows, processes)
            )
            child.start()
            child.join()


def measured(name: str, how, root: Path, ranks: Path, rows: int, processes: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(root, folder / "rows.jsonl", rows)
        size = (folder / "rows.jsonl").stat().st_size
        run = train.compose_run(
            ["recipe=sft", "scale=135m", "data.files=a.jsonl", f"data.workers={processes}", "data.slice_mb=16"]
        )
        tokenizer = convert_tiktoken(ranks, folder / "tokenizer")
        tokenizer.chat_template = chat_template.chatml(run.tokenizer.system)
        memory = Memory()
        memory.start()
        begun, cpu = time.monotonic(), time.process_time()
        kept = how(run, tokenizer, [folder / "rows.jsonl"], folder)
        seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
        memory.done.set()
        print(
            f"{name}: {rows:,} rows ({size / 1e6:,.1f} MB), {processes} process(es): {seconds:,.1f} s "
            f"({cpu:,.1f} s of CPU in the main process), {rows / seconds:,.0f} rows/s, "
            f"{memory.peak / 2**20:,.0f} MiB at most, {kept:,} kept",
            flush=True,
        )


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[3:])
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(given.get("rows", 10_000)),
        int(given.get("processes", 1)),
        given.get("only"),
    )
