"""Tokenized documents in files that prove they are whole, read at random places at the speed of memory.

    documents of one shard (text_set.plan says which) -> ShardWriter -> train/wiki.zh/00000.shard
    folder -> Prepared -> Part, all shards of one source and language as one stream -> tokens, document beginnings

    magic, version, size and crc32 of the header | header, JSON | tokens, document ends | crc32s | sha256
                                                                  ^ 64-byte aligned; a crc32 for every 64 KiB

Little endian. Tokens are uint16, or uint32 for a vocabulary above 65,536; document ends are uint64 and count tokens.
Opening a shard checks its structure, reading it checks the blocks that are touched, each once; verify() checks it all.
"""

import bisect
import collections
import hashlib
import itertools
import json
import os
import struct
import weakref
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aquila_sft import checkpoint
from aquila_sft.errors import UserError

MAGIC, VERSION = b"AQSHARD\0", 1
PREFIX = struct.Struct("<8sIII")  # magic, version, bytes of the header, crc32 of the header
ALIGNED = 64
BLOCK = 2**16
FOOTER = hashlib.sha256().digest_size
AGAIN = "copy it again, or make it again with recipe=prepare"
MOST_MAPPED = 256  # shards of a process that are mapped at once: each holds a file descriptor


class DamagedBlock(UserError):
    """Bytes that are not those that were written, in the tokens or document ends of a shard; the message says where."""


class ShardWriter:
    """Writes one shard under a temporary name; leaving the context without an error makes it visible, durably."""

    def __init__(self, path: Path, *, vocab_size: int, tokenizer_sha256: str, source: str, language: str) -> None:
        self.path, self.aside = path, path.with_name(f".writing-{path.name}")
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.header = {
            "dtype": self.dtype.name,
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer_sha256,
            "source": source,
            "language": language,
            "block_bytes": BLOCK,
        }
        self.tokens, self.text_bytes = 0, 0
        self.ends, self.checks = array("Q"), array("I")
        self.buffer = bytearray()
        largest = {"tokens": 2**63, "documents": 2**63, "text_bytes": 2**63, "checks_crc32": 2**32}
        self.body_at = aligned(PREFIX.size + len(json_bytes(self.header | largest)), ALIGNED)

    @property
    def documents(self) -> int:
        return len(self.ends)

    def __enter__(self) -> "ShardWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.aside, "wb+")
        self.file.seek(self.body_at)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.file.close()
            self.aside.unlink(missing_ok=True)

    def add(self, ids: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """One document. text_bytes: the UTF-8 bytes of its text, for bits per byte."""
        ids = np.asarray(ids, dtype=np.int64)
        if not len(ids) or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"{self.path.name}: a document of no tokens, or of ids outside 0 … {self.vocab_size - 1}")
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self.ends.append(self.tokens)
        self.buffer += ids.astype(self.dtype).tobytes()
        if len(self.buffer) >= 16 * BLOCK:
            self.put_blocks()

    def put_blocks(self, *, all_of_it: bool = False) -> None:
        """Write what is buffered, as whole blocks but for the last of the file."""
        size = len(self.buffer) if all_of_it else len(self.buffer) // BLOCK * BLOCK
        with memoryview(self.buffer) as view:
            for start in range(0, size, BLOCK):
                self.checks.append(zlib.crc32(view[start : min(start + BLOCK, size)]))
            self.file.write(view[:size])
        del self.buffer[:size]

    def finish(self) -> None:
        self.buffer += bytes(-self.tokens * self.dtype.itemsize % 8)
        self.buffer += np.array(self.ends, dtype="<u8").tobytes()
        self.put_blocks(all_of_it=True)
        checks = np.array(self.checks, dtype="<u4").tobytes()
        self.file.write(checks)
        counts = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        header = json_bytes(self.header | counts | {"checks_crc32": zlib.crc32(checks)})
        header = header.ljust(self.body_at - PREFIX.size)
        self.file.seek(0)
        self.file.write(PREFIX.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header)
        self.file.seek(0)
        footer = hashlib.file_digest(self.file, "sha256").digest()
        self.file.seek(0, os.SEEK_END)
        self.file.write(footer)
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.aside, self.path)
        checkpoint.sync(self.path.parent)


class Shard:
    """One file, mapped at the first read."""

    mapped: collections.deque = collections.deque()  # weak references, the oldest first

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.read_structure(file)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        self.bytes: np.ndarray | None = None
        self.is_checked = bytearray(self.num_blocks)

    def read_structure(self, file) -> None:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(PREFIX.size)
        if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
            raise UserError(f"{self.path} is not a shard (its first bytes are {prefix[:8]!r}); {AGAIN}")
        _, version, header_bytes, crc32 = PREFIX.unpack(prefix)
        if version != VERSION:
            raise UserError(f"{self.path} is a shard of version {version}, this program reads {VERSION}; {AGAIN}")
        header = file.read(min(header_bytes, size))
        if len(header) != header_bytes or zlib.crc32(header) != crc32:
            raise self.damaged(0, "the header")
        self.header: dict = json.loads(header)
        self.tokens: int = self.header["tokens"]
        self.documents: int = self.header["documents"]
        self.text_bytes: int = self.header["text_bytes"]
        self.dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
        self.body_at = PREFIX.size + header_bytes
        self.ends_at = self.body_at + aligned(self.tokens * self.dtype.itemsize, 8)
        self.checks_at = self.ends_at + 8 * self.documents
        self.num_blocks = -(-(self.checks_at - self.body_at) // BLOCK)
        whole = self.checks_at + 4 * self.num_blocks + FOOTER
        if size != whole:
            raise UserError(f"{self.path} has {size} bytes instead of {whole}: it was not copied whole; {AGAIN}")
        file.seek(self.checks_at)
        checks = file.read(4 * self.num_blocks)
        if zlib.crc32(checks) != self.header["checks_crc32"]:
            raise self.damaged(self.checks_at, "the checksums")
        self.checks = np.frombuffer(checks, dtype="<u4")

    def damaged(self, offset: int, what: str, kind: type[UserError] = UserError) -> UserError:
        return kind(f"{self.path} is damaged at byte {offset} ({what}); {AGAIN}")

    def map(self) -> np.ndarray:
        """The file's bytes. Only so many shards stay mapped; what was checked of the others stays checked."""
        content = self.bytes = np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)
        self.mapped.append(weakref.ref(self))
        while len(self.mapped) > MOST_MAPPED:
            if oldest := self.mapped.popleft()():
                oldest.bytes = None
        return content

    def checked(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of the file, within the body, after the blocks they lie in were checked."""
        content = self.bytes
        if content is None:
            content = self.map()
        first, last = (start - self.body_at) // BLOCK, (stop - self.body_at - 1) // BLOCK + 1
        block = self.is_checked.find(0, first, last)
        while block >= 0:
            offset = self.body_at + block * BLOCK
            if zlib.crc32(content[offset : min(offset + BLOCK, self.checks_at)]) != self.checks[block]:
                raise self.damaged(offset, f"block {block} of {self.num_blocks}", DamagedBlock)
            self.is_checked[block] = 1
            block = self.is_checked.find(0, block + 1, last)
        return content[start:stop]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), int64."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} … {stop} of {self.tokens} in {self.path}")
        size = self.dtype.itemsize
        return self.checked(self.body_at + start * size, self.body_at + stop * size).view(self.dtype).astype(np.int64)

    @property
    def ends(self) -> np.ndarray:
        """The token behind each document's last, uint64 [documents], ascending."""
        return self.checked(self.ends_at, self.checks_at).view("<u8")

    def begins(self, start: int, stop: int) -> np.ndarray:
        """Places in [start, stop), counted from `start`, at which a document begins; int64."""
        ends = self.ends
        low, high = np.searchsorted(ends, np.array([start, stop], dtype=np.uint64))
        places = ends[low:high].astype(np.int64) - start
        return places if start or not stop else np.concatenate([np.zeros(1, dtype=np.int64), places])


def verify(path: Path) -> None:
    """Read a whole shard against the hash at its end. Raises UserError, with the damaged block where there is one."""
    shard = Shard(path)
    with open(path, "rb") as file:
        content, left = hashlib.sha256(), os.fstat(file.fileno()).st_size - FOOTER
        while left:
            content.update(chunk := file.read(min(left, 2**20)))
            left -= len(chunk)
        if content.digest() == file.read():
            return
    shard.checked(shard.body_at, shard.checks_at)
    raise shard.damaged(shard.checks_at + 4 * shard.num_blocks, "the hash at its end")


class Part:
    """All shards of one source and language as one stream. Documents never span shards; a window may."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name, self.shards = name, [Shard(path) for path in paths]
        first = self.shards[0].header
        self.source, self.language = first["source"], first["language"]
        for shard in self.shards:
            for key in ("source", "language", "vocab_size", "tokenizer_sha256"):
                if shard.header[key] != first[key]:
                    raise UserError(
                        f"{shard.path} does not belong to {name}: its {key} is {shard.header[key]} and that of "
                        f"{self.shards[0].path.name} is {first[key]}; {AGAIN}"
                    )
        self.edges = [0, *itertools.accumulate(shard.tokens for shard in self.shards)]
        self.tokens = self.edges[-1]
        self.documents = sum(shard.documents for shard in self.shards)
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, begins) of [start, stop): int64, and bool, True where a document begins."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} … {stop} of {self.tokens} in {self.name}")
        tokens, begins = np.empty(stop - start, dtype=np.int64), np.zeros(stop - start, dtype=bool)
        number, done = bisect.bisect_right(self.edges, start) - 1, 0
        while done < stop - start:
            shard, inside = self.shards[number], start + done - self.edges[number]
            end = min(shard.tokens, inside + stop - start - done)
            tokens[done : done + end - inside] = shard.read(inside, end)
            begins[done + shard.begins(inside, end)] = True
            number, done = number + 1, done + end - inside
        return tokens, begins


class Prepared:
    """What recipe=prepare made: a folder of shards, the tokenizer they were made with, and a manifest.

    Opening checks the manifest, the tokenizer, and the sizes and headers of all shards; blocks are checked when read.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder).expanduser()
        if not (folder / checkpoint.MANIFEST).is_file() and (folder / "final" / checkpoint.MANIFEST).is_file():
            folder = folder / "final"
        path = folder / checkpoint.MANIFEST
        try:
            self.manifest: dict = json.loads(path.read_text("utf-8"))
            parts, held_back = self.manifest["parts"], self.manifest["held_back"]
            if self.manifest.pop("manifest_sha256") != checkpoint.digest(self.manifest):
                raise ValueError("other bytes than were written")
        except OSError:
            raise UserError(
                f"data.shards={folder}: no {checkpoint.MANIFEST} there; give the final/ of a run of recipe=prepare"
            ) from None
        except (ValueError, KeyError):
            raise UserError(f"{path} is damaged or not that of a run of recipe=prepare; {AGAIN}") from None
        self.folder, self.tokenizer_folder = folder, folder / "tokenizer"
        self.sha256 = checkpoint.sha256(path)
        for name, expected in self.manifest["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != expected["size"]:
                raise UserError(f"{file} is missing, or has not the {expected['size']} bytes of {path}; {AGAIN}")
            if file.parent == self.tokenizer_folder and checkpoint.sha256(file) != expected["sha256"]:
                raise UserError(f"{file} is damaged; {AGAIN}")
        self.parts = {name: self.open(name, about) for name, about in parts.items()}
        self.held_back = {name: self.open(name, about) for name, about in held_back.items()}

    def open(self, name: str, about: dict) -> Part:
        part = Part(name, [self.folder / file for file in about["files"]])
        expected = (about["tokens"], about["documents"], self.manifest["tokenizer_sha256"])
        if (part.tokens, part.documents, part.shards[0].header["tokenizer_sha256"]) != expected:
            raise UserError(f"{name}: the shards in {self.folder} are not those of its {checkpoint.MANIFEST}; {AGAIN}")
        return part


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def json_bytes(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()
