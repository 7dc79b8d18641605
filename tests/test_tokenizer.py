"""The converted vocabulary gives tiktoken's ids, folders are whole, and transformers 4.57 reads them too."""

import base64
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from tiny import SENTENCES, tiny_ranks, tiny_tokenizer, write_ranks

from aquila_sft import tokenizer as tokenizer_module
from aquila_sft.tokenizer import (
    PATTERN,
    SPECIALS,
    convert_tiktoken,
    is_published,
    load_tokenizer,
    read_ranks,
    save_tokenizer,
    tokenizer_sha256,
)

tiktoken = pytest.importorskip("tiktoken")

TEXTS = [
    "",
    "Hello, world! I'll say it's 12345 o'clock; DON'T SHOUT, they'Ve said 'ſ.",
    "中国的首都是北京，人口最多的城市是上海。Ｆｕｌｌ　ｗｉｄｔｈ１２３",
    "  leading\n\n\n  and \t trailing   \r\n\r\n \n",
    "def f(x):\n    return x  # ===== 🙂 👩‍👩‍👧‍👦 🇨🇳\n",
    "e\u0301 é \u1100\u1161\u11a8 각 Å \u212b ① ² ½ ٣ ३",
    "a<|endoftext|>b<|im_start|>user\n<|im_end|>\n<|extra_0|><|extra_204|><|extra_205|><|IM_END|>",
    # NFC comes before special strings: the last '>' composes with U+0338 and the special is gone.
    "<|im_end|>\u0338 <|im_end|>\u0327\u0338 <|im_end|>\u0301 <\u0338|im_end|>",
    "a" * 3000 + " " * 3000 + "ab" * 500 + "哈" * 500 + "\n" * 100,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[bytes]:
    return tiny_ranks(tiny_tokenizer(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def ranks_file(ranks, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "qwen.tiktoken"
    write_ranks(path, ranks)
    return path


@pytest.fixture(scope="module")
def converted(ranks_file, tmp_path_factory):
    return convert_tiktoken(ranks_file, tmp_path_factory.mktemp("converted") / "tokenizer")


def tiktoken_of(ranks: list[bytes]):
    return tiktoken.Encoding(
        "reference",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        special_tokens={text: len(ranks) + i for i, text in enumerate(SPECIALS)},
    )


def published_ids(reference, texts: list[str]) -> list[list[int]]:
    """NFC, then tiktoken with special strings as specials: tokenization_qwen.py's tokenize()."""
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    return reference.encode_batch(normal, allowed_special="all", num_threads=2)


def ids_of(tokenizer, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    pieces = [
        *("a", "A", "the", "中", "的", "北京", "1", "23", "'s", "'LL", "'", "’s", "ſ", "é", "e\u0301", "각"),
        *(" ", "  ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "\u2028", ".", "，", "==", "#", "_", "👍"),
        *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|extra_204|>", "<|", "|>", "im_end", "\u0338"),
        *("ا", "क\u093c", "\u200d"),
    ]
    words = [word for sentence in SENTENCES for word in sentence.split()]
    sources = [pieces, words, [chr(c) for c in range(0x20, 0x3000) if chr(c).isprintable()]]
    return [
        "".join(rng.choice(rng.choice(sources[: rng.randint(1, 3)])) for _ in range(rng.randint(1, 25)))
        * rng.choice([1, 1, 1, 2, 7])
        for _ in range(count)
    ]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_equal_tiktokens(text, ranks, converted):
    assert converted(text)["input_ids"] == published_ids(tiktoken_of(ranks), [text])[0]


def test_ids_of_random_texts_equal_tiktokens(ranks, converted):
    # NFC first: marks younger than tokenizers' tables are the documented residue, and this its remedy.
    texts = [unicodedata.normalize("NFC", text) for text in random_texts(5000, seed=0)]
    assert ids_of(converted, texts) == published_ids(tiktoken_of(ranks), texts)


def test_every_entry_encodes_to_itself(ranks, converted):
    """Whole entries, and pairs of neighbours in rank order, which merge across their border if they can."""
    texts = [token.decode() for token in ranks if is_text(token)]
    texts += [a + b for a, b in zip(texts, texts[1:], strict=False)]
    assert ids_of(converted, texts) == published_ids(tiktoken_of(ranks), texts)


def is_text(token: bytes) -> bool:
    try:
        return unicodedata.is_normalized("NFC", token.decode())
    except UnicodeDecodeError:
        return False


def test_a_young_mark_differs_until_the_text_is_normalised(ranks, converted):
    """The residue that the module documents; when tokenizers updates its tables, the first assert says so."""
    text = "a\u0898\u0334"  # U+0898 is of Unicode 14, class 230; U+0334, class 1, sorts before it
    reference = published_ids(tiktoken_of(ranks), [text])
    assert ids_of(converted, [text]) != reference
    assert ids_of(converted, [unicodedata.normalize("NFC", text)]) == reference


@pytest.mark.slow
@pytest.mark.parametrize("regex", [r"\p{L}", r"\p{N}", r"\s", r"[^\r\n\p{L}\p{N}]", r"[^\s\p{L}\p{N}]"])
def test_regex_classes_agree_on_every_code_point(regex):
    from tokenizers import Regex, pre_tokenizers

    single_bytes = {bytes([byte]): byte for byte in range(256)}
    keeps = tiktoken.Encoding("class", pat_str=regex, mergeable_ranks=single_bytes, special_tokens={})
    drops = pre_tokenizers.Split(Regex(regex), "removed")
    code_points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    differ = [
        hex(c) for c in code_points if bool(keeps.encode_ordinary(chr(c))) == bool(drops.pre_tokenize_str(chr(c)))
    ]
    assert differ == []


def test_special_ids_stand_behind_the_ranks_and_nothing_is_added(ranks, converted):
    n = len(ranks)
    assert len(converted) == n + 208
    chat_ids = converted.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|extra_0|>"])
    assert chat_ids == [n + 1, n + 2, n + 3]
    assert (converted.bos_token_id, converted.eos_token_id) == (n + 3 + 203, n + 3 + 204)
    assert converted.pad_token_id == converted.unk_token_id == n
    assert converted.model_max_length == 8192
    assert converted("x")["input_ids"] == [ranks.index(b"x")]


def test_decode_returns_the_normalised_text_and_can_drop_every_special(converted):
    text = "Grüße, 世界 e\u0301  \n 🙂 , ."
    ids = converted(text)["input_ids"]
    assert converted.decode(ids) == unicodedata.normalize("NFC", text)
    specials = list(range(len(converted) - 208, len(converted)))
    assert converted.decode([*specials, *ids], skip_special_tokens=True) == unicodedata.normalize("NFC", text)


def test_decode_of_any_ids_equals_tiktokens(ranks, converted):
    """Broken characters too: as many U+FFFD as Python's errors="replace" writes."""
    rng = random.Random(0)
    reference = tiktoken_of(ranks)
    for _ in range(2000):
        ids = [rng.randrange(256 if rng.random() < 0.5 else len(converted)) for _ in range(rng.randint(1, 8))]
        assert converted.decode(ids) == reference.decode(ids, errors="replace")


def test_folder_has_the_template_twice_and_no_remote_code(converted, ranks_file, tmp_path):
    folder = tmp_path / "new"
    convert_tiktoken(ranks_file, folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == (folder / "chat_template.jinja").read_bytes().decode() != ""
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in config
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_converting_again_is_fine_and_into_another_tokenizers_folder_is_not(ranks, ranks_file, tmp_path):
    folder = tmp_path / "tokenizer"
    convert_tiktoken(ranks_file, folder)
    before = (folder / "tokenizer.json").read_bytes()
    convert_tiktoken(ranks_file, folder)
    write_ranks(tmp_path / "shorter.tiktoken", ranks[:-1])
    with pytest.raises(ValueError, match="holds something else"):
        convert_tiktoken(tmp_path / "shorter.tiktoken", folder)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shorter.tiktoken", "tokenizer"]


def test_an_interrupted_conversion_leaves_nothing(ranks_file, tmp_path, monkeypatch):
    def stops_half_way(tokenizer, folder):
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer_module, "save_tokenizer", stops_half_way)
    with pytest.raises(KeyboardInterrupt):
        convert_tiktoken(ranks_file, tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []


def spoil_line(lines):
    lines[300] = b"!!! 300"


def cut_last_line(lines):
    lines[-1] = lines[-1].split(b" ")[0]


def skip_a_rank(lines):
    del lines[400]


def repeat_an_entry(lines):
    lines[500] = lines[499].split(b" ")[0] + b" 500"


def keep_200(lines):
    del lines[200:]


def add_an_entry_that_no_merge_makes(lines):
    lines.append(base64.b64encode(b"zqxj") + b" %d" % len(lines))


def become_html(lines):
    lines[:] = [b"<!DOCTYPE html>", b"<html>404</html>"]


def be_empty(lines):
    lines.clear()


@pytest.mark.parametrize(
    "damage, says",
    [
        (spoil_line, r":301: b'!!! 300' is not '<base64> <rank>'"),
        (cut_last_line, r"is not '<base64> <rank>'; expected a tiktoken rank file"),
        (skip_a_rank, r":401: rank 401, expected 400"),
        (repeat_an_entry, r":501: b'.*' is empty or stands above"),
        (keep_200, r"56 of the 256 single bytes have no rank \(first 0x.*\) in 200 lines"),
        (add_an_entry_that_no_merge_makes, r":\d+: b'zqxj' is not the merge of two entries above it"),
        (become_html, r":1: b'<!DOCTYPE html>' is not '<base64> <rank>'"),
        (be_empty, r"256 of the 256 single bytes have no rank"),
    ],
)
def test_a_damaged_rank_file_is_refused_with_its_line(damage, says, ranks_file, tmp_path):
    lines = ranks_file.read_bytes().splitlines()
    damage(lines)
    damaged = tmp_path / "damaged.tiktoken"
    damaged.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=says) as caught:
        convert_tiktoken(damaged, tmp_path / "tokenizer")
    assert str(damaged) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tokenizer").exists()


def test_another_vocabulary_is_said_not_to_be_the_published_one(converted, ranks_file, tmp_path, caplog):
    assert not is_published(converted)
    with pytest.raises(ValueError, match="is not the published vocabulary"):
        convert_tiktoken(ranks_file, tmp_path / "tokenizer", must_be_published=True)
    convert_tiktoken(ranks_file, tmp_path / "tokenizer")
    assert "is not the published vocabulary" in caplog.text


def test_a_published_folder_is_converted_once_and_then_reused(ranks, ranks_file, tmp_path):
    published, cache = tmp_path / "published", tmp_path / "cache" / "tokenizer"
    published.mkdir()
    (published / "qwen.tiktoken").write_bytes(ranks_file.read_bytes())
    (published / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    with pytest.raises(ValueError, match="converted_to"):
        load_tokenizer(published)
    first = load_tokenizer(published, converted_to=cache)
    written = (cache / "tokenizer.json").stat()
    again = load_tokenizer(published, converted_to=cache)
    assert (cache / "tokenizer.json").stat().st_mtime_ns == written.st_mtime_ns
    assert tokenizer_sha256(first) == tokenizer_sha256(again)
    write_ranks(published / "qwen.tiktoken", ranks[:-1])
    with pytest.raises(ValueError, match="holds something else"):
        load_tokenizer(published, converted_to=cache)


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer.json nor qwen.tiktoken there"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}', "[]", "null", "not json"])
def test_a_damaged_tokenizer_json_is_refused_in_one_line(text, ranks_file, tmp_path):
    convert_tiktoken(ranks_file, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="cannot load the tokenizer") as caught:
        load_tokenizer(tmp_path / "tokenizer")
    assert "\n" not in str(caught.value)


def test_a_mistral_config_beside_it_changes_nothing(ranks, ranks_file, tmp_path):
    """transformers replaces or suspects tokenizers by the model_type that stands beside them."""
    convert_tiktoken(ranks_file, tmp_path / "t")
    config = {"model_type": "mistral", "transformers_version": "4.46.0", "vocab_size": len(ranks) + 208}
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    assert ids_of(load_tokenizer(tmp_path / "t"), TEXTS) == published_ids(tiktoken_of(ranks), TEXTS)


def test_identity_survives_saving_and_ignores_padding_but_not_the_template(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "a")
    sha256 = tokenizer_sha256(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "b")
    loaded = load_tokenizer(tmp_path / "b")
    loaded(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_sha256(loaded) == sha256
    loaded.chat_template += " "
    assert tokenizer_sha256(loaded) != sha256


def test_saving_lists_unnamed_special_tokens_as_4_57_knows_them(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "a")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    save_tokenizer(tokenizer, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text("utf-8"))
    assert config["additional_special_tokens"] == ["<|tool|>"]
    assert "extra_special_tokens" not in config
    loaded = load_tokenizer(tmp_path / "b")
    assert "<|tool|>" in loaded.all_special_tokens
    assert len(loaded) == len(tokenizer)


IN_4_57 = """
import json, sys, transformers
from transformers import AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
given = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(given["folder"])
chat = tokenizer.apply_chat_template(given["chat"], return_dict=True, return_assistant_tokens_mask=True)
print(json.dumps({
    "ids": [tokenizer(text)["input_ids"] for text in given["texts"]],
    "chat_text": tokenizer.apply_chat_template(given["chat"], tokenize=False, add_generation_prompt=True),
    "chat_ids": chat["input_ids"],
    "chat_mask": chat["assistant_masks"],
    "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in given["texts"]],
    "named": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)],
}))
"""


def test_transformers_4_57_gives_the_same_ids_text_and_targets(converted, ranks_file, tmp_path):
    site = os.environ.get("AQUILA_TRANSFORMERS_4_57")
    if not site:
        pytest.skip("AQUILA_TRANSFORMERS_4_57 does not name a folder with transformers 4.57")
    convert_tiktoken(ranks_file, tmp_path / "tokenizer")
    chat = [
        {"role": "user", "content": "你好 🙂"},
        {"role": "assistant", "content": "\n\n Hello e\u0301."},
        {"role": "user", "content": " 1 + 1 = ?"},
        {"role": "assistant", "content": "2"},
    ]
    given = {"folder": str(tmp_path / "tokenizer"), "chat": chat, "texts": TEXTS}
    ran = subprocess.run(
        [sys.executable, "-c", IN_4_57],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": site, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    theirs = json.loads(ran.stdout)
    ours = converted.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["ids"] == ids_of(converted, TEXTS)
    prompt = converted.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert theirs["chat_text"] == prompt
    assert theirs["chat_ids"] == ours["input_ids"]
    assert theirs["chat_mask"] == ours["assistant_masks"]
    assert theirs["decoded"] == [converted.decode(ids) for ids in theirs["ids"]]
    named = [converted.bos_token_id, converted.eos_token_id, converted.pad_token_id, len(converted)]
    assert theirs["named"] == named


# The published vocabulary and real text.


@pytest.fixture(scope="module")
def real_data() -> Path:
    folder = os.environ.get("AQUILA_REAL_DATA")
    if not folder:
        pytest.skip("AQUILA_REAL_DATA does not name a data folder")
    return Path(folder)


@pytest.fixture(scope="module")
def published(real_data, tmp_path_factory):
    folder = real_data.parent / "aquila_tokenizer"
    return load_tokenizer(folder, converted_to=tmp_path_factory.mktemp("published") / "tokenizer")


@pytest.fixture(scope="module")
def published_reference(real_data):
    tokens, _ = read_ranks(real_data.parent / "aquila_tokenizer" / "qwen.tiktoken")
    return tiktoken_of(tokens)


@pytest.mark.real_data
def test_published_vectors_and_ids(published, real_data):
    vectors = json.loads((real_data.parent / "aquila_tokenizer/vectors.json").read_text("utf-8"))["vectors"]
    assert [published(v["text"])["input_ids"] for v in vectors] == [v["ids"] for v in vectors]
    assert len(published) == 151851
    chat_ids = published.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|extra_0|>"])
    assert chat_ids == [151644, 151645, 151646]
    assert (published.bos_token_id, published.eos_token_id) == (151849, 151850)
    assert (published.pad_token_id, published.unk_token_id) == (151643, 151643)
    assert is_published(published)


@pytest.mark.real_data
def test_published_ids_of_random_texts_equal_tiktokens(published, published_reference):
    texts = [*TEXTS, *(unicodedata.normalize("NFC", text) for text in random_texts(20_000, seed=1))]
    assert ids_of(published, texts) == published_ids(published_reference, texts)


@pytest.mark.real_data
@pytest.mark.parametrize("language", ["en", "zh"])
def test_published_ids_of_ten_megabytes_equal_tiktokens(language, published, published_reference, real_data):
    # The same share of every corpus of the language, so that none is left out.
    files = sorted(real_data.glob(f"raw_{language}_*/docs.jsonl"))
    texts = [text for file in files for text in head_of(file, 10_500_000 // len(files))]
    num_bytes = sum(len(text.encode()) for text in texts)
    for corpus in files:  # small corpora leave room
        if num_bytes >= 10_000_000:
            break
        more = head_of(corpus, 10_000_000)
        texts += more
        num_bytes += sum(len(text.encode()) for text in more)
    assert num_bytes >= 10_000_000
    for start in range(0, len(texts), 500):
        part = texts[start : start + 500]
        assert ids_of(published, part) == published_ids(published_reference, part)


def head_of(file: Path, num_bytes: int) -> list[str]:
    texts = []
    with file.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"][:num_bytes])
            num_bytes -= len(texts[-1].encode())
            if num_bytes <= 0:
                break
    return texts


def test_a_signal_while_a_tokenizer_is_loaded_is_no_fault_of_its_folder(tmp_path, monkeypatch):
    import transformers

    from aquila_sft import tokenizer as tokenizers
    from aquila_sft.errors import Stopped

    def interrupted(*_, **__):
        raise Stopped("SIGTERM")

    tiny_tokenizer(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(Stopped, match="SIGTERM"):
        tokenizers.load_tokenizer(tmp_path)
