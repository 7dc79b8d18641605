"""What an Instruct model is for: does it do as it is told, does it stop, and how near are its answers to references.

    ifeval       541 English prompts with verifiable instructions, by lm-eval's copy of the published rules
    instruct_zh  Chinese and English ones of our own making (data/instruct_zh.jsonl, instruct_en.jsonl, constraints.py)
    instruct_en
    references   conversations: bits per byte of their last answers, by language

Prompts are rendered by the model's own chat template, with its system line.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aquila_sft import runtime
from aquila_sft.chat_template import encode_messages
from aquila_sft.data import conversations, sources
from aquila_sft.errors import UserError
from aquila_sft.evaluation import constraints, items
from aquila_sft.evaluation.benchmarks import Source
from aquila_sft.evaluation.choosing import Choosing
from aquila_sft.evaluation.engine import ItemTask, Outcome
from aquila_sft.evaluation.journal import Journal

OWN = {name: Path(__file__).parents[2] / "data" / f"{name}.jsonl" for name in ("instruct_zh", "instruct_en")}
IFEVAL = Source(
    {"repo": "google/IFEval", "files": ["ifeval_input_data.jsonl"]}, ("ifeval_input_data.jsonl", "input_data.jsonl")
)
IFEVAL_FIELDS = ("key", "prompt", "instruction_id_list", "kwargs")


@dataclass(frozen=True)
class Asked:
    prompt: str  # rendered
    record: dict


def rendered(tokenizer, record: dict) -> Asked:
    messages = [{"role": "user", "content": record["prompt"]}]
    return Asked(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), record)


def ifeval_records(data: str | None, cache: Path, limit: int | None) -> list[dict]:
    if data is None:
        raise UserError("eval.tasks=ifeval reads google/IFEval: add eval.data=hub, or eval.data=<folder> with its file")
    if data == "hub":
        files = items.from_hub(IFEVAL.hub, "files", IFEVAL.local, cache)
    else:
        bases = [Path(data).expanduser() / "ifeval", Path(data).expanduser() / "eval_ifeval", Path(data).expanduser()]
        files = items.first_match(bases, IFEVAL.local)
        if not files:
            raise UserError(f"eval.data={data} has no file for ifeval: none of {', '.join(IFEVAL.local)}")
    found = items.records(files[0], ())[:limit]
    if not found:
        raise UserError(f"{files[0]} holds no item of ifeval")
    for where, record in found:
        if missing := [name for name in IFEVAL_FIELDS if name not in record]:
            raise UserError(f"{where} is no item of ifeval: no column {missing[0]}; it has: {', '.join(record)}")
    import_rules(fetch=data == "hub")
    for where, record in found:
        try_rules(where, record)
    return [record for _, record in found]


def import_rules(*, fetch: bool) -> None:
    """lm-eval's copy downloads nltk's punkt_tab when it is imported: not where the data are local."""
    import nltk

    download = nltk.download
    if not fetch:
        nltk.download = lambda *_, **__: False
    try:
        import lm_eval.tasks.ifeval.utils  # noqa: F401
    finally:
        nltk.download = download


def try_rules(where: str, record: dict) -> None:
    """What the rules cannot work with is told before a model has answered anything."""
    try:
        if not isinstance(record["prompt"], str) or not record["instruction_id_list"]:
            raise ValueError("an item has a prompt and instructions")
        ifeval_follow(record, "A sentence.")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is no item of ifeval: {error!r}") from None
    except LookupError:  # nltk's own, of a resource
        raise UserError(
            "eval.tasks=ifeval counts sentences with nltk's punkt_tab, which is not there: "
            "python -m nltk.downloader punkt_tab"
        ) from None


def chat_task(
    name: str, scorer, records: list[dict], max_new_tokens: int, choosing: Choosing, follow: Callable
) -> ItemTask:
    """A task of chat prompts. follow(record, answer) -> {rule: [obeyed, …]}"""
    how = {"until": [], "max_gen_toks": max_new_tokens, "chat": True, "choosing": choosing}

    def requests_of(asked: Asked) -> list:
        return [("generate_until", (asked.prompt, how))]

    def outcome(asked: Asked, results: list[str]) -> Outcome:
        scores = {}
        for rule, obeyed in follow(asked.record, results[0]).items():
            scores[f"prompts, {rule}"] = float(all(obeyed))
            scores[f"instructions, {rule}"] = sum(obeyed) / len(obeyed)
        return Outcome(scores, written=results[0], stopped=scorer.has_stopped(asked.prompt, how))

    return ItemTask(name, [rendered(scorer.tokenizer, record) for record in records], requests_of, outcome)


def ifeval_follow(record: dict, answer: str) -> dict[str, list[bool]]:
    from lm_eval.tasks.ifeval.utils import process_results

    found = process_results(record, [answer])
    return {"strict": found["inst_level_strict_acc"], "loose": found["inst_level_loose_acc"]}


def own_follow(record: dict, answer: str) -> dict[str, list[bool]]:
    return {"strict": constraints.followed(record["checks"], answer)}


def table(tasks: list[ItemTask]) -> list[list[str]]:
    """[set, measure, per cent, prompts]. Instructions weigh alike in the whole set, as IFEval publishes them."""
    rows = [["set", "measure", "%", "± (s.e.)", "prompts"]]
    for task in tasks:
        count = len(task.outcomes)
        measures = {name: [o.scores[name] for o in task.outcomes] for name in task.outcomes[0].scores}
        measures["answers that stop"] = [float(o.stopped) for o in task.outcomes]
        asked = [len(item.record.get("instruction_id_list") or item.record["checks"]) for item in task.items]
        for name, values in measures.items():
            weights = asked if name.startswith("instructions") else [1] * count
            centre = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            spread = sum((w * (v - centre)) ** 2 for w, v in zip(weights, values, strict=True))
            error = math.sqrt(spread * count / max(1, count - 1)) / sum(weights)
            rows.append([task.task_name, name, f"{100 * centre:.2f}", f"{100 * error:.2f}", str(count)])
    return rows


def read_references(files: list[str], limit: int | None) -> list[tuple[str, conversations.Conversation]]:
    """The first `limit` conversations of every source and language, with their places. What is none is left out, and
    said."""
    found, left_out = [], []
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for file in sources.find(files, setting="eval.references"):
        for where, record in sources.read(file):
            try:
                conversation = conversations.normalise(record or {}, file.stem)
            except conversations.Refused as refused:
                left_out.append(f"{refused} at {where}" if record else f"not a JSON object at {where}")
                continue
            part = conversation.language, conversation.source
            counts[part] += 1
            if limit is None or counts[part] <= limit:
                found.append((where, conversation))
    if not found:
        why = f" ({left_out[0]})" if left_out else ""
        raise UserError(f"eval.references={','.join(files)} holds no conversation with an answer{why}")
    if left_out:
        runtime.say(f"  eval.references: {len(left_out):,} records left out, the first: {left_out[0]}")
    return found


def references(scorer, found: list[tuple[str, conversations.Conversation]]) -> list[Outcome]:
    """Nats and bytes of the last answer of each conversation."""
    pairs, owners = [], []
    for number, (where, conversation) in enumerate(found):
        messages = conversation.messages
        context, _ = encode_messages(scorer.tokenizer, messages[:-1], add_generation_prompt=True)
        whole, _ = encode_messages(scorer.tokenizer, messages)
        answer = whole[len(context) : last_of_answer(whole, scorer.turn_end_id)]
        if whole[: len(context)] != context or not answer:
            raise UserError(f"{where}: the chat template does not render an answer behind its prompt")
        pieces = answer_pieces(context, answer, scorer.max_length)
        pairs += pieces
        owners += [number] * len(pieces)
    keys = [Journal.key("reference", *pair) for pair in pairs]
    scorer.score(keys, lambda i: pairs[i], "reference answers")
    nats = [0.0] * len(found)
    for key, owner in zip(keys, owners, strict=True):
        nats[owner] -= scorer.journal.answers[key]
    outcomes = []
    for (where, conversation), lost in zip(found, nats, strict=True):
        scores = {"nats": lost, "bytes": float(len(conversation.messages[-1]["content"].encode()))}
        about = {"where": where, "language": conversation.language, "source": conversation.source}
        outcomes.append(Outcome(scores, about=about))
    return outcomes


def answer_pieces(context: list[int], answer: list[int], max_length: int) -> list[tuple[list[int], list[int]]]:
    """(what stands before, tokens) that are the answer together. Where the model cannot see all of it at once, pieces
    of half its length are read behind as much as fits: every token counts once, as every byte does."""
    if len(context) + len(answer) - 1 <= max_length:
        return [(context, answer)]
    size = max_length // 2
    return [(context + answer[:at], answer[at : at + size]) for at in range(0, len(answer), size)]


def last_of_answer(ids: list[int], turn_end_id: int | None) -> int:
    """Where the last answer ends: at its end of turn, which is no text of it."""
    return len(ids) - 1 - ids[::-1].index(turn_end_id)
