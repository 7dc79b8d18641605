"""A JSON array read as a stream: the same records and the same errors as from the whole of it, in bounded memory."""

import io
import json
import random
import tracemalloc

import pytest

from aquila_sft.data import json_stream, sources

RECORDS = [
    {"n": 12.5e-3, "text": '你好 😀 \\u4f60\\ud83d\\ude00 " \\ / \n'},
    {},
    [],
    [[1, -2, [3]], {"a": {"b": None}}],
    -1234567.75e2,
    "",
    True,
    None,
    float("inf"),
    "x" * 50,
]


@pytest.fixture(params=[1, 2, 3, 7, 40, 2**20])
def block(request, monkeypatch):
    monkeypatch.setattr(json_stream, "BLOCK", request.param)


def outcome(read, text: bytes):
    """The records, or where and why there are none."""
    try:
        return read(text)
    except json.JSONDecodeError as error:
        return error.msg, error.lineno, error.colno


def at_once(text: bytes):
    found = json.loads(text.decode("utf-8-sig"))
    return found if isinstance(found, list) else [found]


def streamed(text: bytes):
    return list(json_stream.values(io.BytesIO(text)))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_", [True, False])
def test_blocks_of_any_size_give_what_is_read_at_once(block, indent, ascii_):
    for content in (RECORDS, [], [1], [12.5e3], {"a": RECORDS}, -12.5e3, "text"):
        text = json.dumps(content, indent=indent, ensure_ascii=ascii_).encode()
        for whole in (text, b"\xef\xbb\xbf" + text, b" \r\n" + text + b"\n\t "):
            assert repr(streamed(whole)) == repr(at_once(whole))


def test_whatever_is_broken_is_told_as_when_it_is_read_at_once(block):
    draw, told = random.Random(3), set()
    text = json.dumps(RECORDS, indent=1, ensure_ascii=False)
    for _ in range(300):
        begin, size = draw.randrange(len(text)), draw.randrange(4)
        broken = text[:begin] + draw.choice(["", "", ",", "]", "}", '"', "\n", "e"]) + text[begin + size :]
        if draw.random() < 0.3:
            broken = broken[: draw.randrange(len(broken))]
        expected = outcome(at_once, broken.encode())
        if "Illegal trailing comma" in expected[0]:  # newer Pythons, of what older ones call "Expecting value"
            continue
        assert repr(outcome(streamed, broken.encode())) == repr(expected), broken
        told |= {expected[0]} if isinstance(expected, tuple) else set()
    assert len(told) >= 5


@pytest.mark.parametrize("begins", [b"[", b"\xef\xbb\xbf["])
def test_bytes_that_are_no_text_are_told_with_their_place_in_the_file(block, begins):
    record = json.dumps({"text": "你好 😀"}, ensure_ascii=False).encode()
    for end in (b"\xff", b"\xe4\xbd\xff", b"\xf0\x9f"):
        broken = begins + record + b",\n" + record[:12] + end
        with pytest.raises(UnicodeDecodeError) as expected:
            broken.decode()
        with pytest.raises(UnicodeDecodeError) as found:
            streamed(broken)
        assert (found.value.start, found.value.reason) == (expected.value.start, expected.value.reason)


def test_memory_does_not_grow_with_the_array(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "BLOCK", 2**14)
    peaks = []
    for count in (500, 4000):
        file = tmp_path / f"{count}.json"
        file.write_text(json.dumps([{"id": i, "text": f"{i} 你好 " * 20} for i in range(count)], indent=1), "utf-8")
        tracemalloc.start()
        assert sum(1 for _ in sources.read(file)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < file.stat().st_size / 4, peaks
