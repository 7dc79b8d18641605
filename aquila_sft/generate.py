"""Answers from a saved model, piece by piece while they are written or all at once.

    Generator.load(folder) -> .stream(messages, settings) -> an Answer: iterate for its text, then ask its end
                           -> .answer(messages, settings) -> an Answer, finished

The decoding loop is ours and not transformers' generate(), which streams only out of a second thread that
nothing can stop: here Ctrl-C ends an answer between two operations and leaves the model ready for the next.
Greedy answers are those of generate().
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper
from transformers.utils import logging as transformers_logging

from aquila_sft import model as models
from aquila_sft.chat_template import IM_END, IM_START, Message, encode_messages, stop_ids
from aquila_sft.config.model import Generate
from aquila_sft.errors import UserError
from aquila_sft.tokenizer import load_tokenizer

# A character split over tokens decodes to U+FFFD until its last byte is there. At most three of them, one a
# byte, can still change: the longest unfinished UTF-8 character has three bytes.
UNFINISHED = re.compile("\ufffd{1,3}$")


class Generator:
    """A model and its tokenizer, ready to answer. Keeps the keys and values of the last conversation."""

    def __init__(self, model, tokenizer, *, seed: int = 0) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
        self.stop_ids = set(stop_ids(tokenizer))
        self.context_tokens = model.config.max_position_embeddings
        self._cached: tuple[list[int], object] = ([], None)  # ids, and past_key_values for just these

    @classmethod
    def load(cls, folder: Path, *, seed: int = 0, converted_to: Path | None = None) -> "Generator":
        """The model of a local folder on the best device. Raises UserError if it is not whole.

        In fp32, so that a greedy answer depends as little as possible on the device. `converted_to` takes the
        tokenizer of a checkpoint that has tiktoken ranks only.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        tokenizer = load_tokenizer(folder, converted_to=converted_to)
        model = models.load(folder)
        num_rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > num_rows:
            raise UserError(
                f"{folder}: the tokenizer has {len(tokenizer)} entries and the model's embedding "
                f"{num_rows} rows; they belong to different models"
            )
        try:  # now, not at the first question, which also spares that one two seconds
            encode_messages(tokenizer, [{"role": "user", "content": ""}], add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"{folder} is not tuned for chat ({error}); tune it with recipe=sft") from None
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return cls(model.to(device), tokenizer, seed=seed)

    def stream(self, messages: list[Message], settings: Generate) -> "Answer":
        """The answer to messages that end with a user's; nothing is computed before it is iterated over.

        No system line is added. The messages have to fit the context (see fitted).
        """
        ids, _ = encode_messages(self.tokenizer, messages, default_system=None, add_generation_prompt=True)
        return Answer(self, ids, settings)

    def answer(self, messages: list[Message], settings: Generate) -> "Answer":
        """stream() to its end, from the seed on: the same answer whatever was asked before."""
        self._cached = ([], None)
        self.random.manual_seed(self.seed)
        answer = self.stream(messages, settings)
        for _ in answer:
            pass
        return answer

    def fitted(self, messages: list[Message], settings: Generate) -> list[Message]:
        """fit_history with room for the whole answer, but no more than a quarter of the context."""
        reserve = min(settings.max_new_tokens, self.context_tokens // 4)
        return fit_history(self.tokenizer, messages, self.context_tokens, reserve)

    def next_id(self, ids: list[int], settings: Generate) -> int:
        """The id to follow `ids`: the likeliest at temperature 0, otherwise drawn from the top_p of them."""
        scores = self._next_logits(ids)
        if not scores.max().isfinite():  # the maximum of anything and NaN is NaN
            raise UserError(
                "the model's outputs are not finite numbers: its weights are damaged, or its "
                "training diverged; use an earlier checkpoint"
            )
        scores = scores[:, : len(self.tokenizer)]  # a padded embedding has rows that spell nothing
        if settings.repetition_penalty != 1:
            penalize = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
            scores = penalize(torch.tensor([ids]), scores)
        if settings.temperature == 0:
            return int(scores.argmax())
        scores = (scores - scores.max()) / settings.temperature  # the largest becomes 0: nothing can overflow
        if settings.top_p < 1:
            scores = TopPLogitsWarper(float(settings.top_p))(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.random))

    def _next_logits(self, ids: list[int]) -> Tensor:
        """(1, V), fp32, on the CPU: the logits behind the last of `ids`. Computes what the cache lacks."""
        known_ids, cache = self._cached
        if not 0 < len(known_ids) < len(ids) or ids[: len(known_ids)] != known_ids:
            known_ids, cache = [], None
        self._cached = ([], None)  # an interrupted forward pass leaves some layers ahead of the others
        with torch.inference_mode():
            new_ids = torch.tensor([ids[len(known_ids) :]], device=self.model.device)
            out = self.model(input_ids=new_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1].float().cpu()
        self._cached = (list(ids), out.past_key_values)
        return logits


class Answer:
    """An answer. Iterating writes it, one piece of text a step; pieces never hold a part of a character.

    `text` and `tokens` (the end of the turn not counted) grow with it. `end` says how it came to its end:
    "turn" (the model ended it), "max_new_tokens" or "context" (no room for more), "interrupted" until then.
    """

    def __init__(self, generator: Generator, ids: list[int], settings: Generate) -> None:
        self.text, self.tokens, self.end = "", 0, "interrupted"
        self._generator, self._ids, self._settings = generator, ids, settings

    @property
    def stopped(self) -> bool:
        """The model ended its turn by itself."""
        return self.end == "turn"

    def __iter__(self) -> Iterator[str]:
        room = self._generator.context_tokens - len(self._ids)
        limit = self._settings.max_new_tokens
        ids, whole = list(self._ids), ""
        for _ in range(min(room, limit)):
            new_id = self._generator.next_id(ids, self._settings)
            if new_id in self._generator.stop_ids:
                self.end = "turn"
                break
            ids.append(new_id)
            self.tokens += 1
            whole = self._decode(ids[len(self._ids) :])
            yield from self._grow(UNFINISHED.sub("", whole))
        else:
            self.end = "max_new_tokens" if limit <= room else "context"
        yield from self._grow(whole)

    def _grow(self, text: str) -> Iterator[str]:
        piece = text[len(self.text) :]
        self.text += piece
        if piece:
            yield piece

    def _decode(self, ids: list[int]) -> str:
        tokenizer = self._generator.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def default_system(tokenizer) -> str | None:
    """The system line that the tokenizer's chat template gives a conversation without one, or None."""
    if not tokenizer.chat_template:
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    found = re.search(f"{re.escape(IM_START)}system\n(.*?){re.escape(IM_END)}", text, re.DOTALL)
    return found[1] if found else None


def fit_history(tokenizer, messages: list[Message], context_tokens: int, reserve: int) -> list[Message]:
    """`messages` without the oldest turns, so that `reserve` tokens of the context stay free for an answer.

    A turn is a user's message and what follows it up to the next; turns leave whole, the system line stays.
    Raises UserError if not even the last turn fits.
    """
    num_system = int(messages[0]["role"] == "system")
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start in dict.fromkeys([num_system, *starts]):
        kept = messages[:num_system] + messages[start:]
        ids, _ = encode_messages(tokenizer, kept, default_system=None, add_generation_prompt=True)
        if len(ids) + reserve <= context_tokens:
            return kept
    beside = " with the system line" if num_system else ""
    raise UserError(
        f"this message{beside} is {len(ids)} tokens long; the context is {context_tokens}, of "
        f"which {reserve} are kept for the answer; shorten it"
    )
