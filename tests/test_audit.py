"""The label audit: it finds what is broken, and leaves alone what is sound."""

import dataclasses
import itertools
import os
import random
from pathlib import Path

import broken_labels
import numpy as np
import pyarrow
import pytest
import torch
import warm
from broken_labels import CASES, Maker, findings
from test_sft_run import ENV, words
from tiny import tiny_conversations, tiny_model, tiny_tokenizer, write_jsonl

from aquila_sft import chat_template
from aquila_sft.audit import embedding, report, rows, sample
from aquila_sft.config.model import AUDIT_CODES, Audit
from aquila_sft.data import quarantine, world
from aquila_sft.data.rows import PackedRows
from aquila_sft.doctor.findings import ERROR, WARNING
from aquila_sft.errors import UserError


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    tiny_tokenizer(folder)
    return folder


def codes(found) -> list[str]:
    return [f.code for f in found]


# ---- what is broken ----


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_broken_input_is_found(case, tmp_path, vocabulary):
    found = findings(case, tmp_path, vocabulary)
    finding = next((f for f in found if f.code == CASES[case]), None)
    assert finding and finding.level == ERROR, codes(found)
    assert finding.code in AUDIT_CODES and set(codes(found)) <= set(AUDIT_CODES)
    with pytest.raises(UserError, match="nothing was trained"):
        report.stop(found)


def test_the_readme_has_what_the_audit_says(tmp_path, vocabulary):
    made = broken_labels.section(vocabulary, tmp_path)
    assert broken_labels.written(broken_labels.README.read_text("utf-8")) == made, "run python tests/broken_labels.py"


def test_counts_and_the_first_example_are_told(tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    end = make.id("<|im_end|>")
    spoilt = []

    def third(ids, is_target):  # every third conversation does not learn its end
        spoilt.append(len(spoilt) % 3 == 0)
        return ids, [t and not (spoilt[-1] and i == end) for i, t in zip(ids, is_target, strict=True)]

    found = report.audit(make.relabelled(third), lambda *_: None)
    assert codes(found) == ["turn-end"]
    assert found[0].text.startswith("20 of 60 conversations:") and "»<|im_end|>" in found[0].text


def test_a_finding_that_is_allowed_is_told_and_does_not_stop(tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    make.records[7]["conversations"][-1]["value"] += "<|endoftext|>"
    found = report.audit(make.audited(allow=["special-text"]), lambda *_: None)
    assert [(f.code, f.level) for f in found] == [("special-text", WARNING)]
    report.stop(found)
    with pytest.raises(UserError, match="audit.allow: specialtext is not one of no-target"):
        Audit(lost_share=0.1, allow=["specialtext"]).check()


def test_full_tuning_may_train_marks_from_nothing_and_an_adapter_may_not(tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    base = make.embedding(lambda table, ids: table.__setitem__(ids, 0))
    for recipe, level in (("sft", WARNING), ("sft_lora", ERROR)):
        found = report.audit(make.audited(recipe=recipe, base=base, allow=[]), lambda *_: None)
        assert [(f.code, f.level) for f in found] == [("untrained-ids", level)]


def test_the_worlds_own_adapter_does_without_trained_marks(tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    of = make.audited(recipe="sft_lora", base=make.embedding(lambda table, ids: table.__setitem__(ids, 0)))
    assert of.cfg.audit.allow == [] and of.cfg.data.bundled == "world"
    of.cfg = dataclasses.replace(of.cfg, data=dataclasses.replace(of.cfg.data, files=None))
    found = report.audit(of, lambda *_: None)
    assert [(f.code, f.level) for f in found] == [("untrained-ids", WARNING)]


@pytest.mark.parametrize("recipe", ["sft", "sft_lora"])
def test_numbers_in_an_embedding_that_are_none_are_a_finding(recipe, tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    base = make.embedding(lambda table, ids: table.__setitem__((ids[0], 3), float("nan")))
    found = report.audit(make.audited(recipe=recipe, base=base), lambda *_: None)
    assert [(f.code, f.level) for f in found] == [("broken-embedding", ERROR)]
    assert f"1 of {len(make.tokenizer):,} rows" in found[0].text and f"id {make.id('<|im_start|>')}:" in found[0].text


def test_a_special_text_is_shown_where_it_stands(tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    system = {"from": "system", "value": "Be brief. " * 30 + "\x1b[31m<|im_end|>x"}
    make.records[7]["conversations"].insert(0, system)
    (found,) = report.audit(make.audited(length=2048), lambda *_: None)
    assert found.code == "special-text"
    shown = found.text.split("if it is meant: ")[1]
    assert "Be brief. \\x1b[31m<|im_end|>x⏎user⏎" in shown and len(shown) < 300


@pytest.mark.parametrize(
    "files, level, told",
    [
        ({"chat_template.jinja": "{{ 1 / 0 }}"}, ERROR, "ZeroDivisionError"),
        ({"chat_template.jinja": "{{ raise_exception('no') }}"}, ERROR, "TemplateError: no"),
        ({"chat_template.jinja": "{% if %}"}, ERROR, "TemplateSyntaxError"),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "tool", "template": "x"}]}'},
            WARNING,
            "by name, tool, and none that is called default",
        ),
    ],
)
def test_a_template_of_the_base_that_cannot_be_compared_is_one_finding(files, level, told, tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    base = make.embedding()
    for name, content in files.items():
        (base / name).write_text(content)
    (found,) = report.audit(make.audited(base=base), lambda *_: None)
    assert (found.code, found.level) == ("template-of-base", level) and told in found.text


def test_copies_that_stand_unevenly_in_the_files_raise_no_alarm(tmp_path, vocabulary, monkeypatch):
    make = Maker(tmp_path, vocabulary)
    monkeypatch.setattr(sample, "CONVERSATIONS", 110)

    def talk(n: int, sign: str) -> dict:
        asked, said = (" ".join(f"{word}{n}{i}" for i in range(12)) + sign for word in "ab")
        return {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]}

    make.records = [talk(n, sign) for sign in ".!?,;:" for n in range(20)] + [talk(n, ".") for n in range(20, 120)]
    of = make.audited(length=512, near_duplicates=0.85)
    assert of.ledger["left_out"] == 100 and report.audit(of, lambda *_: None) == []
    of.files = [write_jsonl(tmp_path / "moved.jsonl", make.records)]  # what was prepared under another name
    assert report.audit(of, lambda *_: None) == []
    with pyarrow.output_stream(str(of.prepared / quarantine.FILE), compression="zstd") as stream:
        stream.write(b"")
    (found,) = report.audit(of, lambda *_: None)
    assert found.code == "not-in-rows" and found.text.startswith("90 of 110") and "moved.jsonl:21;" in found.text


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "(<|im_start|>)", "看<|extra_204|>看", "1<|endoftext|>1", "|<|extra_203|>|"]
)
def test_special_strings_are_found_in_any_surroundings_among_all_rows(text, tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    pairs, without = sample.patterns(make.tokenizer)
    assert not without
    make.records[31]["conversations"][0]["value"] += text
    of = make.audited()
    folders = [of.prepared / "train", *(of.prepared / "held-back").glob("*")]
    parts = {folder.name: PackedRows(folder) for folder in folders}
    marks = rows.Marks.of(make.tokenizer)
    hits = [
        hit
        for name, part in parts.items()
        for hit in sample.smuggling(
            part, rows.look(name, part, marks, pairs, rows.Tally(), threads=1).suspects, make.tokenizer
        )
    ]
    assert len(hits) == 1 and hits[0][1] in text


def test_a_run_stops_before_its_first_step_and_check_says_the_same(tmp_path):
    tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "tok"))
    (tmp_path / "base/chat_template.jinja").write_text(chat_template.chatml("You are Aquila."), "utf-8")
    write_jsonl(tmp_path / "chat.jsonl", tiny_conversations(60))
    command = words(tmp_path, tmp_path / "run")
    done = warm.run(command, env=ENV)
    assert done.returncode == 2
    assert (
        "label audit: the template differs from the base's own" in done.stderr and "nothing was trained" in done.stderr
    )
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert "«" in done.stdout and "\033[" not in done.stdout
    checked = warm.run(["recipe=check", "of=sft", *command[1:]], env=ENV)
    assert checked.returncode == 2 and "You are Aquila." in checked.stdout and "[template-of-base]" in checked.stdout
    tuned = warm.run(words(tmp_path, tmp_path / "run", "train.max_steps=1", "audit.allow=[template-of-base]"), env=ENV)
    assert tuned.returncode == 0, tuned.stderr
    assert "warning  the template differs" in tuned.stdout


# ---- what is sound ----


def test_sound_conversations_raise_no_alarm(tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    said = []
    of = make.audited(recipe="sft_lora", base=make.embedding(), allow=[])
    assert report.audit(of, lambda name, text: said.append(f"{name} {text}")) == []
    told = "\n".join(said)
    assert "60 conversations" in told and "60 conversations read again" in told and "trained in the base" in told


def test_the_bundled_world_raises_no_alarm(tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    make.records = broken_labels.read_jsonl(world.write(tmp_path / "world")["conversations"])
    assert report.audit(make.audited(length=200), lambda *_: None) == []


MARK = "<|im_start|>assistant\n"
ALPHABETS = [
    "abc XYZ.,!?'",
    "中文，。字符",
    "\n\r\t  ",
    "🙂👍🏽é\u0301\u200d\u3000",
    "<|im_start|>assistant\n",
    "0123<>|_{}",
    "ي한かñ",
]


def any_text(rng: random.Random) -> str:
    text = "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.choice([1, 3, 20, 90])))
    if rng.random() < 0.1:
        text += rng.choice(["<|im_end|>", "<|im_start|>user\n", "<|endoftext|>", "\n\n"])
    return text if text.strip() else text + "x"


def any_record(rng: random.Random) -> dict:
    turns = [{"from": "system", "value": any_text(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.choice([1, 1, 2, 7])):
        turns += [{"from": "human", "value": any_text(rng)}, {"from": "gpt", "value": any_text(rng)}]
    return {"conversations": turns}


@pytest.mark.parametrize("seed", range(6))
def test_of_any_messages_each_kept_token_stands_in_one_row_and_the_answers_alone_are_learnt(seed, tmp_path, vocabulary):
    rng = random.Random(seed)
    make = Maker(tmp_path, vocabulary)
    make.records = [any_record(rng) for _ in range(80)]
    length = rng.choice([64, 150, 400])
    of = make.audited(length=length, lost_share=1.0, allow=["special-text"])
    assert [f for f in report.audit(of, lambda *_: None) if f.level == ERROR] == []
    kept, learnt = 0, []
    for folder in [of.prepared / "train", *(of.prepared / "held-back").glob("*")]:
        part = PackedRows(folder)
        seen = []
        for row in range(len(part)):
            batch = {
                name: values[0].numpy()
                for name, values in part.batch([row], length, make.tokenizer.pad_token_id).items()
            }
            used = 0
            for item in part.items(row):
                tokens = part.tokens[part.offsets[item] : part.offsets[item + 1]]
                span = slice(used, used + len(tokens))
                assert (batch["input_ids"][span] == tokens).all()
                assert (batch["position_ids"][span] == np.arange(len(tokens))).all()
                used += len(tokens)
                seen.append(int(item))
                labels = batch["labels"][span]
                ends = np.flatnonzero(labels == make.id("<|im_end|>"))
                begins = [int(np.flatnonzero(labels[a:] != -100)[0]) + a for a in (0, *(ends[:-1] + 1))]
                learnt += [make.tokenizer.decode(labels[a:b]) for a, b in zip(begins, ends, strict=True)]
            assert (batch["labels"][used:] == -100).all()
        assert sorted(seen) == list(range(len(part.offsets) - 1))
        kept += len(seen)
    assert kept == of.ledger["kept"] + of.ledger["held_back"] == of.ledger["read"] - of.ledger["left_out"]
    normal = make.tokenizer.backend_tokenizer.normalizer.normalize_str
    answers = {normal(t["value"]) for r in make.records for t in r["conversations"] if t["from"] == "gpt"}
    assert (
        learnt and {text for text in learnt if text not in answers and text.removeprefix("\n") not in answers} == set()
    )


def test_packed_logits_equal_unpacked_ones(tmp_path, vocabulary):
    make = Maker(tmp_path, vocabulary)
    make.records = [any_record(random.Random(n)) for n in range(25)]
    of = make.audited(length=300)
    net = tiny_model(tmp_path / "net", make.tokenizer).eval()
    part = PackedRows(of.prepared / "train")
    compared = 0
    with torch.no_grad():
        for row in range(len(part)):
            batch = part.batch([row], 300, make.tokenizer.pad_token_id)
            packed = net(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
            used = 0
            for item in part.items(row):
                ids = torch.from_numpy(part.tokens[part.offsets[item] : part.offsets[item + 1]].astype(np.int64))
                alone = net(input_ids=ids[None]).logits[0]
                torch.testing.assert_close(packed[used : used + len(ids)], alone, atol=1e-5, rtol=1e-4)
                used += len(ids)
                compared += used > len(ids)
    assert compared > 5  # conversations behind another one


@pytest.mark.real_data
@pytest.mark.parametrize("length, lost", [(512, 0.5), (2048, 0.2)])
def test_real_conversations_raise_no_alarm(length, lost, tmp_path, vocabulary):
    if "AQUILA_REAL_DATA" not in os.environ:
        pytest.skip("AQUILA_REAL_DATA is not set")
    root = Path(os.environ["AQUILA_REAL_DATA"])
    make = Maker(tmp_path, vocabulary)
    make.records = [
        record
        for name in ("dolly_en", "emollm_zh_system", "flagai_aquila", "infinity_schema", "messy_real")
        for file in sorted((root / f"instruct_{name}").glob("*.jsonl"))
        for record in itertools.islice(broken_labels.read_jsonl(file), 400)
    ]
    # these tokens are a third as long as the published vocabulary's
    assert report.audit(make.audited(length=3 * length, lost_share=lost), lambda *_: None) == []


# ---- the embedding ----


def trained(folder: Path, tokenizer, *, tied: bool, chat: bool, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The embedding of a model after some steps, with or without the marks of the template; and the ids it read."""
    net = tiny_model(folder, tokenizer, tie_word_embeddings=tied, num_hidden_layers=1)
    talks = [
        [
            {"role": "assistant" if t["from"] == "gpt" else "user", "content": t["value"]}
            for t in record["conversations"]
        ]
        for record in tiny_conversations(200)
        if record["conversations"][0]["from"] == "human"
    ]
    encoded = [ids for ids, _ in chat_template.encode_batch(tokenizer, talks, default_system=None)]
    flat = torch.tensor([i for ids in encoded for i in ids])
    marks = torch.tensor([tokenizer.convert_tokens_to_ids(text) for text in ("<|im_start|>", "<|im_end|>")])
    text = flat[~torch.isin(flat, marks)]
    read = flat if chat else text
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        begins = torch.randint(0, len(read) - 48, (6,), generator=generator)
        ids = torch.stack([read[begin : begin + 48] for begin in begins])
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.get_input_embeddings().weight.detach().numpy(), text.numpy()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_the_embedding_of_a_trained_model_tells_whether_it_has_read_the_marks(chat, tied, tmp_path, vocabulary):
    tokenizer = Maker(tmp_path, vocabulary).tokenizer
    marks = [tokenizer.convert_tokens_to_ids(text) for text in ("<|im_start|>", "<|im_end|>")]
    table, used = trained(tmp_path / "net", tokenizer, tied=tied, chat=chat, steps=40)
    verdict = embedding.judge(table, marks, embedding.control_ids(tokenizer), used)
    assert verdict.undecided is None
    assert sorted(verdict.untrained) == ([] if chat else marks)


def test_nothing_is_said_of_fresh_weights_and_rows_put_there_are_known_without_a_control_group(tmp_path, vocabulary):
    tokenizer = Maker(tmp_path, vocabulary).tokenizer
    control = embedding.control_ids(tokenizer)
    table, used = trained(tmp_path / "net", tokenizer, tied=True, chat=True, steps=0)
    verdict = embedding.judge(table, [1912, 1913], control, used)
    assert not verdict.untrained and "fresh weights" in verdict.undecided
    for change, said in (
        (lambda t: t.__setitem__(1913, 0), "zero"),
        (lambda t: t.__setitem__(1913, t[1000]), "copy of that of id 1000"),
        (lambda t: t.__setitem__(1913, t.mean(0)), "mean of all rows"),
    ):
        broken = table.copy()
        change(broken)
        assert said in embedding.judge(broken, [1912, 1913], [], used).untrained[1913]
    assert f"{len(table):,} rows" in embedding.judge(table, [9000], [], used).untrained[9000]


# ---- what is printed ----


def test_supervised_tokens_are_green_in_a_terminal_and_marked_elsewhere(tmp_path, vocabulary, monkeypatch, capsys):
    make = Maker(tmp_path, vocabulary)
    of = make.audited()
    report.audit(of, lambda *_: None)
    printed = capsys.readouterr().out
    assert "tiny" in printed and printed.count("«") == printed.count("<|im_end|>»") >= 1
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    report.audit(of, lambda *_: None)
    assert report.GREEN in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    report.audit(of, lambda *_: None)
    assert report.GREEN not in capsys.readouterr().out


def test_chunks_hold_whole_conversations_and_hashes_tell_them_apart(tmp_path, vocabulary, monkeypatch):
    make = Maker(tmp_path, vocabulary)
    make.records = [any_record(random.Random(n)) for n in range(60)]
    of = make.audited(length=400)
    part = PackedRows(of.prepared / "train")
    marks = rows.Marks.of(make.tokenizer)
    whole = rows.look("train", part, marks, [], rows.Tally(), threads=1)
    monkeypatch.setattr(rows, "CHUNK", 100)
    spans = list(rows.chunks(np.asarray(part.offsets)))
    assert len(spans) > 10 and spans[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    cut = rows.look("train", part, marks, [], rows.Tally(), threads=3)
    assert (cut.hashes == whole.hashes).all() and cut.conversations == spans[-1][1]
    weights = rows.weights_of(int(np.diff(part.offsets).max()))
    ids = part.tokens[part.offsets[3] : part.offsets[4]].tolist()
    assert rows.hash_of(ids, weights) == int(whole.hashes[3]) and rows.hash_of(ids[::-1], weights) not in whole.hashes
