"""A record of any accepted shape becomes a Conversation, or a reason why it cannot be one.

    {"conversations": [{"from": "human", "value": "…"}, …]}   Infinity-Instruct, ShareGPT
    {"messages": [{"role": "user", "content": "…" | [{"type": "text", "text": "…"}]}, …]}

Pure functions: no file, no tokenizer. Every refusal has a short reason that the ledger counts.
"""

import dataclasses
import hashlib
import json
import unicodedata

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
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that begin with a user turn (after an optional system line) and end with an assistant turn."""

    messages: list[dict]  # {"role": "system" | "user" | "assistant", "content": str}
    language: str  # zh, en or other, by script
    source: str

    def sha256(self) -> str:
        """Identity by content: the same words are the same conversation, whatever its id or file."""
        return hashlib.sha256(
            json.dumps(self.messages, ensure_ascii=False).encode("utf-8", "surrogatepass")
        ).hexdigest()


class Refused(ValueError):
    """A record that is left out; `args[0]` is the reason as the ledger counts it."""


def normalise(record: dict, default_source: str) -> Conversation:
    """Raises Refused with the reason. Turns after the last answer are cut: nothing in them could be supervised."""
    messages = [message(turn) for turn in turns_of(record)]
    messages = [
        m for i, m in enumerate(messages) if not (i == 0 and m["role"] == "system" and not m["content"].strip())
    ]
    last_answer = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last_answer is None:
        raise Refused("no assistant turn")
    messages = messages[: last_answer + 1]
    roles = [m["role"] for m in messages]
    if "system" in roles[1:]:
        raise Refused("system turn not at the beginning")
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken[0] != "user":
        raise Refused("begins with an answer")
    if any(a == b for a, b in zip(spoken, spoken[1:], strict=False)):
        raise Refused("two turns of one role in a row")
    if any(not m["content"].strip() for m in messages if m["role"] != "system"):
        raise Refused("empty turn")
    return Conversation(messages, language("".join(m["content"] for m in messages)), source_of(record, default_source))


def source_of(record: dict, default: str) -> str:
    """Where a record says it comes from; `default` when it does not say."""
    source = record.get("source")
    return source if isinstance(source, str) and source else default


def turns_of(record: dict) -> list:
    for key in ("conversations", "messages"):
        turns = record.get(key)
        if isinstance(turns, list) and turns:
            return turns
        if turns is not None:
            raise Refused("no turns")
    raise Refused("neither `conversations` nor `messages`")


def message(turn: object) -> dict:
    if not isinstance(turn, dict):
        raise Refused("a turn is not an object")
    role = turn.get("from") or turn.get("role")
    content = turn.get("value") if "value" in turn else turn.get("content")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Refused(f"unknown role {role!r}"[:60])
    return {"role": ROLES[role.lower()], "content": text_of(content)}


def text_of(content: object) -> str:
    """A string, or a list of text parts joined. Lone surrogates, which no UTF-8 text has, refuse the record."""
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type", "text") == "text" for p in content):
            raise Refused("content that is not text")
        parts = [p.get("text") if p.get("text") is not None else p.get("value") for p in content]
        content = "".join(p for p in parts if isinstance(p, str))
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Refused("content that is not text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("text that is not valid Unicode") from None
    return content


def language(text: str) -> str:
    """zh, en or other, by the script of the letters. `langdetect` fields are not believed: "ko" stands on Chinese rows.

    A Chinese character says about as much as three Latin letters, so it counts three times: code and names inside
    Chinese text do not make it English.
    """
    sample = text[:2000]
    han = sum("一" <= c <= "鿿" or "㐀" <= c <= "䶿" for c in sample)
    latin = sum(c.isascii() and c.isalpha() for c in sample)
    others = sum(c.isalpha() for c in sample) - han - latin
    kana_hangul = sum("぀" <= c <= "ヿ" or "가" <= c <= "힯" for c in sample)
    if 3 * han >= max(latin, 1) and kana_hangul * 4 < han:
        return "zh"
    return "en" if latin > others else "other"


def any_text(value: object) -> str:
    """The strings inside a record that is no conversation, roles and keys left out: enough to tell its language."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return " ".join(any_text(v) for k, v in value.items() if k not in ("from", "role", "id", "source", "type"))
    return " ".join(any_text(v) for v in value) if isinstance(value, list) else ""


def answer_bytes(messages: list[dict]) -> int:
    """UTF-8 bytes of the answers as they are tokenized, that is after NFC: the denominator of bits per byte."""
    return sum(len(unicodedata.normalize("NFC", m["content"]).encode()) for m in messages if m["role"] == "assistant")


def without_leading_exchange(messages: list[dict]) -> list[dict] | None:
    """The same without its oldest question and answer, the system line kept; None when only one exchange is left."""
    head = 1 if messages[0]["role"] == "system" else 0
    return messages[:head] + messages[head + 2 :] if len(messages) > head + 2 else None
