r"""Messages -> ids and, for each id, whether it is a target.

    [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi."}]
    -> <|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n
       <|im_start|>assistant\nHi.<|im_end|>\n
                              ^^^^^^^^^^^^ targets: the answer and the end of its turn, not the newline behind

The text is byte for byte that of the template Aquila-135M publishes; only the marks around the answers
({% generation %}) are added. Targets are the tokens that hold any character of an answer or of its turn end.

*What is special.* encode_messages and encode_batch encode as special only the marks that they set
themselves. A special string inside a content is encoded as the ordinary text it is, so that no content can
end its turn or begin another. tokenizer.apply_chat_template does not protect: it renders one string, and
there (as with `tokenizer(text)`, and as in the published tokenizer) every special string becomes its special.
Use it on trusted contents only. Where no content holds a special string, ids and targets of both ways are
equal (but for tokenizers with trimmed offsets, such as GPT-2's family: transformers' mask, unlike ours, then
misses answers that begin with a blank).
"""

import json
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from aquila_sft.errors import UserError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant"
ROLES = ("system", "user", "assistant")

Message = dict[str, str]  # role, content


def chatml(default_system: str | None) -> str:
    """The ChatML template (Jinja) whose conversations without a system turn begin with this system line.

    None: they begin with their first turn. {% generation %} marks answer and turn end, so that
    apply_chat_template(..., return_assistant_tokens_mask=True) knows the targets.
    """
    default = ""
    if default_system is not None:
        quoted = default_system
        for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
            quoted = quoted.replace(plain, escaped)
        default = (
            "{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\\n" + quoted + "<|im_end|>\\n' }}"
            "{% endif %}"
        )
    return (
        "{% for message in messages %}" + default + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}"
        "{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}"
        "{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


CHATML = chatml(DEFAULT_SYSTEM)


def render_runs(messages: Sequence[Message], *, default_system: str | None = DEFAULT_SYSTEM) -> list[str]:
    r"""The text of each turn between its marks, as "user\n你好", the default system turn first.

    Raises UserError (a ValueError) for no messages, for a role other than system (first only), user and
    assistant, and for a content that is not text.
    """
    if not messages:
        raise UserError("a conversation has no messages; expected at least one {'role', 'content'}.")
    runs = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or (role == "system" and i > 0):
            raise UserError(f"message {i}: role {role!r}; expected system (only as message 0), user or assistant.")
        if not isinstance(content, str):
            raise UserError(f"message {i} ({role}): content is {type(content).__name__}, expected text.")
        if i == 0 and role != "system" and default_system is not None:
            runs.append(f"system\n{default_system}")
        runs.append(f"{role}\n{content}")
    return runs


def encode_messages(
    tokenizer,
    messages: Sequence[Message],
    *,
    default_system: str | None = DEFAULT_SYSTEM,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """encode_batch for one conversation."""
    encoded = encode_batch(
        tokenizer, [messages], default_system=default_system, add_generation_prompt=add_generation_prompt
    )
    return encoded[0]


def encode_batch(
    tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    default_system: str | None = DEFAULT_SYSTEM,
    add_generation_prompt: bool = False,
) -> list[tuple[list[int], list[bool]]]:
    """(ids, is_target) of each conversation, for any fast tokenizer with <|im_start|> and <|im_end|>.

    Special strings inside contents are encoded as text (see the module). Nothing is truncated or padded, and
    the tokenizer is not changed: the work is done by a copy of its backend, made at the first call (about 2 s
    for 150,000 entries) and kept while the tokenizer lives and its vocabulary does not grow. Uses all cores
    that the tokenizers library is allowed.
    Raises UserError naming the conversation and message at fault, or what the tokenizer lacks.
    """
    runs_of = []
    for i, messages in enumerate(conversations):
        try:
            runs = render_runs(messages, default_system=default_system)
        except UserError as error:
            raise UserError(f"conversation {i}, {error}") from None
        runs_of.append(runs)
    codec = _codec_of(tokenizer)
    encoded = []
    for start in range(0, len(runs_of), CONVERSATIONS_PER_CALL):
        part = runs_of[start : start + CONVERSATIONS_PER_CALL]
        ids_of = codec.encode_runs(part, first=start)
        encoded += [codec.join(runs, ids_of, add_generation_prompt) for runs in part]
    return encoded


# Bounds the memory that the Encoding objects of one call take (about 100 bytes a token).
CONVERSATIONS_PER_CALL = 2000


def turn_end_id(tokenizer) -> int:
    """The id of <|im_end|>. Raises UserError if the tokenizer has no such special token."""
    return _chat_ids(tokenizer)[1]


def stop_ids(tokenizer) -> list[int]:
    """The ids at which an answer ends: <|im_end|>, and eos if there is one."""
    end = turn_end_id(tokenizer)
    eos = tokenizer.eos_token_id
    return [end] if eos is None or eos == end else [end, eos]


def special_ids(tokenizer) -> list[int]:
    """The ids of all special tokens: those that decoding leaves out, and the two marks however they are declared."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return [i for i, token in added.items() if token.special or token.content in (IM_START, IM_END)]


def add_chat_tokens(tokenizer) -> int:
    """Add <|im_start|> and <|im_end|> where missing, as special tokens; returns how many were added.

    For models of other families. The model's embedding has to grow by as many rows, and they are untrained.
    """
    from tokenizers import AddedToken

    missing = [text for text in (IM_START, IM_END) if text not in _added_tokens(tokenizer)]
    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in missing], special_tokens=True)
    return len(tokenizer) - before


class _Codec:
    """A copy of a tokenizer's backend that encodes special strings as text; joins its ids to turns."""

    def __init__(self, tokenizer) -> None:
        from tokenizers import Tokenizer

        self.start_id, self.end_id = _chat_ids(tokenizer)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # No BOS or EOS, offsets that keep the blanks, and nothing of what earlier calls left behind.
        state["post_processor"] = state["truncation"] = state["padding"] = None
        for token in state["added_tokens"]:
            # Only tokens marked special can be switched off, and a foreign tokenizer may not mark these two.
            token["special"] = token["special"] or token["content"] in (IM_START, IM_END)
        self.backend = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
        self.backend.encode_special_tokens = True
        self.header = "assistant\n"
        self.header_ids = self._encode(self.header)
        self.newline_ids = self._encode("\n")
        self._check_that_turns_encode_alone()

    def encode_runs(self, runs_of: list[list[str]], *, first: int) -> dict[str, list[int]]:
        """The ids of every different run; `first` is the number of the first conversation, for errors."""
        texts = list(dict.fromkeys(run for runs in runs_of for run in runs))
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for i, runs in enumerate(runs_of, first):
                for run in runs:
                    if any("\ud800" <= character <= "\udfff" for character in run):
                        raise UserError(
                            f"conversation {i}: a content holds half of a surrogate pair "
                            f"({ascii(run)[:60]}), which is no character; drop or repair the record."
                        ) from None
            raise
        return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}

    def join(self, runs: list[str], ids_of: dict[str, list[int]], add_generation_prompt: bool):
        """The ids of one conversation's runs between the marks, and which of them are targets."""
        ids: list[int] = []
        is_target: list[bool] = []
        for run in runs:
            run_ids = ids_of[run]
            num_header = len(run_ids)
            is_answer = run.startswith(self.header)
            if is_answer:
                num_header = self._num_header_tokens(run, run_ids)
            ids.append(self.start_id)
            ids += run_ids
            ids.append(self.end_id)
            ids += self.newline_ids
            is_target += [False] * (1 + num_header)
            is_target += [True] * (len(run_ids) - num_header)
            is_target.append(is_answer)
            is_target += [False] * len(self.newline_ids)
        if add_generation_prompt:
            ids += [self.start_id, *self.header_ids]
            is_target += [False] * (1 + len(self.header_ids))
        return ids, is_target

    def _num_header_tokens(self, run: str, run_ids: list[int]) -> int:
        """How many tokens of an answer's run hold nothing of the answer."""
        num = len(self.header_ids)
        if run_ids[:num] == self.header_ids:
            return num
        # The answer begins inside a token, as in "assistant\n" + "\n\n": count by offsets.
        encoding = self.backend.encode(run, add_special_tokens=False)
        return sum(end <= len(self.header) for _, end in encoding.offsets)

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _check_that_turns_encode_alone(self) -> None:
        """Not every tokenizer does so: some begin a text with a space, or strip blanks beside specials."""
        runs = ["user\n  Hi, 你好 <-\n ", "assistant\n \n\nYes. "]
        ids, _ = self.join(runs, {run: self._encode(run) for run in runs}, add_generation_prompt=True)
        text = "".join(f"{IM_START}{run}{IM_END}\n" for run in runs) + f"{IM_START}{self.header}"
        self.backend.encode_special_tokens = False
        whole = self._encode(text)
        self.backend.encode_special_tokens = True
        if ids != whole:
            raise UserError(
                f"this tokenizer encodes text beside {IM_START} and {IM_END} otherwise than alone (a prefix "
                "space, or special tokens that strip blanks), so turns cannot be encoded apart; "
                "use a byte-level tokenizer."
            )
        if {self.start_id, self.end_id} & set(self._encode(text)):
            raise UserError(f"this tokenizer cannot encode {IM_START} and {IM_END} as text; use another.")


_codecs: WeakKeyDictionary = WeakKeyDictionary()


def _codec_of(tokenizer) -> _Codec:
    size, codec = _codecs.get(tokenizer, (None, None))
    if size != len(tokenizer):
        codec = _Codec(tokenizer)
        _codecs[tokenizer] = len(tokenizer), codec
    return codec


def _added_tokens(tokenizer) -> dict[str, int]:
    if not getattr(tokenizer, "is_fast", False):
        kind = type(tokenizer).__name__
        raise UserError(f"{kind} is not a fast tokenizer; use one that is saved with a tokenizer.json.")
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items()}


def _chat_ids(tokenizer) -> tuple[int, int]:
    added = _added_tokens(tokenizer)
    if missing := [text for text in (IM_START, IM_END) if text not in added]:
        raise UserError(
            f"the tokenizer has no special token {' and no '.join(missing)}; "
            "set tokenizer.add_chat_tokens=true to add what is missing."
        )
    return added[IM_START], added[IM_END]
