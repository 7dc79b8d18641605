"""Prepared sets as a whole: the same bytes however they are made, nothing lost, nothing reused by mistake."""

import contextlib
import dataclasses
import datetime
import fcntl
import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_conversations, tiny_tokenizer, write_jsonl

import train
from aquila_sft import cache, chat_template, checkpoint
from aquila_sft.config.data import DamagedBlocks, Executor, Workers
from aquila_sft.data import chat_encoder, quarantine, sft_set, slices, sources, tasks
from aquila_sft.data.chat_encoder import Encoder
from aquila_sft.data.rows import PackedRows
from aquila_sft.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture
def encode(tokenizer):
    return partial(chat_template.encode_batch, tokenizer)


@pytest.fixture(scope="module")
def defaults():
    return sft_set.policy_of(train.compose_run(["recipe=sft", "scale=135m", "data.files=a.jsonl"]))


def policy(defaults, near=None, **changes) -> sft_set.RowPolicy:
    clean = dataclasses.replace(defaults.clean, near_duplicates=near, detector="script")
    sizes = {"max_length": 128, "holdout_fraction": 0.2, "holdout_max": 20, "pack_window": 100}
    return dataclasses.replace(defaults, clean=clean, **sizes | changes)


def talk(question: str, answer: str, **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def messy(folder: Path) -> list[Path]:
    """Three kinds of files, with faults of many kinds in them, and copies across them."""
    good = tiny_conversations(90)
    bad = [
        talk("Who?", "I am ChatGPT."),
        talk("a?", "{{name}}"),
        talk("a?", ""),
        {"text": "x"},
        talk("&lt;", "b\u200b"),
    ]
    write_jsonl(folder / "a.jsonl", [*good[:60], *bad, *good[:5]])
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b'{"half": \n\xff\xfe\n' + json.dumps(talk("one more?", "yes")).encode() + b"\n")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"conversations": r["conversations"], "source": "p"} for r in good[50:80]]),
        folder / "b.parquet",
        row_group_size=7,
    )
    (folder / "c.json").write_text(json.dumps([talk("你好吗？", "我很好。"), talk("Hi", "\ud800"), *good[80:]]))
    return [folder / "a.jsonl", folder / "b.parquet", folder / "c.json"]


def content(folder: Path) -> dict[str, bytes]:
    """All of a set but the hashes of its files, which say the same."""
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.*")) if f.name != "MANIFEST.json"
    }


def workers(count: int, slice_mb: float = 0.003) -> Workers:
    return Workers(slice_mb=slice_mb, workers=count, executor=Executor.processes)


def without_frames(made: dict[str, bytes], folder: Path) -> dict:
    """With the lines of the quarantine instead of the compressed streams, one a slice."""
    return made | {quarantine.FILE: list(quarantine.read(folder / quarantine.FILE))}


def test_one_worker_or_two_one_slice_or_many_give_the_same_bytes(tmp_path, tokenizer, defaults):
    files, made = messy(tmp_path), {}
    wanted = policy(defaults, near=0.8)
    for name, how in {"one": workers(1), "two": workers(2), "whole": workers(1, 32.0)}.items():
        folder = tmp_path / name
        encode = Encoder(tokenizer, "You are a helpful assistant", sft_set.aside_of(folder) / "encoder.json")
        sft_set.prepare(files, folder, encode, wanted, {}, how)
        made[name] = content(folder)
    assert len(slices.cut({"": files}, 3000)) > 5
    assert made["one"] == made["two"]
    assert without_frames(made["one"], tmp_path / "one") == without_frames(made["whole"], tmp_path / "whole")


@pytest.mark.slow
def test_datatrove_makes_the_same_bytes(tmp_path, tokenizer, defaults):
    pytest.importorskip("datatrove")
    made = {}
    for executor in (Executor.processes, Executor.datatrove):
        folder = tmp_path / executor.value
        encode = Encoder(tokenizer, "You are a helpful assistant", sft_set.aside_of(folder) / "encoder.json")
        how = Workers(slice_mb=0.01, workers=1, tasks=2, executor=executor)
        sft_set.prepare(messy(tmp_path), folder, encode, policy(defaults), {}, how)
        made[executor] = content(folder)
    assert made[Executor.processes] == made[Executor.datatrove]


def test_what_a_run_with_other_slices_had_half_deleted_is_not_taken_up_again(tmp_path, encode, defaults, monkeypatch):
    files, real, folder, kills = messy(tmp_path), shutil.rmtree, tmp_path / "set", ["deleting", "before the rows"]
    sft_set.prepare(files, tmp_path / "unbroken", encode, policy(defaults), {}, workers(1, 0.01))

    def rmtree(path, *given, **named):
        if kills and Path(path) == checkpoint.leftover(sft_set.aside_of(folder)):
            for file in [*Path(path).glob("*/*/*")][::2]:
                file.unlink()
            raise KeyboardInterrupt(kills.pop())
        real(path, *given, **named)

    def rename(source, target, own=os.rename):
        if len(kills) == 2 and Path(target).parent.name == "rows":
            raise KeyboardInterrupt(kills.pop())
        own(source, target)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(os, "rename", rename)
    for slice_mb in (0.01, 0.005):
        with pytest.raises(KeyboardInterrupt):
            sft_set.prepare(files, folder, encode, policy(defaults), {}, workers(1, slice_mb))
    assert not kills
    sft_set.prepare(files, folder, encode, policy(defaults), {}, workers(1, 0.01))
    assert content(folder) == content(tmp_path / "unbroken")


def test_killed_before_any_step_is_visible_the_same_command_ends_with_the_same_bytes(
    tmp_path, encode, defaults, monkeypatch
):
    files = messy(tmp_path)
    sft_set.prepare(files, tmp_path / "unbroken", encode, policy(defaults), {}, workers(1, 0.01))
    real, renames = os.rename, 0

    def dying(source, target):
        nonlocal renames
        renames += 1
        if renames == dies_at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", dying)
    dies_at, killed = 2, 0
    while True:
        renames = 0
        with contextlib.suppress(KeyboardInterrupt):
            sft_set.prepare(files, tmp_path / "set", encode, policy(defaults), {}, workers(1, 0.01))
            break
        killed += 1  # one task further at each start
    assert killed >= 8
    assert content(tmp_path / "set") == content(tmp_path / "unbroken")
    assert not sft_set.aside_of(tmp_path / "set").exists()


PREPARING = """
import pickle, sys
from pathlib import Path
from aquila_sft.data import chat_encoder, sft_set
from aquila_sft.errors import UserError

if __name__ == "__main__":  # and not in the processes of its pool
    given, folder = map(Path, sys.argv[1:])
    files, policy, workers = pickle.loads(given.read_bytes())
    encode = chat_encoder.of_file("You are a helpful assistant", given.with_name("encoder.json"))
    try:
        sft_set.prepare(files, folder, encode, policy, {}, workers)
    except UserError as error:
        sys.exit(f"error: {error}")
"""


def test_kill_9_of_a_worker_or_of_its_parent_ends_all_at_once_and_the_same_command_goes_on(
    tmp_path, tokenizer, defaults
):
    files = [*messy(tmp_path), write_jsonl(tmp_path / "d.jsonl", tiny_conversations(400))]
    (tmp_path / "encoder.json").write_text(tokenizer.backend_tokenizer.to_str())
    encode = chat_encoder.of_file("You are a helpful assistant", tmp_path / "encoder.json")
    sft_set.prepare(files, tmp_path / "unbroken", encode, policy(defaults), {}, workers(1, 0.01))
    (tmp_path / "given").write_bytes(pickle.dumps((files, policy(defaults), workers(2, 0.01))))
    (tmp_path / "preparing.py").write_text(PREPARING)
    folder = tmp_path / "set"
    command = [sys.executable, tmp_path / "preparing.py", tmp_path / "given", folder]
    for step, whom in (("read", "worker"), ("tokenize", "worker"), ("tokenize", "parent")):
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        worker = wait_for(lambda pid=run.pid, step=step: at_work(sft_set.aside_of(folder) / step, pid))
        pool = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        os.kill(worker if whom == "worker" else run.pid, signal.SIGKILL)
        _, said = run.communicate(timeout=30)
        if whom == "worker":
            (line,) = [line for line in said.splitlines() if "error" in line.lower() or "Traceback" in line]
            assert run.returncode == 1 and f"error: a process of the step {step} was killed" in line, said
            assert "the same command goes on, with fewer data.workers= or a smaller data.slice_mb=" in line
        assert len(pool) >= 3, "two workers and multiprocessing's own"
        wait_for(lambda pids=pool: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        assert not folder.exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=60)
    assert content(folder) == content(tmp_path / "unbroken")
    assert not sft_set.aside_of(folder).exists()


def at_work(step: Path, parent: int) -> int | None:
    """A worker of `parent` that is in the middle of a task."""
    for path in step.glob(f"{tasks.ASIDE}*"):
        pid = int(path.name.rpartition("-")[2])
        with contextlib.suppress(FileNotFoundError):
            if f"PPid:\t{parent}\n" in Path(f"/proc/{pid}/status").read_text():
                return pid
    return None


def wait_for(condition):
    for _ in range(10_000):
        if value := condition():
            return value
        time.sleep(0.003)
    pytest.fail("nothing happened")


def test_every_record_is_kept_or_in_the_quarantine_with_reason_place_and_original(tmp_path, encode, defaults):
    files = messy(tmp_path)
    ledger = sft_set.prepare(files, tmp_path / "set", encode, policy(defaults), {}, workers(1))
    lines = list(quarantine.read(tmp_path / "set" / quarantine.FILE))
    assert ledger["read"] == ledger["kept"] + ledger["held_back"] + ledger["left_out"]
    assert len(lines) == ledger["left_out"] == sum(r["records"] for r in ledger["reasons"].values())
    originals = {
        f"{file}:{i}": line for file in files[:1] for i, line in enumerate(open(file, "rb").read().split(b"\n"), 1)
    }
    reasons = {}
    for line in lines:
        reasons.setdefault(line["reason"], []).append(line)
        if line["where"] in originals and isinstance(line["record"], dict):
            assert line["record"] == json.loads(originals[line["where"]])
    broken = reasons["not a JSON object"]
    assert [b["where"] for b in broken] == [f"{files[0]}:71", f"{files[0]}:72"]
    assert broken[0]["record"] == '{"half": \n' and broken[1]["record"] == "\udcff\udcfe\n"
    assert {r: len(found) for r, found in reasons.items() if not r.startswith("copy")} == {
        "not a JSON object": 2,
        "says to be another's model": 1,
        "placeholder that nobody filled in": 1,
        "empty turn": 1,
        "none of the shapes of a conversation": 1,
        "text that is not valid Unicode": 1,
    }
    assert len(reasons["copy of an earlier conversation"]) >= 15
    assert ledger["mended"]["remnants of HTML taken out"]["records"] == 1


def not_utf8(*texts: bytes) -> pyarrow.Array:
    """Strings, which parquet does not look into."""
    return pyarrow.Array.from_buffers(pyarrow.string(), len(texts), pyarrow.array(texts, pyarrow.binary()).buffers())


def test_what_is_no_text_is_read_back_from_the_quarantine_as_it_was(tmp_path, encode, defaults, capsys):
    line = '{"prompt":"首都？","response":"北京"}\n'.encode("gbk")
    write_jsonl(tmp_path / "a.jsonl", tiny_conversations(9))
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(line)
    turns = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["gpt"] * 2), not_utf8(b"ok", b"\xff bad")], ["role", "text"]
    )
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2], pyarrow.int32()), turns)
    table = pyarrow.table({"messages": lists, "kind": not_utf8(b"x", b"\xfe"), "day": [datetime.date(2020, 1, 2)] * 2})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text('[{"prompt": "Hi", "response": "Yes."}, "an answer", null, [5, {"a": "好"}]]')
    (tmp_path / "d.json").write_text('{"prompt": "Why?", "response": "No."}\n{"broken": \n')
    files = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.json", "d.json")]
    sft_set.prepare(files, tmp_path / "set", encode, policy(defaults), {})
    found = {q["where"]: q["record"] for q in quarantine.read(tmp_path / "set" / quarantine.FILE, "not a JSON")}
    assert found[f"{files[0]}:10"].encode("utf-8", "surrogateescape") == line
    assert found == {
        f"{files[0]}:10": found[f"{files[0]}:10"],
        f"{files[1]}:2": {
            "messages": [{"role": "gpt", "text": "\udcff bad"}], "kind": "\udcfe", "day": "2020-01-02"
        },
        f"{files[2]}:2": "an answer",
        f"{files[2]}:3": None,
        f"{files[2]}:4": [5, {"a": "好"}],
        f"{files[3]}:2": '{"broken": \n',
    }  # fmt: skip
    assert cache.main([f"quarantine={tmp_path}/set", "reason=not"]) == 0
    assert [json.loads(text) for text in capsys.readouterr().out.splitlines()] == list(found.values())
    assert cache.main([f"quarantine={tmp_path}/a.jsonl"]) == 2
    assert "a.jsonl:1: no line of a quarantine" in capsys.readouterr().err


def test_the_ledger_has_rows_tokens_and_answer_tokens_by_source_language_and_reason(
    tmp_path, tokenizer, encode, defaults
):
    record = talk("Who are you?", "I am ChatGPT.", source="s")
    write_jsonl(tmp_path / "a.jsonl", [record, talk("Hi?", "Yes.", source="s"), talk("你好", "你好！", source="t")])
    ledger = sft_set.prepare(
        [tmp_path / "a.jsonl"], tmp_path / "set", encode, policy(defaults, holdout_fraction=0.0), {}
    )
    ids, is_target = chat_template.encode_messages(
        tokenizer,
        [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am ChatGPT."}],
    )
    assert ledger["left_out_by_source"] == {
        "s": {
            "en": {"says to be another's model": {"rows": 1, "tokens": len(ids), "answer_tokens": sum(is_target)}},
        }
    }
    assert {s: list(of) for s, of in ledger["kept_by_source"].items()} == {"s": ["en"], "t": ["zh"]}
    counted = [of[language] for of in ledger["kept_by_source"].values() for language in of]
    assert sum(c["tokens"] for c in counted) == ledger["tokens"] and sum(c["rows"] for c in counted) == 2
    assert sum(c["answer_tokens"] for c in counted) == ledger["answer_tokens"]


def test_a_file_that_is_not_json_stops_the_run_or_goes_into_the_quarantine(tmp_path, encode, defaults):
    write_jsonl(tmp_path / "a.jsonl", tiny_conversations(9))
    (tmp_path / "b.json").write_text('[\n {"a": 1},\n]')
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    files = [tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet")]
    with pytest.raises(UserError, match=r"b.json:3: not JSON .*; mend the file or leave it out of data.files"):
        sft_set.prepare(files, tmp_path / "set", encode, policy(defaults), {})
    wanted = policy(defaults, unreadable=DamagedBlocks.leave_out)
    ledger = sft_set.prepare(files, tmp_path / "set", encode, wanted, {})
    assert ledger["reasons"]["file that cannot be read"]["first"] == [f"{files[1]}:3", str(files[2])]
    assert ledger["kept"] + ledger["held_back"] == 9


@pytest.mark.parametrize(
    "made, why",
    [
        (lambda body: body.decode().encode("utf-16"), "it is UTF-16"),
        (gzip.compress, r"its name should end with .gz"),
        (lambda body: body.replace(b"\n", b"\r"), r"end with \\r alone"),
        (lambda body: b"\x00\x01\n\xff", r"the first is b'.x00.x01.n'"),
    ],
)
def test_lines_of_which_none_is_a_record_are_a_file_that_is_not_json(tmp_path, encode, defaults, made, why):
    write_jsonl(tmp_path / "a.jsonl", tiny_conversations(9))
    (tmp_path / "b.jsonl").write_bytes(made((tmp_path / "a.jsonl").read_bytes()))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(sources.Unreadable, match=f"b.jsonl: no line of it is a JSON object; .*{why}"):
        sft_set.prepare(files, tmp_path / "set", encode, policy(defaults), {}, workers(1, 0.0001))
    wanted = policy(defaults, unreadable=DamagedBlocks.leave_out)
    ledger = sft_set.prepare(files, tmp_path / "set", encode, wanted, {})
    assert ledger["reasons"]["file that cannot be read"]["first"] == [str(files[1])]
    assert ledger["kept"] + ledger["held_back"] == 9


def test_a_part_of_a_file_without_a_record_does_not_stop_the_run(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"broken\n" * 40 + b'{"a": 1}\n' + b"broken\n" * 40)
    parts = slices.cut({"": [tmp_path / "a.jsonl"]}, 100)
    assert len(parts) > 4
    pieces = [piece for part in parts for piece in part.pieces]
    found = [record for p in pieces for _, record in sources.read(Path(p.file), None, p.begin, p.end, p.first)]
    assert [record for record in found if record] == [{"a": 1}] and len(found) == 81


def test_copies_are_told_by_question_and_answer(tmp_path, encode, defaults):
    text = "The quick brown fox jumps over the lazy dog near the old river bank while it rains on a cold grey morning. "
    fox = text + "What does the fox do?"
    rows = [
        talk(fox, "It jumps over the dog that sleeps beside the river in the rain."),
        talk(fox + "\n\n", "It jumps over the dog, that sleeps beside the river in the rain!"),  # signs alone differ
        talk(text + "What colour is the morning?", "Grey, and cold, says the text, for it rains near the bank."),
        talk("Why?", "It jumps over the dog that sleeps beside the river in the rain."),
        talk(fox, "It jumps over the dog that sleeps beside the river in the rain."),
        talk("今天天气怎么样，适合出去散步吗？", "今天天气晴朗，气温适中，很适合出去散步，记得带上水和帽子。"),
        talk("今天天气怎么样？适合出去散步吗", "今天天气晴朗，气温适中，很适合出去散步，记得带上水和帽子！"),
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    files = [tmp_path / "a.jsonl"]
    sft_set.prepare(
        files, tmp_path / "near", encode, policy(defaults, near=0.85, holdout_fraction=0.0, max_length=512), {}
    )
    left = {q["where"].rsplit(":")[-1]: q["reason"] for q in quarantine.read(tmp_path / "near" / quarantine.FILE)}
    near, equal = "nearly a copy of an earlier conversation", "copy of an earlier conversation"
    assert left == {"2": near, "5": equal, "7": near}
    exact = sft_set.prepare(
        files, tmp_path / "exact", encode, policy(defaults, holdout_fraction=0.0, max_length=512), {}
    )
    assert exact["left_out"] == 1


def test_items_of_a_benchmark_are_left_out_by_its_name(tmp_path, encode, defaults):
    question = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"
    )
    (tmp_path / "benchmarks/gsm8k").mkdir(parents=True)
    write_jsonl(tmp_path / "benchmarks/gsm8k/test.jsonl", [{"question": question, "answer": "72"}])
    write_jsonl(tmp_path / "a.jsonl", [talk(f"Solve: {question.upper()}", "72 clips."), *tiny_conversations(9)])
    wanted = policy(defaults, decontaminate=str(tmp_path / "benchmarks"), holdout_fraction=0.0)
    ledger = sft_set.prepare([tmp_path / "a.jsonl"], tmp_path / "set", encode, wanted, {})
    assert ledger["reasons"]["item of gsm8k"]["records"] == ledger["left_out"] == 1
    assert ledger["decontaminated_against"]["gsm8k"]["items"] == 1
    write_jsonl(tmp_path / "benchmarks/gsm8k/test.jsonl", [{"question": question + " Say it.", "answer": "72"}])
    sft_set.benchmarks_sha256.cache_clear()
    other = sft_set.key_of({}, wanted)
    assert other != json.loads((tmp_path / "set/prepared.json").read_text())["key"], "other items, the same key"


def test_a_set_is_reused_by_its_key_and_bytes_and_never_because_it_is_there(tmp_path, encode, defaults, capsys):
    write_jsonl(tmp_path / "a.jsonl", tiny_conversations(20))
    files, folder = [tmp_path / "a.jsonl"], tmp_path / "set"

    def made_again(key=None, **changes) -> bool:
        before = (folder / "prepared.json").stat().st_mtime_ns if folder.exists() else None
        sft_set.prepare(files, folder, encode, policy(defaults, **changes), key or {"data": "x"})
        return (folder / "prepared.json").stat().st_mtime_ns != before

    assert made_again() and not made_again()
    assert made_again({"data": "y"}) and made_again(max_length=96) and made_again()
    tokens = folder / "train/tokens.bin"
    tokens.write_bytes(bytes(4) + tokens.read_bytes()[4:])
    assert made_again() and "tokens.bin does not have the bytes that were written" in capsys.readouterr().out
    (folder / "prepared.json").write_text("{")
    assert made_again()


@pytest.mark.parametrize("name", ["hygiene", "mixture", "chat_template"])
def test_another_version_of_the_code_is_another_key(tmp_path, defaults, monkeypatch, name):
    copy = tmp_path / "aquila_sft"
    shutil.copytree(Path(sft_set.__file__).parents[1], copy)
    monkeypatch.setattr(sft_set, "__file__", str(copy / "data/sft_set.py"))
    sft_set.code_sha256.cache_clear()
    before = sft_set.key_of({}, defaults)
    sft_set.code_sha256.cache_clear()
    (file,) = copy.rglob(f"{name}.py")
    file.write_text(file.read_text() + "\n")
    assert sft_set.key_of({}, defaults) != before
    sft_set.code_sha256.cache_clear()


def test_lines_are_numbered_alike_in_slices_of_any_size(tmp_path):
    lines = [b'{"n": %d}' % i * (1 + i % 3 == 1) + b" " * (i % 11) for i in range(60)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    whole = list(sources.read(tmp_path / "a.jsonl"))
    for size in (1, 2, 7, 13, 50, 300):
        found = [
            record
            for part in slices.cut({"": [tmp_path / "a.jsonl"]}, size)
            for piece in part.pieces
            for record in sources.read(Path(piece.file), None, piece.begin, piece.end, piece.first)
        ]
        assert found == whole, size


def test_the_lines_of_a_file_are_counted_once_for_an_unfinished_set_and_again_when_it_changed(
    tmp_path, encode, defaults, monkeypatch
):
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", tiny_conversations(20)) for name in "ab")
    counted, kills = [], [2, 2, 2, 2]
    monkeypatch.setattr(slices, "lines", lambda *of, own=slices.lines: counted.append(of[0].name) or own(*of))

    def run(step, work, task, own=tasks.Step.run):
        if not step.target(work, task).exists():
            if kills and not kills[-1]:
                raise KeyboardInterrupt(kills.pop())
            own(step, work, task)
            if kills:
                kills[-1] -= 1

    monkeypatch.setattr(tasks.Step, "run", run)

    def killed() -> str:
        before = len(counted)
        with pytest.raises(KeyboardInterrupt):
            sft_set.prepare([a, b], tmp_path / "set", encode, policy(defaults), {}, workers(1))
        return "".join(name[0] for name in counted[before:])

    assert killed() == "ab" and killed() == "ab", "written this instant, they could have changed without looking so"
    monkeypatch.setattr(sources, "CLOCKS_NS", -1)
    assert killed() == "ab" and killed() == ""
    stat = b.stat()
    b.write_bytes(b.read_bytes().replace(b"\n", b" ", 1))  # of the same size, dated back, its lines others
    os.utime(b, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    ledger = sft_set.prepare([a, b], tmp_path / "set", encode, policy(defaults), {}, workers(1))
    assert counted[-2:] == ["a.jsonl", "b.jsonl"]
    assert ledger["reasons"]["not a JSON object"]["first"] == [f"{b}:1"] and ledger["read"] == 39


def test_a_disk_that_is_too_small_is_told_before_anything_is_read(tmp_path, encode, defaults, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", tiny_conversations(20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(tasks.Step, "run", lambda *about: pytest.fail("it began"))
    with pytest.raises(
        UserError, match="data.cache=.*: about 0.0[1-9] MB are needed to prepare 1 file.*, 0.00 MB are free"
    ):
        sft_set.prepare([tmp_path / "a.jsonl"], tmp_path / "set", encode, policy(defaults), {})


# ---- the cache


@pytest.fixture
def prepared(tmp_path, encode, defaults):
    write_jsonl(tmp_path / "a.jsonl", [*tiny_conversations(20), talk("Who?", "I am ChatGPT.")])
    folder = tmp_path / "cache" / "0123456789abcdef"
    sft_set.prepare([tmp_path / "a.jsonl"], folder, encode, policy(defaults), {})
    return folder


def test_the_cache_is_listed_and_what_was_left_out_is_read_back(prepared, capsys):
    words = [f"cache={prepared.parent}"]
    assert cache.main(words) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(str(prepared)) and "20 of 21 conversations" in line and line.endswith("MB: a.jsonl")
    assert cache.main([*words, "quarantine=0123"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "says to be another's model"
    assert cache.main([*words, f"quarantine={prepared}", "reason=says"]) == 0
    assert json.loads(capsys.readouterr().out) == talk("Who?", "I am ChatGPT.")
    assert cache.main(["delete"]) == 2 and cache.main(["of=x"]) == 2 and cache.main([*words, "delete=9"]) == 2


def test_a_set_in_use_is_not_deleted_and_an_idle_one_is(prepared, capsys):
    words = [f"cache={prepared.parent}", "delete=0123456789abcdef"]
    with cache.in_use(prepared, alone=False):
        assert cache.main(words) == 2 and "a run is using" in capsys.readouterr().err
        assert cache.main([words[0], "delete=all"]) == 0 and "in use, kept" in capsys.readouterr().out
        assert prepared.is_dir()
    assert cache.main(words) == 0 and not prepared.exists() and "deleted" in capsys.readouterr().out
    assert cache.sets([prepared.parent]) == []


def test_a_set_that_is_half_deleted_is_listed_under_its_key_and_goes_for_good(prepared, monkeypatch):
    shutil.copytree(prepared, aside := sft_set.aside_of(prepared))
    words = [f"cache={prepared.parent}", "delete=0123"]

    def names():
        return {path.name for path in prepared.parent.glob("*")} - {cache.LOCKS}

    def die(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            cache.main(words)
    assert names() == {checkpoint.leftover(prepared).name, aside.name}
    os.rename(aside, checkpoint.leftover(aside))
    assert cache.sets([prepared.parent]) == [prepared]
    (checkpoint.leftover(aside) / "large").write_bytes(bytes(10**6))
    assert "  not finished, 1.0 MB" in cache.line_of(prepared)
    assert cache.main(words) == 0 and names() == set()


def test_nothing_but_prepared_sets_is_listed_or_deleted(prepared, capsys):
    cache_folder = prepared.parent
    others = [cache_folder / name for name in ("thesis", "fedcba9876543210", ".preparing-thesis", ".git")]
    for other in others:
        other.mkdir()
        (other / "precious.txt").write_text("x")
    left = [cache_folder / name for name in (".preparing-00000000000000aa", ".deleting-.preparing-00000000000000ab")]
    for folder in left:
        folder.mkdir()
    (cache_folder / "00000000000000ac").symlink_to(prepared)
    assert [path.name for path in cache.sets([cache_folder])] == [
        "00000000000000aa", "00000000000000ab", "0123456789abcdef"
    ]  # fmt: skip
    assert cache.main([f"cache={cache_folder}", "delete=thesis"]) == 2
    assert cache.main([f"cache={cache_folder}", "delete=all"]) == 0
    assert not prepared.exists() and not any(folder.exists() for folder in left)
    assert all((other / "precious.txt").read_text() == "x" for other in others)


def test_a_folder_that_is_no_cache_stays_as_it_is_and_words_without_values_are_refused(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    for words in ([], ["delete=all"]):
        assert cache.main([f"cache={tmp_path}", *words]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    assert cache.main([f"cache={tmp_path}", "delete="]) == 2 and "nothing behind it" in capsys.readouterr().err
    assert cache.main([f"cache={tmp_path}/none"]) == 2 and "cannot be read: No such file" in capsys.readouterr().err


def test_runs_share_a_set_and_only_its_maker_is_alone(prepared, capsys):
    key = json.loads((prepared / "prepared.json").read_text())["key"]
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        for stack in (first, second):
            ledger, was_there = cache.prepared(prepared, key, stack, make=lambda: pytest.fail("made again"))
            assert was_there and ledger["kept"]
        with open(prepared.parent / cache.LOCKS / prepared.name) as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with cache.in_use(prepared, alone=True, wait=False) as is_free:
        assert is_free, "a lock outlived its run"


def test_rows_of_a_set_are_whole_conversations(prepared, tokenizer):
    rows = PackedRows(prepared / "train")
    text = tokenizer.decode(rows.tokens[:])
    assert text.count("<|im_start|>assistant") == text.count("<|im_end|>") - text.count(
        "<|im_start|>user"
    ) - text.count("<|im_start|>system")
    assert "ChatGPT" not in text
