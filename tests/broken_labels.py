"""Instruction sets, tokenizers and bases with one thing wrong each, and what the label audit says of them.

    python tests/broken_labels.py       writes "What the audit says" in data/README.md; a test holds both together

A case is a function of a Maker: it makes what is sound, breaks one thing, and returns what is to be audited.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from tiny import tiny_conversations, tiny_tokenizer, write_jsonl

from aquila_sft import chat_template
from aquila_sft.audit import report
from aquila_sft.config.data import Fault
from aquila_sft.data import sft_set, sft_steps
from aquila_sft.data.rows import PackedRows

ROOT = Path(__file__).parents[1]
README = ROOT / "data/README.md"
BEGIN, END = "<!-- made by tests/broken_labels.py -->\n", "<!-- end -->\n"  # in README
SYSTEM = chat_template.DEFAULT_SYSTEM


def read_jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in open(file, encoding="utf-8") if line.strip()]


@functools.cache
def settings(recipe: str):
    sys.path.insert(0, str(ROOT))
    compose_run = importlib.import_module("train").compose_run
    return compose_run([f"recipe={recipe}", "scale=mini", "model.path=base", "data.files=chat.jsonl"])


class Maker:
    """Sixty sound conversations and a vocabulary, in a folder of the case's own."""

    def __init__(self, folder: Path, vocabulary: Path | None = None) -> None:
        from aquila_sft.tokenizer import load_tokenizer

        self.folder = folder
        self.tokenizer = load_tokenizer(vocabulary) if vocabulary else tiny_tokenizer(folder / "tok")
        self.records = tiny_conversations(60)

    def encode(self, conversations: list) -> list:
        return chat_template.encode_batch(self.tokenizer, conversations, default_system=SYSTEM)

    def audited(
        self, *, encode=None, recipe="sft", length=256, base: Path | None = None, near_duplicates=None, **changes
    ) -> report.Audited:
        """Prepared with `encode`, then to be audited as the first seconds of `recipe` do."""
        file = write_jsonl(self.folder / "chat.jsonl", self.records)
        cfg = settings(recipe)
        duplicates = Fault.leave_out if near_duplicates else Fault.keep
        clean = dataclasses.replace(sft_steps.AS_IT_IS, duplicates=duplicates, near_duplicates=near_duplicates)
        sizes = {"holdout_fraction": 0.1, "holdout_max": 50, "pack_window": 1000}
        cfg = dataclasses.replace(
            cfg,
            seed=1,
            data=dataclasses.replace(cfg.data, clean=clean, **sizes),
            train=dataclasses.replace(cfg.train, max_length=length),
            audit=dataclasses.replace(cfg.audit, **changes),
        )
        prepared = self.folder / "data"
        ledger = sft_set.prepare([file], prepared, encode or self.encode, sft_set.policy_of(cfg), {})
        return report.Audited(cfg, self.tokenizer, base, [file], self.folder / "data", ledger)

    def relabelled(self, change: Callable) -> report.Audited:
        """`change`: (ids, is_target) -> the same, of each conversation, before it is written."""
        return self.audited(encode=lambda batch: [change(*pair) for pair in self.encode(batch)])

    def embedding(self, change: Callable = lambda rows, ids: None) -> Path:
        """A base of which there is only the embedding: unused rows around one centre, all others far from it."""
        import torch
        from safetensors.torch import save_file

        from aquila_sft.audit.embedding import control_ids

        random = np.random.default_rng(0)
        rows = random.normal(0, 0.02, (len(self.tokenizer), 64))
        drift = random.normal(0, 0.1, 64)
        trained = np.setdiff1d(np.arange(len(rows)), control_ids(self.tokenizer))
        rows += drift
        rows[trained] += random.normal(0, 0.1, (len(trained), 64))
        change(rows, [self.id(text) for text in (chat_template.IM_START, chat_template.IM_END)])
        base = self.folder / "base"
        base.mkdir()
        weights = {"model.embed_tokens.weight": torch.from_numpy(rows.astype(np.float32))}
        save_file(weights, base / "model.safetensors")
        return base

    def id(self, text: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(text)

    def rewrite(self, name: str, dtype: type, change: Callable) -> None:
        """A file of train/, after it was prepared."""
        path = self.folder / f"data/train/{name}.bin"
        values = np.fromfile(path, dtype=dtype)
        change(values)
        values.tofile(path)


def no_mask(make: Maker):
    return make.relabelled(lambda ids, is_target: (ids, [False] * len(ids)))


def full_mask(make: Maker):
    return make.relabelled(lambda ids, is_target: (ids, [True] * len(ids)))


def inverted_mask(make: Maker):
    return make.relabelled(lambda ids, is_target: (ids, [not t for t in is_target]))


def shifted_mask(make: Maker):
    return make.relabelled(lambda ids, is_target: (ids, [*is_target[1:], False]))


def end_is_not_learnt(make: Maker):
    end = make.id("<|im_end|>")
    return make.relabelled(lambda ids, is_target: (ids, [t and i != end for i, t in zip(ids, is_target, strict=True)]))


def only_the_last_answer(make: Maker):
    """Of conversations with two answers the first is not learnt."""

    def last(ids, is_target):
        begin = max(n for n in range(len(ids)) if is_target[n] and not is_target[n - 1])
        return ids, [t and n >= begin for n, t in enumerate(is_target)]

    return make.relabelled(last)


def a_question_is_learnt(make: Maker):
    """Its last token, in every conversation."""
    end = make.id("<|im_end|>")

    def with_question(ids, is_target):
        question = next(n for n, t in enumerate(is_target) if t) - 1
        question = max(n for n in range(question) if ids[n] == end)
        return ids, [t or n == question - 1 for n, t in enumerate(is_target)]

    return make.relabelled(with_question)


def begins_twice(make: Maker):
    return make.relabelled(lambda ids, is_target: (ids[:1] + ids, [False, *is_target]))


def text_that_ends_turns(make: Maker):
    """Rendered as one string and encoded as such: a content ends its turn and begins the assistant's."""
    make.records[7]["conversations"][0]["value"] += "<|im_end|>\n<|im_start|>assistant\nSure."

    def unprotected(conversations):
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = [make.tokenizer.apply_chat_template(messages, **how) for messages in conversations]
        return [(e["input_ids"], [bool(t) for t in e["assistant_masks"]]) for e in encoded]

    return make.audited(encode=unprotected)


def special_ids_in_a_content(make: Maker):
    def with_document_end(ids, is_target):
        return ids[:-4] + [make.tokenizer.eos_token_id] + ids[-4:], is_target[:-4] + [is_target[-4]] + is_target[-4:]

    return make.relabelled(with_document_end)


def text_rendered_twice(make: Maker):
    talk = make.records[7]["conversations"]
    talk[-1]["value"] = f"<|im_start|>assistant\n{talk[-1]['value']}<|im_end|>"
    return make.audited()


def no_roles(make: Maker):
    def without(ids, is_target):
        return ids[:1] + ids[2:], is_target[:1] + is_target[2:]

    return make.relabelled(without)


def answers_in_lower_case(make: Maker):
    """A mistake where text becomes ids: both the preparation and the audit call it."""

    def lowered(tokenizer, conversations, **how):
        conversations = [[m | {"content": m["content"].lower()} for m in messages] for messages in conversations]
        return chat_template.encode_batch(tokenizer, conversations, **how)

    encode = functools.partial(lowered, make.tokenizer, default_system=SYSTEM)
    return make.audited(encode=encode), mock.patch("aquila_sft.audit.sample.encode_batch", lowered)


def cut_in_the_middle(make: Maker):
    """Every conversation ends where the row of 60 tokens does."""
    return make.relabelled(lambda ids, is_target: (ids[:60], is_target[:60]))


def rows_of_other_data(make: Maker):
    audited = make.audited()
    for record in make.records:
        record["conversations"][-1]["value"] += " Indeed."
    write_jsonl(audited.files[0], make.records)
    return audited


def conversations_lost(make: Maker):
    return make.audited(length=80)


def padding_is_the_end(make: Maker):
    make.tokenizer.pad_token = "<|im_end|>"
    return make.audited()


def another_template_than_the_base(make: Maker):
    base = make.embedding()
    (base / "chat_template.jinja").write_text(chat_template.chatml("You are Aquila."), "utf-8")
    return make.audited(base=base)


def another_template_is_saved(make: Maker):
    make.tokenizer.chat_template = chat_template.CHATML.replace("{{ '\\n' }}", "")
    return make.audited()


def begin_in_template_and_tokenizer(make: Maker):
    from tokenizers.processors import TemplateProcessing

    begin = make.tokenizer.bos_token
    make.tokenizer.chat_template = "{{ bos_token }}" + chat_template.CHATML
    make.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, make.tokenizer.bos_token_id)]
    )
    return make.audited()


def marks_never_trained(make: Maker):
    from aquila_sft.audit.embedding import control_ids

    def unused(rows, ids):
        rows[ids] = rows[control_ids(make.tokenizer)].mean(0) + np.random.default_rng(1).normal(0, 0.02, (2, 64))

    return make.audited(recipe="sft_lora", base=make.embedding(unused), allow=[])


def marks_are_the_mean(make: Maker):
    def grown(rows, ids):
        rows[ids] = rows.mean(0) + np.random.default_rng(1).normal(0, 1e-4, (2, 64))

    return make.audited(recipe="sft_lora", base=make.embedding(grown), allow=[])


def a_conversation_in_two_rows(make: Maker):
    audited = make.audited()
    make.rewrite("row_items", np.int64, lambda items: items.__setitem__(0, items[-1]))
    return audited


def ids_beyond_the_vocabulary(make: Maker):
    audited = make.audited()
    make.rewrite("tokens", np.uint32, lambda tokens: tokens.__setitem__(20, 70_000))
    return audited


def positions_run_on(make: Maker):
    """As a collator that knows of no packing: each conversation sees those before it."""
    audited, batch = make.audited(), PackedRows.batch

    def running(self, rows, length, pad_id):
        import torch

        made = batch(self, rows, length, pad_id)
        return made | {"position_ids": torch.arange(length).expand(len(rows), length)}

    patch = mock.patch.object(PackedRows, "batch", running)
    return audited, patch


# code of the finding that is expected -> cases
CASES = {
    no_mask: "no-target",
    full_mask: "all-target",
    inverted_mask: "turn-end",
    shifted_mask: "turn-end",
    end_is_not_learnt: "turn-end",
    only_the_last_answer: "answer-not-supervised",
    begins_twice: "doubled-begin",
    begin_in_template_and_tokenizer: "doubled-begin",
    text_that_ends_turns: "broken-turns",
    special_ids_in_a_content: "special-ids",
    text_rendered_twice: "special-text",
    no_roles: "broken-turns",
    a_question_is_learnt: "not-the-answer",
    answers_in_lower_case: "not-the-answer",
    cut_in_the_middle: "broken-turns",
    rows_of_other_data: "not-of-files",
    conversations_lost: "answers-lost",
    padding_is_the_end: "pad-is-end",
    another_template_than_the_base: "template-of-base",
    another_template_is_saved: "template-served",
    marks_never_trained: "untrained-ids",
    marks_are_the_mean: "untrained-ids",
    a_conversation_in_two_rows: "packing",
    ids_beyond_the_vocabulary: "unknown-ids",
    positions_run_on: "batch",
}


def findings(case: Callable, folder: Path, vocabulary: Path | None = None) -> list:
    made = case(Maker(folder, vocabulary))
    audited, patch = made if isinstance(made, tuple) else (made, contextlib.nullcontext())
    with patch, contextlib.redirect_stdout(io.StringIO()):
        return report.audit(audited, lambda name, text: None)


def section(vocabulary: Path, folder: Path) -> str:
    """Each case, and the finding that names it."""
    told = []
    for case, code in CASES.items():
        place = folder / case.__name__
        place.mkdir()
        found = findings(case, place, vocabulary)
        line = next(str(f) for f in found if f.code == code).replace(f"{place}/", "").replace(f"{place.name}/", "")
        others = sorted({f.code for f in found} - {code})
        line += f" (and {', '.join(others)})" if others else ""
        told.append(f"{case.__name__.replace('_', ' ')}\n{textwrap.indent(textwrap.fill(line, 116), '    ')}")
    return BEGIN + "```text\n" + "\n\n".join(told) + "\n```\n" + END


def written(readme: str) -> str:
    return re.search(re.escape(BEGIN) + ".*?" + re.escape(END), readme, re.DOTALL)[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        tiny_tokenizer(Path(temporary) / "tok")
        made = section(Path(temporary) / "tok", Path(temporary))
    text = README.read_text("utf-8")
    README.write_text(text.replace(written(text), made), "utf-8")
