"""The records of a JSON array, one at a time, in memory that does not grow with the file.

    bytes -> a window of text that slides over them -> values; errors say line and column of the whole file

The window holds BLOCK bytes, or a record that is larger.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 2**20
LONGEST = 16  # characters of what the end of the window may cut: a number's rest, -Infinity, an escape
BLANKS = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def values(stream: BinaryIO) -> Iterator[object]:
    """The elements of an array, or the one value that is none.

    Raises json.JSONDecodeError where what follows is no JSON, UnicodeDecodeError where it is no UTF-8, and what
    json.loads raises of numbers and brackets beyond its limits.
    """
    window = Window(stream)
    if window.next() != "[":
        value = window.value()
        window.finish()
        yield value
        return
    window.at += 1
    if window.next() != "]":
        yield window.value()
        while (mark := window.next()) == ",":
            window.at += 1
            yield window.value()
        if mark != "]":
            raise window.error("Expecting ',' delimiter")
    window.at += 1
    window.finish()


class Window:
    """A part of a stream's text, and the place in it where reading goes on; what lies before is forgotten."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.decode = stream, codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at, self.ended = "", 0, False
        self.size = 0  # bytes read
        self.line = self.column = 1  # of the first character of text

    def more(self) -> bool:
        """As much text again as is not read yet, a block at least; False at the end."""
        if self.ended:
            return False
        block = self.stream.read(max(BLOCK, len(self.text) - self.at))
        self.ended, self.size = not block, self.size + len(block)
        read = self.text[: self.at]
        lines = read.count("\n")
        self.column = len(read) - read.rfind("\n") if lines else self.column + len(read)
        self.line += lines
        try:
            self.text, self.at = self.text[self.at :] + self.decode(block, final=self.ended), 0
        except UnicodeDecodeError as error:
            before = self.size - len(error.object)  # the bytes of a character that the last block began are in it
            error.start, error.end = before + error.start, before + error.end
            raise
        return True

    def next(self) -> str:
        """The next character that is no blank, which is where reading goes on; empty at the end."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> object:
        """The one that comes next."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or len(self.text) - error.pos < LONGEST
                if not (is_cut and self.more()):
                    raise self.error(error.msg, error.pos) from None
            else:
                if len(self.text) - end >= LONGEST or not self.more():  # 12 may be the beginning of 12.5e3
                    self.at = end
                    return value

    def finish(self) -> None:
        if self.next():
            raise self.error("Extra data")

    def error(self, message: str, at: int | None = None) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, self.text, self.at if at is None else at)
        if error.lineno == 1:
            error.colno += self.column - 1
        error.lineno += self.line - 1
        return error
