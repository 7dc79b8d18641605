"""A model as lm-eval sees it: requests in, log-likelihoods and answers out, whatever the number of processes.

    requests -> what the journal lacks -> groups, longest first -> batches, a share for every process -> journal

Batches are made before they are shared out, so one process and several compute the same ones. lm-eval's own data
parallelism shares out documents instead, and is not used: to it there is one process.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from aquila_sft import runtime
from aquila_sft.chat_template import IM_END
from aquila_sft.errors import UserError
from aquila_sft.evaluation import forward, rules
from aquila_sft.evaluation.choosing import GREEDY, Choosing
from aquila_sft.evaluation.journal import Journal


@dataclass
class Settings:
    batch_tokens: int
    share_prefixes: bool
    autocast: Callable[[], contextlib.AbstractContextManager]


class Scorer(LM):
    """model: with swap.install, in evaluation mode; its tokenizer; a journal of its own."""

    def __init__(self, model, tokenizer, journal: Journal, settings: Settings) -> None:
        super().__init__()
        self.model, self.tokenizer, self.journal, self.settings = model, tokenizer, journal, settings
        self.max_length = model.config.max_position_embeddings
        self.pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        first = (tokenizer.bos_token_id, tokenizer.eos_token_id, self.pad_id)
        self.first_id = next(i for i in first if i is not None)  # what predicts the first token of a text
        self.end_id = self.first_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.turn_end_id = tokenizer.get_vocab().get(IM_END)
        self.tokens = 0  # that went through the model here

    def encode(self, text: str) -> list[int]:
        """Without a begin token, as the reference: it asks for no special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    # ---- lm-eval's three kinds of request ----

    def loglikelihood(self, requests) -> list[tuple[float, None]]:
        """(log p, None): whether a continuation is the greedy one is not computed; no task here asks."""
        pairs = [request.args for request in requests]
        keys = [self.journal.key("loglikelihood", *pair) for pair in pairs]

        def encoded(pair: tuple[str, str]) -> tuple[list[int], list[int]]:
            context, continuation = pair
            if not context.strip():  # nothing to condition on: the reference puts the end token there
                return [self.end_id], self.encode(context + continuation)
            ids = rules.encode_pair(self.encode, context, continuation)
            if not ids[1]:
                raise UserError(f"the continuation {continuation!r} has no token behind {context[-40:]!r}")
            return ids

        self.score(keys, lambda i: encoded(pairs[i]), "log-likelihoods")
        return [(self.journal.answers[key], None) for key in keys]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Each text whole, in windows as long as the model; the first token is predicted by the begin token."""
        texts = [request.args[0] for request in requests]
        windows = []
        for text in texts:
            cut = get_rolling_token_windows(
                token_list=self.encode(text), prefix_token=self.first_id, max_seq_len=self.max_length, context_len=1
            )
            windows.append([make_disjoint_window(window) for window in cut])
        flat = [(number, window) for number, found in enumerate(windows) for window in found]
        keys = [self.journal.key("rolling", *window) for _, window in flat]
        self.score(keys, lambda i: flat[i][1], "texts")
        totals = [0.0] * len(texts)
        for (number, _), key in zip(flat, keys, strict=True):
            totals[number] += self.journal.answers[key]
        return totals

    def generate_until(self, requests) -> list[str]:
        """Answers up to `until`, the end of the text, and in a `chat` that of the turn; greedy without `choosing`."""
        asked = [as_asked(*request.args) for request in requests]
        keys = [self.answer_key(one) for one in asked]
        open_places = list({key: i for i, key in enumerate(keys) if key not in self.journal.answers}.values())
        room = self.max_length
        prompts = {}
        for i in open_places:
            prompt = self.encode(asked[i].prompt) or [self.first_id]
            prompts[i] = prompt[-(room - 1) :]
        made = []
        for choosing in dict.fromkeys(asked[i].choosing for i in open_places):  # a batch chooses in one way
            places = [i for i in open_places if asked[i].choosing == choosing]
            sizes = [len(prompts[i]) + min(asked[i].max_new_tokens, room - len(prompts[i])) for i in places]
            made += [[places[at] for at in batch] for batch in forward.batches(sizes, self.settings.batch_tokens)]
        mine = self.shared(made)
        with self.progress(sum(len(batch) for batch in mine), "answers", "answer") as bar:
            for batch in mine:
                self.write_answers(batch, prompts, asked, keys, bar)
        self.exchange(keys)
        return [self.journal.answers[key] for key in keys]

    # ---- how ----

    def write_answers(self, places: list[int], prompts: dict, asked: list, keys: list[str], bar: tqdm) -> None:
        decode = self.tokenizer.decode

        def is_done(row: int, new_ids: list[int]) -> bool:
            stops = asked[places[row]].stops
            if self.ends(new_ids[-1], asked[places[row]]):
                return True
            tail = decode(new_ids[-16:], skip_special_tokens=True)  # longer than any stop; most steps end here
            return bool(stops) and any(stop in tail for stop in stops)

        room = [min(asked[i].max_new_tokens, self.max_length - len(prompts[i])) for i in places]
        written = forward.answers(
            self.model,
            [prompts[i] for i in places],
            room,
            is_done,
            self.pad_id,
            len(self.tokenizer),
            self.settings.autocast,
            asked[places[0]].choosing,
            [keys[i] for i in places],
        )
        for row, new_ids in written:
            stopped = self.ends(new_ids[-1], asked[places[row]])
            text = decode(
                new_ids[: len(new_ids) - stopped], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            answer = rules.before_stop(text, asked[places[row]].stops)
            key = keys[places[row]]
            self.journal.add({f"{key}:stopped": float(stopped), key: answer})  # what is asked for last: both are there
            self.tokens += len(prompts[places[row]]) + len(new_ids)
            bar.update()

    def ends(self, new_id: int, asked: "Request") -> bool:
        return new_id == self.tokenizer.eos_token_id or (asked.is_chat and new_id == self.turn_end_id)

    def has_stopped(self, prompt: str, how: dict) -> bool:
        """Whether the model ended its answer to that request by itself."""
        return bool(self.journal.answers[f"{self.answer_key(as_asked(prompt, how))}:stopped"])

    def answer_key(self, asked: "Request") -> str:
        return self.journal.key("answer", *asked[:-1], *astuple(asked.choosing))

    def score(self, keys: list[str], pair_of: Callable[[int], tuple[Sequence[int], Sequence[int]]], what: str) -> None:
        """Fill the journal for every key, each once."""
        open_places = list({key: i for i, key in enumerate(keys) if key not in self.journal.answers}.values())
        pairs = [pair_of(i) for i in open_places]
        if self.settings.share_prefixes:
            window = getattr(self.model.config, "sliding_window", None)
            groups = forward.grouped(pairs, self.max_length, window)
        else:
            groups = [(forward.fitted(*pair, self.max_length), [i]) for i, pair in enumerate(pairs)]
        mine = self.shared(forward.batches([group.tokens for group, _ in groups], self.settings.batch_tokens))
        with self.progress(sum(groups[i][0].tokens for batch in mine for i in batch), what, "token") as bar:
            for batch in mine:
                chosen = [groups[i] for i in batch]
                found = forward.log_probs(
                    self.model, [group for group, _ in chosen], self.pad_id, self.settings.autocast
                )
                answers = {
                    keys[open_places[place]]: value
                    for (_, places), values in zip(chosen, found, strict=True)
                    for place, value in zip(places, values, strict=True)
                }
                if bad := [value for value in answers.values() if not math.isfinite(value)]:
                    raise UserError(f"the model's outputs are not finite numbers ({bad[0]}): its weights are damaged")
                self.journal.add(answers)
                done = sum(group.tokens for group, _ in chosen)
                self.tokens += done
                bar.update(done)
        self.exchange(keys)

    @staticmethod
    def shared(made: list[list[int]]) -> list[list[int]]:
        return made[runtime.rank() :: runtime.world_size()]

    def exchange(self, keys: list[str]) -> None:
        """Every process learns what the others have answered."""
        if runtime.world_size() == 1:
            return
        import torch.distributed as dist

        asked = set(keys)
        mine = {key: value for key, value in self.journal.answers.items() if key.partition(":")[0] in asked}
        everyone: list[dict] = [{}] * runtime.world_size()
        dist.all_gather_object(everyone, mine)
        for answers in everyone:
            self.journal.answers |= answers

    @staticmethod
    def progress(total: int, what: str, unit: str) -> tqdm:
        return tqdm(
            total=total,
            desc=what,
            unit=f" {unit}s",
            dynamic_ncols=True,
            mininterval=1.0,
            leave=False,
            disable=not runtime.is_main() or not total,
            bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{unit}, {remaining} left",
        )


class Request(NamedTuple):
    prompt: str
    stops: tuple[str, ...]
    max_new_tokens: int
    is_chat: bool
    choosing: Choosing


def as_asked(prompt: str, how: dict) -> Request:
    until, chat, choosing = tuple(how["until"]), how.get("chat", False), how.get("choosing", GREEDY)
    return Request(prompt, until, how["max_gen_toks"], chat, choosing)


def autocast_of(device: str, precision: str) -> Callable[[], contextlib.AbstractContextManager]:
    if precision == "bf16":
        return lambda: torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext
