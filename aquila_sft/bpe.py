r"""A byte-level BPE learnt from text, in the form of the published vocabulary.

    text (data/balance.py says which) -> estimate, check -> learn -> a tokenizers.Tokenizer

*Long pieces.* PATTERN takes a run of letters as one word, and Chinese has no blanks: a word ends at the next mark. The
trainer's time grows with the square of a word's length: 4 MB of Chinese whose marks were taken out were not learnt in
300 s, and in 7 s with runs cut after every 8 characters (bpe.max_han_run). Memory stays the same; text that has its
marks gains nothing and loses nothing (20 MB: zh 4.23 bytes a token, 4.24 without cuts). Anything else, such as DNA or
rows of blanks, is cut at LONGEST characters. bpe.max_token_bytes bounds the entries. All of this is for learning only:
the tokenizer that comes out has the published pre-tokenizer.

*Whole pieces.* With ignore_merges a piece that is an entry is that entry, without merging. Merging gives the same: the
argument in tokenizer.py holds for every list of merges that was learnt by merging all occurrences of a pair before the
next one is chosen, as BpeTrainer does. So the ids are those of programs that only merge, llama.cpp among them.

*llama.cpp* knows PATTERN under the name "qwen2" (LLAMA_VOCAB_PRE_TYPE_QWEN2 in src/llama-vocab.cpp). Its converter
recognises vocabularies by a hash of ids (get_vocab_base_pre) and stops at one it has never seen: there, return "qwen2"
for the hash that it prints. It does not apply NFC: give it text that is normalised.
"""

import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aquila_sft.config.data import Bpe
from aquila_sft.data.balance import KEPT_BYTES, Drawn, Shelf
from aquila_sft.errors import UserError
from aquila_sft.tokenizer import SPECIALS, byte_level_backend, pre_tokenizer

PAD = "<|pad|>"  # not <|endoftext|>, which is a token of texts: llama.cpp ends a generation there
ADDED = [*SPECIALS, PAD]  # behind what is learnt, as in the published vocabulary
LONGEST = 256  # characters of a piece without Han, while learning
LARGEST_COUNT = 2**31 - 1  # tokenizers counts pairs in 32 bits, and no pair stands more often than there are bytes


# How much memory


@dataclass(frozen=True)
class Pieces:
    """The distinct pieces of a text: how many, and their bytes. Both grow as a power of the text's bytes."""

    text_bytes: int
    number: float
    num_bytes: float
    number_power: float = 1.0
    bytes_power: float = 1.0

    def of(self, text_bytes: float) -> "Pieces":
        """What a text of another length, of the same kind, would have."""
        ratio = text_bytes / self.text_bytes
        number, num_bytes = self.number * ratio**self.number_power, self.num_bytes * ratio**self.bytes_power
        return Pieces(int(text_bytes), number, num_bytes, self.number_power, self.bytes_power)

    def memory(self) -> float:
        """Bytes that learning from them takes.

        From the peak of BpeTrainer (tokenizers 0.23.3, two threads, 49,152 entries, Han runs of 8) on books,
        documentation and encyclopedias: 5 to 58 MB, half Chinese and half English, and 25 MB of either alone. With the
        pieces counted it is 12 to 22 % above what was measured there. With the pieces estimated, the whole process took
        0.58, 1.31 and 2.11 GB for 10, 30 and 54 MB of text, against 0.62, 1.32 and 2.07. A vocabulary of 2,560 takes a
        fifth less. More threads were not measured.
        """
        return 30e6 + 220 * self.number + 120 * self.num_bytes


def estimate(shelves: dict[str, Shelf], drawn: dict[str, Drawn], max_han_run: int) -> Pieces:
    """The distinct pieces of all drawn text, from those of a sample and of half of it."""
    total = sum(d.used_bytes for d in drawn.values())
    share = min(1.0, KEPT_BYTES / total)

    def sample(share: float) -> Pieces:
        texts = [
            text
            for language, d in drawn.items()
            for text in shelves[language].texts(d.held_below, d.used_below, d.used_bytes * share)
        ]
        return Pieces(sum(len(text.encode()) for text in texts), *count_pieces(texts, max_han_run))

    def power(more: float, less: float) -> float:
        return min(1.0, math.log(more / less) / math.log(whole.text_bytes / half.text_bytes))

    whole, half = sample(share), sample(share / 2)
    if half.text_bytes < whole.text_bytes:
        powers = power(whole.number, half.number), power(whole.num_bytes, half.num_bytes)
        whole = Pieces(whole.text_bytes, whole.number, whole.num_bytes, *powers)
    return whole.of(total)


def count_pieces(texts: list[str], max_han_run: int) -> tuple[int, int]:
    """Distinct pieces and their bytes; a trainer that keeps whole pieces counts them."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    counter = Tokenizer(models.WordLevel())
    counter.normalizer, counter.pre_tokenizer = normalizers.NFC(), learning_pre_tokenizer(max_han_run)
    trainer = trainers.WordLevelTrainer(vocab_size=LARGEST_COUNT, min_frequency=0, show_progress=False)
    counter.train_from_iterator(texts, trainer)
    pieces = counter.get_vocab(with_added_tokens=False)
    return len(pieces), sum(map(len, pieces))


def check(pieces: Pieces, memory_gb: float | None) -> int:
    """What the process will need at its peak, in bytes. Raises UserError if that is more than it may have."""
    if pieces.text_bytes > LARGEST_COUNT:
        raise UserError(
            f"{pieces.text_bytes / 1e9:.1f} GB of text: the trainer counts in 32 bits; bpe.max_bytes=2000000000 is safe"
        )
    here, free = resident_bytes(), free_bytes()
    needed = here + pieces.memory()
    allowed, whose = (memory_gb * 1e9, f"bpe.memory_gb={memory_gb:g} allows") if memory_gb else (math.inf, "")
    if free is not None and here + free < allowed:
        allowed, whose = here + free, f"the {(here + free) / 1e9:.1f} GB that this machine has free"
    if needed > allowed:
        fitting = pieces.text_bytes
        while fitting > 10_000 and here + pieces.of(fitting).memory() > allowed:
            fitting = fitting * 0.97
        unit = 10 ** int(math.log10(fitting) - 1)
        way_out = f"bpe.max_bytes={int(fitting // unit * unit)} would fit"
        raise UserError(
            f"learning from {pieces.text_bytes / 1e6:.1f} MB of text needs about {needed / 1e9:.2f} GB of memory, more "
            f"than {whose}; {way_out if fitting > 10_000 else 'no smaller text would fit either'}"
        )
    return int(needed)


def resident_bytes() -> int:
    """What this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_bytes() -> int | None:
    """Memory that can still be had, a container's limit included; None where the system does not say."""

    def number(path: str, key: str = "") -> int | None:
        try:
            words = Path(path).read_text().split()
            return int(words[words.index(key) + 1] if key else words[0])
        except (OSError, ValueError):
            return None

    kilobytes = number("/proc/meminfo", "MemAvailable:")
    free = [] if kilobytes is None else [kilobytes * 1024]
    for folder, most, now, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = number(f"{folder}/{most}"), number(f"{folder}/{now}")
        if limit is not None and used is not None:
            free.append(max(0, limit - used + (number(f"{folder}/memory.stat", cache) or 0)))
    return min(free, default=None)


# Learning


def learn(texts: Iterator[list[str]], bpe: Bpe):
    """The tokenizers.Tokenizer learnt from batches of texts; with fewer entries than asked for if that is all there is.

    The same for any number of threads and any order of the texts: BpeTrainer decides between pairs that stand equally
    often by their ids.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learning = Tokenizer(models.BPE())
    learning.normalizer, learning.pre_tokenizer = normalizers.NFC(), learning_pre_tokenizer(bpe.max_han_run)
    trainer = trainers.BpeTrainer(
        vocab_size=bpe.vocab_size - len(ADDED),
        min_frequency=bpe.min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=bpe.max_token_bytes + 1,  # in letters of the byte alphabet, and entries stay below it
        show_progress=sys.stderr.isatty(),
    )
    learning.train_from_iterator(texts, trainer)
    model = json.loads(learning.to_str())["model"]
    return byte_level_backend(model["vocab"], [tuple(pair) for pair in model["merges"]], ADDED)


def learning_pre_tokenizer(max_han_run: int):
    """The published one, with long pieces cut: runs of Han behind every `max_han_run` characters, others at LONGEST."""
    from tokenizers import Regex, pre_tokenizers

    full = rf"\p{{Han}}{{{max_han_run}}}(?=\p{{Han}})|\P{{Han}}{{{LONGEST}}}(?=\P{{Han}})"
    # With the previous: a mark that PATTERN puts before a word stays with it.
    return pre_tokenizer(pre_tokenizers.Split(Regex(full), "merged_with_previous"))


def check_vocab_size(vocab_size: int) -> None:
    least = 256 + len(ADDED) + 1
    if vocab_size < least:
        raise UserError(
            f"bpe.vocab_size={vocab_size} is too small: 256 bytes and {len(ADDED)} special tokens are entries already; "
            f"use {least} or more"
        )


def bytes_per_token(backend, texts: list[str]) -> float:
    """UTF-8 bytes after NFC for each token."""
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    num_bytes = sum(len(unicodedata.normalize("NFC", text).encode()) for text in texts)
    return num_bytes / sum(len(encoding.ids) for encoding in encodings)
