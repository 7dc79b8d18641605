"""What was read, kept, shortened and left out of a set of conversations, by language, source and reason."""

import collections
from pathlib import Path

from aquila_sft.data.conversations import Conversation
from aquila_sft.errors import UserError


class Ledger:
    """What was read, kept, shortened and left out, by language, source and reason."""

    def __init__(self) -> None:
        self.read = 0
        self.languages: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.sources: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.left_out: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.examples: dict[str, list[str]] = collections.defaultdict(list)

    def refuse(self, reason: str, language: str, source: str, where: str, answer_tokens: int = 0) -> None:
        """`answer_tokens`: of a conversation that was tokenized before it was left out."""
        self.left_out[reason][language] += 1
        for counter in (self.languages[language], self.sources[source]):
            counter["left_out"] += 1
            if answer_tokens:
                counter["answer_tokens_left_out"] += answer_tokens
        if len(self.examples[reason]) < 3:
            self.examples[reason].append(where)

    def keep(self, conversation: Conversation, tokens: int, answer_tokens: int, held_back: bool) -> None:
        for counter in (self.languages[conversation.language], self.sources[conversation.source]):
            counter["held_back" if held_back else "kept"] += 1
            counter["tokens"] += tokens
            counter["answer_tokens"] += answer_tokens

    def shorten(self, conversation: Conversation, exchanges: int, answer_tokens: int) -> None:
        for counter in (self.languages[conversation.language], self.sources[conversation.source]):
            counter["shortened"] += 1
            counter["leading_exchanges_cut"] += exchanges
            counter["answer_tokens_cut"] += answer_tokens

    def total(self, key: str) -> int:
        return sum(counter[key] for counter in self.languages.values())

    def as_dict(self) -> dict:
        def sorted_counts(table: dict) -> dict:
            return {name: dict(sorted(counts.items())) for name, counts in sorted(table.items())}

        keys = ("kept", "held_back", "left_out", "shortened", "tokens", "answer_tokens", "answer_tokens_cut")
        keys += ("answer_tokens_left_out",)
        reasons = {
            reason: {
                "records": sum(counts.values()),
                "by_language": dict(sorted(counts.items())),
                "first": self.examples[reason],
            }
            for reason, counts in sorted(self.left_out.items(), key=lambda item: -sum(item[1].values()))
        }
        return {
            "read": self.read,
            **{key: self.total(key) for key in keys},
            "reasons": reasons,
            "by_language": sorted_counts(self.languages),
            "by_source": sorted_counts(self.sources),
        }


def why_left_out(report: dict) -> str:
    """'empty text: 3 (first a.jsonl:7), …' of a ledger's report."""
    return ", ".join(f"{r}: {v['records']:,} (first {v['first'][0]})" for r, v in report["reasons"].items())


class NothingLeft(UserError):
    """No conversation is left to train on; `ledger` says where they went, the message says it in one line."""

    def __init__(self, ledger: dict, files: list[Path]) -> None:
        self.ledger = ledger
        reasons = why_left_out(ledger)
        why = f"left out for: {reasons}" if reasons else "the files are empty"
        if ledger["held_back"]:
            why = f"held back for evaluation: {ledger['held_back']} (data.holdout_fraction)"
        names = ", ".join(f.name for f in files[:3]) + (" …" if len(files) > 3 else "")
        super().__init__(f"no conversation is left to train on: {ledger['read']} records read from {names}; {why}")
