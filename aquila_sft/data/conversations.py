"""A record of any accepted shape becomes messages, and messages a Conversation, or a reason why they cannot be one.

    {"conversations": [{"from": "human", "value": "…"}, …]}   ShareGPT, Infinity-Instruct
    {"messages": [{"role": "user", "content": "…" | [{"type": "text", "text": "…"}]}, …]}
    {"instruction": "…", "input": "…", "output": "…", "system"?, "history"?}   Alpaca; Dolly's context and response
    {"prompt": "…", "response": "…"}   pairs; also question, query, instruction and answer, completion, output

Pure functions: no file, no tokenizer. Every refusal has a short reason that the ledger counts; hygiene.py has the
rules that may be switched off.
"""

import dataclasses
import hashlib
import json
import re
import unicodedata

CALL, RESULT = "call", "result"  # of a tool; no Conversation has them
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    **dict.fromkeys(("function_call", "tool_call"), CALL),
    **dict.fromkeys(("observation", "tool", "function", "tool_response", "function_response", "ipython"), RESULT),
}
INPUTS, OUTPUTS = ("input", "context"), ("output", "response", "answer", "completion")
QUESTIONS = ("prompt", "question", "query", "input")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that begin with a user turn (after an optional system line) and end with an assistant turn."""

    messages: list[dict]  # {"role": "system" | "user" | "assistant", "content": str}
    language: str  # zh, en or other
    source: str

    def sha256(self) -> str:
        """Identity by content: the same words are the same conversation, whatever its id or file."""
        return sha256(self.messages)


def sha256(messages: list[dict]) -> str:
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


class Refused(ValueError):
    """A record that is left out; `args[0]` is the reason as the ledger counts it."""


class NoPair(Refused):
    """It has neither the slots of Alpaca nor those of a pair."""


def normalise(record: dict, default_source: str) -> Conversation:
    """By the rules of this module alone. Raises Refused with the reason.

    Turns after the last answer are cut: nothing in them could be supervised.
    """
    messages = in_order(until_last_answer(messages_of(record)))
    return Conversation(messages, language("".join(m["content"] for m in messages)), source_of(record, default_source))


def source_of(record: dict, default: str) -> str:
    """Where a record says it comes from; `default` when it does not say."""
    source = record.get("source")
    source = source if isinstance(source, str) and source else default
    return spelt_out(source)


def spelt_out(text: str) -> str:
    """What is not printable as Python writes it: a terminal does not obey it, and UTF-8 can hold it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_empty(value: object) -> bool:
    """As a slot of one shape is, where files of several shapes were joined into one table."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def filled(record: dict, keys: tuple[str, ...]) -> str | None:
    """The first of some slots that holds anything, or that is there at all."""
    there = [key for key in keys if key in record]
    return next((key for key in there if not is_empty(record[key])), there[0] if there else None)


def messages_of(record: dict) -> list[dict]:
    """The turns of any of the four shapes, roles as in ROLES, empty slots left away. Raises Refused."""
    for key in ("conversations", "messages"):
        turns = record.get(key)
        if isinstance(turns, list) and turns:
            # FlagAI's files and others have the system line beside the turns, mostly empty
            return with_system([message(turn) for turn in turns], record.get("system") or record.get("instruction"))
    try:
        return pair_of(record)
    except NoPair:
        if record.get("conversations") is not None or record.get("messages") is not None:
            raise Refused("no turns") from None
        raise


def with_system(messages: list[dict], line: object) -> list[dict]:
    """In front the system line, unless it is empty, or there is one."""
    text = text_of(line)
    if text.strip() and messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    has_empty = messages[0]["role"] == "system" and not messages[0]["content"].strip()
    return messages[1:] if has_empty else messages


def pair_of(record: dict) -> list[dict]:
    """The one exchange of an Alpaca record or of a pair; `history` holds those before it."""
    asked, answer = filled(record, ("instruction", *QUESTIONS)), filled(record, OUTPUTS)
    if asked is None or answer is None:
        raise NoPair("none of the shapes of a conversation")
    slots = [text_of(record[key]) for key in dict.fromkeys((asked, *INPUTS)) if key in record]
    # a text that the question is about, unless the question has it already
    question = "\n".join(slot for i, slot in enumerate(slots) if slot.strip() and (not i or slot not in slots[0]))
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Refused("history that is not pairs of question and answer")
    exchanges = [*((text_of(q), text_of(a)) for q, a in history), (question, text_of(record[answer]))]
    messages = [
        {"role": r, "content": c} for pair in exchanges for r, c in zip(("user", "assistant"), pair, strict=True)
    ]
    return with_system(messages, record.get("system"))


def message(turn: object) -> dict:
    if not isinstance(turn, dict):
        raise Refused("a turn is not an object")
    role = turn.get("from") or turn.get("role")
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise Refused(f"unknown role {role!r}"[:60])
    role, content = ROLES[role.strip().lower()], text_of(turn.get(filled(turn, ("value", "content"))))
    if calls := turn.get("tool_calls") or turn.get("function_call"):
        calls = calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False)
        role, content = CALL, text_of(f"{content}\n{calls}" if content.strip() else calls)
    weight = turn.get("weight") if turn.get("loss_weight") is None else turn["loss_weight"]
    if role == "assistant" and weight not in (None, 1, "1", "1.0"):
        raise Refused(f"an answer whose weight in the loss is {weight!r}"[:60])
    return {"role": role, "content": content}


def text_of(content: object) -> str:
    """A string, or a list of text parts joined. Lone surrogates, which no UTF-8 text has, refuse the record."""
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type", "text") == "text" for p in content):
            raise Refused("content that is not text")
        parts = [p.get("text") if p.get("text") is not None else p.get("value") for p in content]
        if not all(part is None or isinstance(part, str) for part in parts):
            raise Refused("content that is not text")
        content = "".join(part for part in parts if part is not None)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Refused("content that is not text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("text that is not valid Unicode") from None
    return content


def until_last_answer(messages: list[dict]) -> list[dict]:
    """Without the turns behind the last answer. Raises Refused where there is none."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise Refused("no assistant turn")
    return messages[: last + 1]


def in_order(messages: list[dict]) -> list[dict]:
    """The same. Raises Refused for turns out of order, and for empty ones."""
    roles = [m["role"] for m in messages]
    if {CALL, RESULT} & set(roles):
        raise Refused("turns of tools")
    if "system" in roles[1:]:
        raise Refused("system turn not at the beginning")
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken[0] != "user":
        raise Refused("begins with an answer")
    if any(a == b for a, b in zip(spoken, spoken[1:], strict=False)):
        raise Refused("two turns of one role in a row")
    if any(not m["content"].strip() for m in messages if m["role"] != "system"):
        raise Refused("empty turn")
    return messages


HAN, LATIN, KANA_HANGUL = re.compile("[一-鿿㐀-䶿]"), re.compile("[A-Za-z]"), re.compile("[぀-ヿ가-힯]")


def language(text: str) -> str:
    """zh, en or other, by the script of the letters. `langdetect` fields are not believed: "ko" stands on Chinese rows.

    A Chinese character says about as much as three Latin letters, so it counts three times: code and names inside
    Chinese text do not make it English.
    """
    sample = text[:2000]
    han, latin, kana_hangul = (len(script.findall(sample)) for script in (HAN, LATIN, KANA_HANGUL))
    others = sum(map(str.isalpha, sample)) - han - latin
    if 3 * han >= max(latin, 1) and kana_hangul * 4 < han:
        return "zh"
    return "en" if latin > others else "other"


def any_text(value: object) -> str:
    """The strings inside a record that is no conversation, roles and keys left out: enough to tell its language."""
    found, waiting = [], [value]
    while waiting:  # no recursion: a record may be nested as deeply as JSON can be read
        inner = waiting.pop()
        if isinstance(inner, dict):
            inner = [v for k, v in inner.items() if k not in ("from", "role", "id", "source", "type")]
        if isinstance(inner, list):
            waiting += reversed(inner or [""])
        else:
            found.append(inner if isinstance(inner, str) else "")
    return " ".join(found)


def answer_bytes(messages: list[dict]) -> int:
    """UTF-8 bytes of the answers as they are tokenized, that is after NFC: the denominator of bits per byte."""
    return sum(len(unicodedata.normalize("NFC", m["content"]).encode()) for m in messages if m["role"] == "assistant")


def without_leading_exchange(messages: list[dict]) -> list[dict] | None:
    """The same without its oldest question and answer, the system line kept; None when only one exchange is left."""
    head = 1 if messages[0]["role"] == "system" else 0
    return messages[:head] + messages[head + 2 :] if len(messages) > head + 2 else None
