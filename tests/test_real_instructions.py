"""Real instruction sets, with the defects that people found in them: each ends where it belongs."""

import collections
import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

import train
from aquila_sft import chat_template
from aquila_sft.config.data import DamagedBlocks
from aquila_sft.data import hygiene, quarantine, sft_set, sources

pytestmark = pytest.mark.real_data

COPY = "copy of an earlier conversation"
CUT, CONTROL = "last question, without an answer, cut", "control characters taken out, or line ends made plain"
HTML, MARKER = "remnants of HTML taken out", "marker of an empty slot taken out"
OTHERS, NO_SLOT = "says to be another's model", "marker of an empty slot"

# Of each tag in messy.jsonl, how many of its rows end where; several repairs of one row are joined by +.
FATES = {
    "ai_disclaimer": {"kept": 14, f"kept + {CUT}": 18, OTHERS: 2},  # "As an AI language model" names nobody
    "control_or_replacement_char": {
        f"kept + {CONTROL}": 28,
        f"kept + {CONTROL} + {HTML}": 1,
        f"kept + {CONTROL} + {HTML} + {MARKER}": 2,
    },
    "empty_answer": {"empty turn": 30},
    "empty_question": {"empty turn": 1},
    "ends_with_human": {f"kept + {CUT}": 40},
    "exact_duplicate_of": {COPY: 8},
    "exact_duplicate_of what is not here": {"kept": 22, "empty turn": 1},
    "html_entity": {
        "kept": 1,  # it is about the structure of a web page
        f"kept + {CONTROL} + {HTML}": 1,
        f"kept + {CONTROL} + {HTML} + {MARKER}": 2,
        f"kept + {HTML}": 20,
        f"kept + {HTML} + {MARKER}": 7,  # &lt;无输入&gt;
        NO_SLOT: 2,  # the answer is &lt;无输出&gt;
    },
    "html_tag": {"kept": 31, NO_SLOT: 1},  # all are answers in HTML to questions about it
    "many_turns": {"empty turn": 1, "kept": 27, f"kept + {CONTROL}": 1, OTHERS: 4},
    "noinput_marker": {f"kept + {CONTROL} + {HTML} + {MARKER}": 1, f"kept + {MARKER}": 21, NO_SLOT: 10},
    "other_role": {"turns of tools": 30},
    "template_placeholder": {"placeholder that nobody filled in": 30},
    "very_long": {"kept": 5, "longer than a row": 1, OTHERS: 1},
    "zh_set_but_not_zh": {COPY: 4, "kept": 46, f"kept + {CONTROL}": 1, f"kept + {MARKER}": 1},
}


@pytest.fixture(scope="module")
def root() -> Path:
    if "AQUILA_REAL_DATA" not in os.environ:
        pytest.skip("AQUILA_REAL_DATA is not set")
    return Path(os.environ["AQUILA_REAL_DATA"])


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tok"))
    encode = partial(chat_template.encode_batch, tokenizer)
    defaults = sft_set.policy_of(train.compose_run(["recipe=sft", "scale=135m", "data.files=a.jsonl"]))

    def prepared(files: list[Path], **changes) -> tuple[dict, Path, sft_set.RowPolicy]:
        policy = dataclasses.replace(defaults, **changes)
        folder = tmp_path_factory.mktemp("set") / "set"
        return sft_set.prepare(files, folder, encode, policy, {}), folder, policy

    return prepared


def records(file: Path) -> list[dict]:
    return [record for _, record in sources.read(file)]


def test_every_defect_that_is_tagged_in_the_messy_set_ends_where_it_belongs(root, prepare, tmp_path):
    rows = records(root / "instruct_messy_real/messy.jsonl")
    wanted = {tag.split(":")[1] for row in rows for tag in row["_tags"] if tag.startswith("exact_duplicate_of:")}
    originals = [r for name in ("en", "zh") for r in records(root / f"instruct_alpaca_{name}/train.jsonl")]
    originals = [record for record in originals if record["id"] in wanted]
    present = {record["id"] for record in originals}
    file = tmp_path / "messy.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*originals, *rows]))
    ledger, folder, policy = prepare([file])
    left_out = {line["where"]: line["reason"] for line in quarantine.read(folder / quarantine.FILE)}
    found = collections.defaultdict(collections.Counter)
    for number, row in enumerate(rows, len(originals) + 1):
        fate = left_out.get(f"{file}:{number}")
        mended = hygiene.judge(row, "", policy.clean).mended
        for tag in row["_tags"]:
            tag, _, original = tag.partition(":")
            tag += " what is not here" * (original != "" and original not in present)
            found[tag][fate or " + ".join(["kept", *mended])] += 1
    assert {tag: dict(fates) for tag, fates in found.items()} == FATES


def test_the_longest_conversation_keeps_its_last_exchanges_whole(root, prepare, tmp_path):
    (longest,) = [r for r in records(root / "instruct_messy_real/messy.jsonl") if len(r["conversations"]) == 330]
    (tmp_path / "a.jsonl").write_text(json.dumps(longest))
    ledger, folder, _ = prepare([tmp_path / "a.jsonl"], holdout_fraction=0.0)
    cut = sum(of["leading_exchanges_cut"] for of in ledger["by_language"].values())
    assert ledger["shortened"] == ledger["kept"] == 1 and 0 < cut < 165
    assert 1500 < ledger["tokens"] <= 2048 and ledger["answer_tokens_cut"] > ledger["answer_tokens"]


def test_the_file_that_is_not_json_is_named_with_its_line(root, prepare):
    file = root / "instruct_messy_real/broken_array_trailing_comma.json"
    with pytest.raises(sources.Unreadable, match=rf"{file.name}:\d+: not JSON .*leave it out of data.files"):
        prepare([file])
    good = root / "instruct_infinity_schema/sample.jsonl"
    ledger, folder, _ = prepare([file, good], unreadable=DamagedBlocks.leave_out, holdout_fraction=0.0)
    (line,) = quarantine.read(folder / quarantine.FILE, "file that cannot be read")
    assert line["where"] == f"{file}:14007", "a comma stands before its last bracket"
    assert ledger["read"] == 2801 + 1 + 2, "what stands before it is read"
    assert ledger["kept_by_source"]["Subjective"].keys() == {"zh"}, "one of them says langdetect: ko"
    assert ledger["kept_by_source"]["Subjective"]["zh"]["rows"] == 2


def test_the_chinese_file_that_is_english_is_counted_as_english(root, prepare):
    ledger, _, _ = prepare([root / "instruct_messy_real/zh_file_mostly_english.jsonl"])
    count = {name: of.get("kept", 0) + of.get("held_back", 0) for name, of in ledger["by_language"].items()}
    assert count["en"] / sum(count.values()) > 0.85 and count["zh"] > 100
