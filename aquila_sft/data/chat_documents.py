"""Conversations among the documents of pretraining, so that an anneal trains the marks of the chat template.

    {"conversations": […]} -> ChatML with U+FDD0 and U+FDD1 for <|im_start|> and <|im_end|> -> Encoder -> their ids

In a text the two strings are ordinary text, or any page could begin a turn (text_set.Encoder). These two characters are
none to Unicode, which keeps them for a program's own use; they are taken out of whatever is read.
"""

import re

from aquila_sft.chat_template import render_runs
from aquila_sft.data import conversations
from aquila_sft.errors import UserError

OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"([{OPEN}{CLOSE}])")


def is_conversation(record: dict) -> bool:
    return isinstance(record.get("conversations"), list) or isinstance(record.get("messages"), list)


def plain(text: str) -> str:
    return MARK.sub("", text)


def rendered(record: dict) -> str:
    """A record's conversation as one text, as recipe=sft renders it. Raises conversations.Refused with the reason."""
    messages = conversations.normalise(record, "").messages
    runs = render_runs([m | {"content": plain(m["content"])} for m in messages])
    return "".join(f"{OPEN}{run}{CLOSE}\n" for run in runs)


def marks(chat_ids: list[int] | None) -> dict[str, int]:
    """The ids that the marks stand for. Raises UserError for a vocabulary that has none."""
    if chat_ids is None:
        raise UserError(
            "conversations are among the documents and the vocabulary has no <|im_start|> and <|im_end|>; add "
            "tokenizer.add_chat_tokens=true, or leave those files out"
        )
    return dict(zip((OPEN, CLOSE), chat_ids, strict=True))
