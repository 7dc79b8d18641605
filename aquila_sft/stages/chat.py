"""Talk to a model: in the terminal, with one prompt, or with a file of them.

    prompt=…            the answer on stdout
    prompts=<file>      for each prompt one JSON object a line on stdout
    neither             you> … model> … until /quit or the end of the input

Answers go to stdout, everything that is said about them to stderr. Configuration and prompts are checked
before torch is imported.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from aquila_sft import prerequisites, runtime
from aquila_sft.chat_template import Message
from aquila_sft.config.model import Generate
from aquila_sft.config.runs import ChatRun
from aquila_sft.errors import Stopped, UserError
from aquila_sft.prompts import Asked, read_asked
from aquila_sft.saved_model import find_model, is_local
from aquila_sft.terminal import Session, clean, explain_end, notice, show, talk, use_utf8


def run(cfg: ChatRun, compose_run: Callable) -> None:
    """Answer what `cfg` asks. Raises UserError, or Stopped at a Ctrl-C outside an interactive session."""
    if runtime.world_size() > 1:
        raise UserError(
            f"recipe=chat runs in one process, and {runtime.world_size()} were started; use python train.py recipe=chat"
        )
    asked = read_asked(cfg)
    with contextlib.redirect_stdout(sys.stderr):  # answers alone go to stdout
        prerequisites.fill(cfg, compose_run)
    runtime.settle(offline=is_local(cfg.model.path))
    try:
        folder = find_model(cfg.model, cfg.scale)
        use_utf8(sys.stdin, sys.stdout, sys.stderr)
        generator, system = load_generator(cfg, folder)
        if asked is None:
            notice(f"{describe(generator, folder)}; /help lists the commands")
            talk(Session(generator, cfg.generate, system))
        elif cfg.prompt is not None:
            answer_one(generator, asked[0], cfg.generate, system)
        else:
            notice(f"{describe(generator, folder)}; {len(asked)} prompts from {cfg.prompts}")
            answer_all(generator, asked, cfg.generate, system)
    except KeyboardInterrupt:
        raise Stopped("Ctrl-C") from None
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_generator(cfg: ChatRun, folder: Path):
    """(generator, system line or None), on all cores."""
    from aquila_sft.generate import Generator, default_system

    runtime.set_threads()
    generator = Generator.load(folder, seed=cfg.seed, converted_to=Path(cfg.output_dir) / "tokenizer")
    system = default_system(generator.tokenizer) if cfg.system is None else clean(cfg.system)
    return generator, system or None


def describe(generator, folder: Path) -> str:
    model = generator.model
    precision = str(model.dtype).removeprefix("torch.")
    return f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {precision} on {model.device.type}"


def answer_one(generator, asked: Asked, settings: Generate, system: str | None) -> None:
    """Stream the answer to stdout."""
    answer = generator.stream(fitted(generator, asked, settings, system), settings)
    for piece in answer:
        show(piece)
    show("\n")
    explain_end(answer, generator, settings)


def answer_all(generator, asked: list[Asked], settings: Generate, system: str | None) -> None:
    """One JSON object a line to stdout. Every conversation is fitted before the first is answered."""
    conversations = [fitted(generator, one, settings, system) for one in asked]
    for one, messages in zip(asked, conversations, strict=True):
        answer = generator.answer(messages, settings)
        record = {**one.given, "answer": answer.text, "stopped": answer.stopped, "tokens": answer.tokens}
        print(json.dumps(record, ensure_ascii=False), flush=True)


def fitted(generator, asked: Asked, settings: Generate, system: str | None) -> list[Message]:
    """The messages with a system line in front if they have none, cut to the context."""
    messages = asked.messages
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    try:
        kept = generator.fitted(messages, settings)
    except UserError as error:
        raise UserError(f"{asked.where}: {error}") from None
    if len(kept) < len(messages):
        num_dropped = len(messages) - len(kept)
        notice(f"{asked.where}: the oldest {num_dropped} messages do not fit the context and are left out")
    return kept
