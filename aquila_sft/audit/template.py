"""The template as others will use it: the base's own, apply_chat_template of what is saved, recipe=chat; and the marks.

Compared is what comes out, text and ids, never the template's own words: {% generation %} and blanks may differ.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from aquila_sft.chat_template import IM_END, IM_START, encode_messages, render_runs, turn_end_id
from aquila_sft.doctor.findings import Finding, error, warning

PROBES = [
    [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}],
    [
        {"role": "system", "content": "短一点。"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
    ],
    [
        {"role": "user", "content": " 1 + 1 = ?\n"},
        {"role": "assistant", "content": "\n2"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes. "},
    ],
]


def look(tokenizer, system: str | None, base: Path | None) -> Iterator[Finding]:
    """system: the line that a conversation gets that has none. base: the folder of the model that is tuned."""
    end = turn_end_id(tokenizer)
    if tokenizer.pad_token_id == end:
        yield error(
            "pad-is-end",
            f"the padding token is the turn end, {tokenizer.pad_token} ({end}): whatever masks padding by its id masks "
            "every turn end too; give the tokenizer another pad_token, in its tokenizer_config.json",
        )
    own = own_template(base)
    if isinstance(own, list):
        yield warning(
            "template-of-base",
            f"the base ({base}) has chat templates by name, {', '.join(own) or 'none of them with a name'}, and none "
            "that is called default: this run's is compared with none of them",
        )
    elif own:
        yield from compared_with(own, tokenizer, base)
    yield from served(tokenizer, system)


def own_template(folder: Path | None) -> str | list[str] | None:
    """The chat template among a model's files, None where it has none; the names of several without a default."""
    if folder is None:
        return None
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    config = folder / "tokenizer_config.json"
    found = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        found = {t["name"]: t["template"] for t in found}
        return found.get("default", sorted(found))
    return found


def rendered(tokenizer, messages: list[dict], template: str | None = None, **how) -> str:
    """The text, or what the template says instead: some refuse roles or orders."""
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **how)
    except Exception as refused:  # it is a program of others: 1 / 0 is as good as raise_exception
        return f"(refused: {type(refused).__name__}: {refused})"


def compared_with(own: str, tokenizer, base: Path) -> Iterator[Finding]:
    for messages in PROBES:
        theirs, ours = rendered(tokenizer, messages, own), rendered(tokenizer, messages)
        if theirs != ours:
            yield error(
                "template-of-base",
                f"the template differs from the base's own ({base}), which writes {differ(theirs, ours)}, this run "
                f"writes {differ(ours, theirs)}; set tokenizer.system= to its system line, or "
                "audit.allow=[template-of-base] if it is to learn another",
            )
            return


def served(tokenizer, system: str | None) -> Iterator[Finding]:
    """What is trained, as apply_chat_template and recipe=chat will write it from the tokenizer that final/ gets."""
    for messages in PROBES:
        ids, _ = encode_messages(tokenizer, messages, default_system=system)
        trained = "".join(f"{IM_START}{run}{IM_END}\n" for run in render_runs(messages, default_system=system))
        text = rendered(tokenizer, messages)
        begin = tokenizer.bos_token_id
        if begin is not None and tokenizer(text)["input_ids"].count(begin) > 1:
            yield error(
                "doubled-begin",
                f"the template writes {tokenizer.bos_token} and the tokenizer adds another; let one of them do it",
            )
            return
        if text != trained:
            where = f"the template that is saved with the model writes {differ(text, trained)}"
            yield error("template-served", f"{where}, trained is {differ(trained, text)}; tokenizer.system={system!r}")
            return
        ways = {"the text of the template": (encoded(tokenizer, text), ids)}
        # An answer of line ends shares its first token with the header's newline, the last of the prompt.
        shared = messages[-1]["content"][0] in "\r\n"
        for way, prompt in prompts(tokenizer, messages[:-1]).items():
            common = len(prompt) - shared
            ways[way] = prompt[:common], ids[:common]
        for way, (written, wanted) in ways.items():
            if written != wanted:
                theirs, ours = tokenizer.decode(written), tokenizer.decode(wanted)
                where = f"{way} is {differ(theirs, ours)} to the model"
                yield error(
                    "template-served", f"{where}, trained is {differ(ours, theirs)}; tokenizer.system={system!r}"
                )
                return


def prompts(tokenizer, asked: list[dict]) -> dict[str, list[int]]:
    """The ids that the two ways of serving begin an answer with."""
    from aquila_sft.generate import default_system

    line = default_system(tokenizer) if asked[0]["role"] != "system" else None
    said = [{"role": "system", "content": line}, *asked] if line else asked
    return {
        "recipe=chat": encode_messages(tokenizer, said, default_system=None, add_generation_prompt=True)[0],
        "add_generation_prompt": encoded(tokenizer, rendered(tokenizer, asked, add_generation_prompt=True)),
    }


def encoded(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def differ(text: str, other: str) -> str:
    """The piece of `text` at which it parts from `other`."""
    at = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    piece = text[max(0, at - 20) : at + 40]
    return repr(piece) if piece else "nothing"
