r"""Vocabularies as fast tokenizers that need no remote code.

    qwen.tiktoken -> convert_tiktoken -> tokenizer.json, tokenizer_config.json, chat_template.jinja
    a folder      -> load_tokenizer   -> a fast tokenizer
    a tokenizer   -> save_tokenizer   -> the same three files, readable by transformers 4.57 and 5

Aquila-135M's vocabulary is published as a tiktoken rank file whose tokenizer class is remote code. Converted,
it gives the same ids as the published algorithm: NFC, then special strings, then the split regex, then
merging the adjacent pair of lowest rank, the leftmost first.

*Why the merges are exact.* tiktoken merges any adjacent pair whose concatenation has a rank; a merge list
names pairs. read_ranks demands that every entry t, merged in isolation by ranks below its own, ends as two
parts (a, b): the merge list is these pairs in rank order. Suppose tiktoken merges (l, r) into t inside some
text. No merge ever crossed the ends of that span, so its parts went through the very steps of the isolated
merge, and l, r are a, b. So the pair tiktoken takes is always in the list; the list offers no pair that
tiktoken does not see; both order by rank and then by position. Hence equal ids, by induction over the steps.

*Special strings.* As in the published tokenizer, `tokenizer(text)` encodes a special string inside text as
that special. NFC comes first there: '<|im_end|>' followed by U+0338 composes to '...|≯' and is no special.
That is why ours are AddedToken(normalized=True). For text of users, see chat_template.encode_messages.

*Residue.* The regex classes are equal for every code point (tiktoken 0.14 against tokenizers 0.23). The NFC
tables are not: tokenizers' are of Unicode 10 or so, and the published algorithm's are those of the
Python it runs on. Against Python 3.11 (Unicode 14) they disagree on
  - the combining class of 98 marks added since: U+07FD, U+0898-089F, U+08CA-08D3, U+09FE, U+0C3C,
    U+0D3B-0D3C, U+0EBA, U+1715, U+1ABF-1ACE, U+1DF6-1DFA, U+A82C, U+10D24-10D27, U+10EAB-10EAC,
    U+10F46-10F50, U+10F82-10F85, U+11070, U+1133B, U+1145E, U+11839-1183A, U+1193D-1193E, U+11943, U+119E0,
    U+11A34, U+11A47, U+11A99, U+11D42, U+11D44-11D45, U+11D97, U+16FF0-16FF1, U+1E130-1E136, U+1E2AE,
    U+1E2EC-1E2EF: ids may differ where one of them stands beside another combining mark;
  - the pair U+11935 U+11930, which composes to U+11938.
unicodedata.normalize("NFC", text) before encoding removes the difference: tokenizers' NFC does not change
text that is normal already.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from aquila_sft.chat_template import CHATML
from aquila_sft.errors import UserError

log = logging.getLogger(__name__)

# PAT_STR of the published tokenization_qwen.py, unchanged.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In id order behind the ranks: 151643, 151644, 151645, 151646..151850.
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
BOS, EOS, PAD = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"
MAX_LENGTH = 8192
RANKS_FILE = "qwen.tiktoken"
LOADER_ARGUMENTS = ("fix_mistral_regex", "is_local", "local_files_only", "trust_remote_code")
PUBLISHED_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def convert_tiktoken(ranks_file: Path, folder: Path, *, must_be_published: bool = False):
    """Write the tokenizer of a tiktoken rank file to `folder` and return it as load_tokenizer does.

    The specials stand behind the ranks, however many those are. The file's sha256 is kept in
    tokenizer_config.json ("vocabulary_sha256"; see is_published); a file that is not the published one is
    logged as a warning, or refused with must_be_published. `folder` appears whole or not at all, and may
    exist only if it is empty or already holds this very tokenizer. Takes about 5 s for 151,643 ranks.
    Raises UserError (a ValueError) naming file and line of a damage, or `folder` if it holds something else.
    """
    ranks_file, folder = Path(ranks_file), Path(folder)
    data = ranks_file.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    tokens, pairs = read_ranks(ranks_file, data)
    if sha256 != PUBLISHED_SHA256:
        notice = f"{ranks_file}: {len(tokens)} ranks, sha256 {sha256[:12]}…, is not the published vocabulary"
        if must_be_published:
            raise UserError(f"{notice} (151643 ranks, sha256 {PUBLISHED_SHA256[:12]}…); download it again.")
        log.warning("%s.", notice)

    letter = byte_letters()
    spelt = ["".join(letter[byte] for byte in token) for token in tokens]
    vocab = {text: rank for rank, text in enumerate(spelt)}
    backend = byte_level_backend(vocab, [(spelt[a], spelt[b]) for a, b in pairs], SPECIALS)
    for place, special in enumerate(SPECIALS):
        if backend.token_to_id(special) != len(tokens) + place:
            raise UserError(f"{ranks_file}: {special!r} is among the ranks, but belongs behind them.")
    tokenizer = from_backend(backend, bos=BOS, eos=EOS, pad=PAD, unk=PAD, max_length=MAX_LENGTH)
    tokenizer.init_kwargs["vocabulary_sha256"] = sha256

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp's 0700 would shut other users out of a shared cache
        save_tokenizer(tokenizer, unfinished)
        _take_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path, *, converted_to: Path | None = None):
    """The fast tokenizer of a local folder; nothing in the folder is executed.

    A folder with qwen.tiktoken but no tokenizer.json (the published checkpoints) is converted into
    `converted_to` and loaded from there; a conversion of the same file found there is reused.
    Raises UserError if there is neither, or if the files cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        ranks_file = folder / RANKS_FILE
        if not ranks_file.is_file():
            what = f"neither tokenizer.json nor {RANKS_FILE} there" if folder.is_dir() else "no such folder"
            raise UserError(
                f"{folder}: {what}; put one of the two there (in training: or name a folder with one, tokenizer.path=)."
            )
        if converted_to is None:
            raise UserError(
                f"{folder}: {RANKS_FILE} has to be converted first; pass converted_to=<folder>, or run "
                f"`python train.py recipe=tokenizer tokenizer=aquila tokenizer.ranks={ranks_file}`."
            )
        sha256 = hashlib.sha256(ranks_file.read_bytes()).hexdigest()
        if _config_of(Path(converted_to)).get("vocabulary_sha256") != sha256:
            return convert_tiktoken(ranks_file, converted_to)
        folder = Path(converted_to)
    try:
        # fix_mistral_regex: beside a config.json of model_type mistral written by transformers 4, as BAAI's,
        # the loader suspects Mistral's own, once wrong, regex. It is not ours; False silences the warning.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, fix_mistral_regex=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{folder}: cannot load the tokenizer ({reason}); write it again.") from error
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise UserError(f"{folder}: {kind} is not a fast tokenizer; use one saved with a tokenizer.json.")
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """save_pretrained in a form that transformers 4.57 reads as well as 5.

    tokenizer_class is PreTrainedTokenizerFast (5 writes TokenizersBackend, which 4.57 refuses), special
    tokens without a name of their own are listed as 4.57 knows them, and the template stands both in
    chat_template.jinja and in tokenizer_config.json, with equal text.
    """
    folder = Path(folder)
    tokenizer.save_pretrained(str(folder))
    config = _config_of(folder)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for key in ("auto_map", "backend", *LOADER_ARGUMENTS):
        config.pop(key, None)
    if isinstance(tokenizer.chat_template, str):
        config["chat_template"] = tokenizer.chat_template
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")


def tokenizer_sha256(tokenizer, *, with_template: bool = True) -> str:
    """What the ids depend on, hashed: the backend's JSON, the named special tokens and the chat template.

    Padding and truncation, which calls to a tokenizer leave behind in its backend, do not count.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("version", "padding", "truncation"):
        backend.pop(key, None)
    named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    template = tokenizer.chat_template if with_template else None
    identity = json.dumps([backend, named, template], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def is_published(tokenizer) -> bool:
    """Whether the tokenizer was converted from the published rank file, byte for byte."""
    return tokenizer.init_kwargs.get("vocabulary_sha256") == PUBLISHED_SHA256


def read_ranks(ranks_file: Path, data: bytes | None = None) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Entries of a tiktoken rank file in rank order, and the pairs of ranks that the longer ones merge.

    Raises UserError naming file and line if the file is damaged or its entries are not those of a BPE.
    """
    tokens: list[bytes] = []
    rank_of: dict[bytes, int] = {}
    lines = (Path(ranks_file).read_bytes() if data is None else data).splitlines()
    line_of_rank = [number for number, line in enumerate(lines, 1) if line]
    for number in line_of_rank:
        line = lines[number - 1]
        try:
            encoded, rank = line.split(b" ")
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{ranks_file}:{number}: {line[:60]!r} is not '<base64> <rank>'; "
                f"expected a tiktoken rank file such as {RANKS_FILE}, complete."
            ) from None
        if rank != len(tokens):
            raise UserError(f"{ranks_file}:{number}: rank {rank}, expected {len(tokens)}, one up a line.")
        if not token or token in rank_of:
            raise UserError(f"{ranks_file}:{number}: {token!r} is empty or stands above; expected a new one.")
        rank_of[token] = rank
        tokens.append(token)
    if missing := [byte for byte in range(256) if bytes([byte]) not in rank_of]:
        raise UserError(
            f"{ranks_file}: {len(missing)} of the 256 single bytes have no rank (first {missing[0]:#04x}) in "
            f"{len(tokens)} lines; expected a complete tiktoken rank file such as {RANKS_FILE}."
        )
    pairs = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _merged_below(token, rank, rank_of)
        if len(parts) != 2:
            raise UserError(
                f"{ranks_file}:{line_of_rank[rank]}: {token!r} is not the merge of two entries above it; "
                "expected the ranks of a byte-level BPE, in the order they were learnt."
            )
        pairs.append((rank_of[parts[0]], rank_of[parts[1]]))
    return tokens, pairs


def byte_level_backend(vocab: dict[str, int], merges: list[tuple[str, str]], specials: list[str]):
    """A tokenizers.Tokenizer of the published form: NFC, PATTERN, byte-level BPE, then the specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    # ignore_merges: a piece that is an entry is that entry, as in tiktoken, and needs no merging.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=True) for text in specials])
    return backend


def pre_tokenizer(*cuts):
    """The published one: PATTERN, then bytes. `cuts` divide the pieces further (for training, see bpe.py)."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    return pre_tokenizers.Sequence([split, *cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def from_backend(backend, *, bos: str, eos: str, pad: str, max_length: int, unk: str | None = None):
    """A backend as a transformers tokenizer with the ChatML template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _merged_below(token: bytes, limit: int, rank_of: dict[bytes, int]) -> list[bytes]:
    """The parts of `token` after merging by ranks below `limit`: lowest rank first, then leftmost."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        ranks = [rank_of.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        lowest = min(ranks)
        if lowest >= limit:
            break
        i = ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def byte_letters() -> list[str]:
    """How byte-level BPE spells each byte: printable Latin-1 as itself, the rest from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def _config_of(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _take_place(unfinished: Path, folder: Path) -> None:
    """Rename a finished folder into place, or agree that the same one stands there already."""
    for path in unfinished.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    try:
        os.rename(unfinished, folder)  # POSIX: replaces an empty folder, fails on any other
    except OSError:
        for path in unfinished.iterdir():
            other = folder / path.name
            if not other.is_file() or other.read_bytes() != path.read_bytes():
                raise UserError(f"{folder}: holds something else; remove it or name another.") from None
