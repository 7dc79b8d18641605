"""A conversation at the terminal, and text in and out of it: you> … model> … until /quit or the end of the input.

Answers go to stdout, everything that is said about them to stderr.
"""

import contextlib
import io
import re
import sys

from aquila_sft.chat_template import Message
from aquila_sft.config.model import Generate
from aquila_sft.errors import UserError

HELP = """\
/system         show the system line
/system <text>  set it, and begin a new conversation
/reset          begin a new conversation
/quit           leave; so does the end of the input (Ctrl-D)
Ctrl-C          stop the answer
A message that begins with / is written with a blank in front."""


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
        kept = self.generator.fitted([*system, *self.history, asked], self.settings)[len(system) :]
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
