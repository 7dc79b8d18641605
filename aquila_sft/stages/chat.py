"""Talk to a model: in the terminal, with one prompt, or with a file of them.

    prompt=…            the answer on stdout
    prompts=<file>      for each prompt one JSON object a line on stdout
    neither             you> … model> … until /quit or the end of the input

Answers go to stdout, everything that is said about them to stderr. Configuration and prompts are checked
before torch is imported.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aquila_sft import prerequisites, runtime
from aquila_sft.chat_template import Message, render_runs
from aquila_sft.config import ChatRun, Generate, Model
from aquila_sft.errors import Stopped, UserError

HELP = """\
/system         show the system line
/system <text>  set it, and begin a new conversation
/reset          begin a new conversation
/quit           leave; so does the end of the input (Ctrl-D)
Ctrl-C          stop the answer
A message that begins with / is written with a blank in front."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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


# Which model


def is_local(path: str | None) -> bool:
    """False for what can only be a Hub id: name/name, where no folder of either name exists here."""
    return not path or not HUB_ID.fullmatch(path) or Path(path).exists() or Path(path).parent.exists()


def find_model(model: Model, scale: str) -> Path:
    """The folder of model.path, downloaded if it is a Hub id. Raises UserError if there is no model in it."""
    if model.path is None:
        raise UserError("model.path is not set; add model.path=<folder or Hub id>")
    if not is_local(model.path):
        from aquila_sft import hub

        return hub.model_folder(model.path, model.revision, model.subfolder)
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model.path={model.path}: no such folder; train a model (recipe=sft scale={scale}), "
            "or add model.path=<folder or Hub id>"
        )
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.path={model.path} holds a LoRA adapter without its base; use the merged "
            "model in the folder `final` of the same run"
        )
    found = folder / "final"
    hint = f"use model.path={found}" if (found / "config.json").is_file() else "give a saved model's folder"
    raise UserError(f"model.path={model.path} holds no model (no config.json); {hint}")


# What is asked


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


# Answers without a session


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
        kept = fit(generator, messages, settings)
    except UserError as error:
        raise UserError(f"{asked.where}: {error}") from None
    if len(kept) < len(messages):
        num_dropped = len(messages) - len(kept)
        notice(f"{asked.where}: the oldest {num_dropped} messages do not fit the context and are left out")
    return kept


def fit(generator, messages: list[Message], settings: Generate) -> list[Message]:
    """fit_history with room for the whole answer, but no more than a quarter of the context."""
    from aquila_sft.generate import fit_history

    reserve = min(settings.max_new_tokens, generator.context_tokens // 4)
    return fit_history(generator.tokenizer, messages, generator.context_tokens, reserve)


# A session


class Session:
    """A conversation at the terminal: its system line, its turns so far, and the commands."""

    def __init__(self, generator, settings: Generate, system: str | None) -> None:
        self.generator, self.settings, self.system = generator, settings, system
        self.history: list[Message] = []
        self.has_forgotten = False

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False when the person wants to leave."""
        if not line.strip():
            return True
        if line[0] == "/" and "\n" not in line.strip():
            return self.obey(*line.strip().partition(" ")[::2])
        try:
            self.reply(line.strip())
        except UserError as error:
            notice(f"error: {error}")
        return True

    def obey(self, command: str, text: str) -> bool:
        if command == "/quit":
            return False
        if command == "/help":
            notice(HELP)
        elif command == "/reset":
            self.begin()
            notice("(new conversation)")
        elif command == "/system" and text.strip():
            self.begin()
            self.system = text.strip()
            notice("(system line set, new conversation)")
        elif command == "/system":
            notice("(no system line)" if self.system is None else self.system)
        else:
            notice(f"{command} is not a command; /help lists them")
        return True

    def begin(self) -> None:
        self.history, self.has_forgotten = [], False

    def reply(self, text: str) -> None:
        """Stream the answer to `text`, and remember both; after a Ctrl-C, what there was of it."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        asked = {"role": "user", "content": text}
        kept = fit(self.generator, [*system, *self.history, asked], self.settings)[len(system) :]
        if len(kept) <= len(self.history) and not self.has_forgotten:
            self.has_forgotten = True
            notice("(the conversation has outgrown the context: its oldest turns are being forgotten)")
        answer = self.generator.stream([*system, *kept], self.settings)
        try:
            show("model> ")
            for piece in answer:
                show(piece)
        except KeyboardInterrupt:
            pass
        show("\n")
        explain_end(answer, self.generator, self.settings)
        self.history = [*kept, {"role": "assistant", "content": answer.text}] if answer.text else kept[:-1]


def talk(session: Session) -> None:
    """Read and answer until /quit, the end of the input, or a second Ctrl-C in a row at the prompt."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        edit_lines()
    was_interrupted = False
    while True:
        try:
            line = clean(input("you> "))
            was_interrupted = False
            if not session.take(line):
                return
        except EOFError:
            show("\n")
            return
        except KeyboardInterrupt:
            show("\n")
            if was_interrupted:
                return
            was_interrupted = True
            notice("(Ctrl-C again, Ctrl-D or /quit leaves)")


def edit_lines() -> None:
    """Line editing, and a paste of several lines as one message, where Python has GNU readline."""
    with contextlib.suppress(ImportError):
        import readline

        if "libedit" in (readline.__doc__ or ""):
            return
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind("tab: self-insert")  # there is nothing to complete
        for setting in ("input-meta on", "output-meta on", "convert-meta off"):
            readline.parse_and_bind(f"set {setting}")  # Chinese is text, even with LC_ALL=C


# Text in and out


def use_utf8(*streams) -> None:
    """Whatever the locale: bytes that are no UTF-8 become U+FFFD, and nothing that is shown can fail."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def clean(text: str) -> str:
    """Bytes of the command line that are no UTF-8 arrive as lone surrogates; they become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def show(piece: str) -> None:
    """To stdout at once. A terminal gets no control characters: a small model may write any byte."""
    if sys.stdout.isatty():
        piece = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", piece)
    print(piece, end="", flush=True)


def notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(generator, folder: Path) -> str:
    model = generator.model
    precision = str(model.dtype).removeprefix("torch.")
    return f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {precision} on {model.device.type}"


def explain_end(answer, generator, settings: Generate) -> None:
    """Say why an answer ends where it does, unless the model ended it."""
    if answer.end == "max_new_tokens":
        notice(f"(cut off at generate.max_new_tokens={settings.max_new_tokens})")
    elif answer.end == "context":
        notice(f"(cut off: the context of {generator.context_tokens} tokens is full)")
    elif answer.end == "interrupted":
        notice("(stopped)")
    elif not answer.text:
        notice("(the model ended its turn without a word)")
