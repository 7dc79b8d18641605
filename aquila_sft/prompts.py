"""What recipe=chat is asked without a terminal: prompt=…, or prompts=<file> with a prompt or a conversation a line.

settings -> read_asked -> [Asked], each a conversation that ends with a user's message
"""

import json
from dataclasses import dataclass
from pathlib import Path

from aquila_sft.chat_template import Message, render_runs
from aquila_sft.config.runs import ChatRun
from aquila_sft.errors import UserError
from aquila_sft.terminal import clean


@dataclass
class Asked:
    """One conversation to be answered, as it was given and as messages; `where` is its file and line."""

    where: str
    given: dict
    messages: list[Message]


def read_asked(cfg: ChatRun) -> list[Asked] | None:
    """The conversations of prompt= or prompts=; None without both. Raises UserError naming file and line."""
    if cfg.prompt is not None:
        return [asked_from("prompt=", {"prompt": clean(cfg.prompt)})]
    if cfg.prompts is None:
        return None
    path = Path(cfg.prompts).expanduser()
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(
            f"prompts={cfg.prompts}: {error.strerror}; give a text file with a prompt a line, or a .jsonl"
        ) from None
    asked = []
    for line_no, line in enumerate(lines, 1):
        if line.strip():
            where = f"{cfg.prompts}:{line_no}"
            asked.append(asked_from(where, parse_line(where, line, is_json=path.suffix == ".jsonl")))
    if not asked:
        raise UserError(f"prompts={cfg.prompts} holds no prompt: it is empty")
    return asked


def parse_line(where: str, line: bytes, *, is_json: bool) -> dict:
    """{"prompt": …} or {"messages": …}, values not yet checked."""
    try:
        text = line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        byte = f"{line[error.start]:#04x} at {error.start}"
        raise UserError(f"{where}: not UTF-8 (byte {byte}); save the file as UTF-8") from None
    if not is_json:
        return {"prompt": text}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    keys = {"prompt", "messages"} & set(record) if isinstance(record, dict) else set()
    if len(keys) != 1:
        raise UserError(f'{where}: expected an object with either "prompt" or "messages"')
    return {key: record[key] for key in keys}


def asked_from(where: str, given: dict) -> Asked:
    """Raises UserError for what is no conversation that ends with a user's message."""
    if "prompt" in given:
        messages = [{"role": "user", "content": given["prompt"]}]
    else:
        messages = given["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f'{where}: "messages" is no list of objects with "role" and "content"')
    try:
        text = "".join(render_runs(messages, default_system=None))
        text.encode("utf-8")
    except UnicodeEncodeError:  # a ValueError too, so it comes first
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if messages[-1]["role"] != "user":
        last = messages[-1]["role"]
        raise UserError(f"{where}: the last message is from {last!r}; only a user's is answered")
    if not messages[-1]["content"].strip():
        raise UserError(f"{where}: the message to be answered is empty")
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Asked(where, given, messages)
