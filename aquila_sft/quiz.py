"""The bundled world's test: the same held-out questions asked of two models, answers graded by equality.

    questions -> ask(model) -> replies -> figures (right and stopped, by language and kind) -> table

The grading is plain: the answer, blanks around it cut off, equals the expected one, and the model ended its turn.
"""

import dataclasses
import json
from pathlib import Path

import torch

from aquila_sft.chat_template import encode_messages, stop_ids

FILE = "answers.jsonl"
ROOM = 8  # tokens an answer may be longer than the longest expected one
AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Reply:
    text: str
    stopped: bool  # the model ended its turn by itself
    right: bool


@torch.inference_mode()
def ask(model, tokenizer, questions: list[dict], system: str | None) -> list[Reply]:
    """Greedy answers to `questions` ({question, answer, …}), each in a conversation of its own, in their order."""
    prompts = [
        encode_messages(
            tokenizer,
            [{"role": "user", "content": q["question"]}],
            default_system=system,
            add_generation_prompt=True,
        )[0]
        for q in questions
    ]
    expected = tokenizer([q["answer"] for q in questions], add_special_tokens=False)["input_ids"]
    limit = max(map(len, expected)) + ROOM
    ends = set(stop_ids(tokenizer))
    was_training = model.training
    model.eval()
    replies: dict[int, Reply] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), AT_ONCE):
        chosen = by_length[start : start + AT_ONCE]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):  # padded on the left: all answers begin at the same place
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )[:, width:].tolist()
        for i, new in zip(chosen, written, strict=True):
            length = next((at for at, token in enumerate(new) if token in ends), None)
            text = tokenizer.decode(new[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            stopped = length is not None
            replies[i] = Reply(text, stopped, stopped and text.strip() == questions[i]["answer"])
    model.train(was_training)
    return [replies[i] for i in range(len(questions))]


def figures(questions: list[dict], replies: list[Reply]) -> dict:
    """{accuracy: {en, zh} of facts, skills_accuracy: {en, zh}, stop_rate, stop_rates: {en, zh}}, shares of 1."""

    def share(what: str, **wanted: str) -> float:
        found = [
            getattr(reply, what)
            for q, reply in zip(questions, replies, strict=True)
            if all(q[key] == value for key, value in wanted.items())
        ]
        return round(sum(found) / len(found), 4)

    languages = sorted({q["language"] for q in questions})
    return {
        "accuracy": {lang: share("right", language=lang, kind="fact") for lang in languages},
        "skills_accuracy": {lang: share("right", language=lang, kind="skill") for lang in languages},
        "stop_rate": share("stopped"),
        "stop_rates": {lang: share("stopped", language=lang) for lang in languages},
    }


def write(path: Path, questions: list[dict], replies: dict[str, list[Reply]]) -> None:
    """Every question with the answer of every model, one object a line."""
    with open(path, "w", encoding="utf-8") as file:
        for at, question in enumerate(questions):
            answers = {name: dataclasses.asdict(of_model[at]) for name, of_model in replies.items()}
            file.write(json.dumps(question | answers, ensure_ascii=False) + "\n")


def read_questions(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def examples(path: Path, count: int) -> list[str]:
    """Of `count` relations, evenly spaced, the first fact in each language: what was asked, said before, said after."""
    first: dict[str, dict[str, dict]] = {}
    for item in read_questions(path):
        if item["kind"] == "fact":
            first.setdefault(item["relation"], {}).setdefault(item["language"], item)
    relations = list(first.values())
    lines = []
    for place in range(count):
        for item in relations[place * len(relations) // count].values():
            before = brief(item["base"]) if "base" in item else "–"
            lines += [f"  {item['question']}", f"     before  {before}", f"     after   {brief(item['tuned'])}"]
    return lines


def brief(reply: dict) -> str:
    text = " ".join(reply["text"].split())
    return (text if len(text) <= 60 else text[:60] + " …") + ("" if reply["stopped"] else " (never stops)")


def table(summary: dict) -> list[str]:
    """The figures of a summary.json as lines: base and tuned, by language."""
    lines = [f"  {'':<38}{'base':>10}{summary['recipe']:>10}"]
    for key, name, form in (
        ("accuracy", "facts right", ".1%"),
        ("skills_accuracy", "skills right", ".1%"),
        ("stop_rates", "answers that stop", ".1%"),
        ("bits_per_byte", "bits per byte of held-back answers", ".3f"),
    ):
        for language, tuned in sorted(summary[key].items()):
            base = summary["before"].get(key, {}).get(language)
            lines.append(
                f"  {name + ', ' + language:<38}{'–' if base is None else format(base, form):>10}{tuned:>10{form}}"
            )
    return lines
