"""What was read, kept, mended, shortened and left out of a set, by language, source and reason."""

import collections
from pathlib import Path

from aquila_sft.errors import UserError

EXAMPLES = 3  # places that are named for a reason


class Ledger:
    """What was read, kept, mended, shortened and left out, by language, source and reason."""

    unit = "rows"  # what one record is called where amounts of it are told

    def __init__(self) -> None:
        self.read = 0
        self.languages: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.sources: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.left_out: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.mended: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.examples: dict[str, list[str]] = collections.defaultdict(list)  # of reasons and of what was mended
        self.kept: collections.Counter = collections.Counter()  # of (source, language, unit)
        self.dropped: collections.Counter = collections.Counter()  # of (source, language, reason, unit)

    def refuse(self, reason: str, language: str, source: str, where: str, **amounts: int) -> None:
        """amounts: how much of what is left out, beside one record."""
        self.left_out[reason][language] += 1
        self.languages[language]["left_out"] += 1
        self.sources[source]["left_out"] += 1
        for unit, amount in {self.unit: 1, **amounts}.items():
            self.dropped[source, language, reason, unit] += amount
        self.example(reason, where)

    def mend(self, what: str, language: str, where: str) -> None:
        self.mended[what][language] += 1
        self.example(what, where)

    def example(self, of: str, where: str) -> None:
        if len(self.examples[of]) < EXAMPLES:
            self.examples[of].append(where)

    def keep(
        self, language: str, source: str, tokens: int, answer_tokens: int, *, records: int = 1, held_back: bool = False
    ) -> None:
        for counter in (self.languages[language], self.sources[source]):
            counter["held_back" if held_back else "kept"] += records
            counter["tokens"] += tokens
            counter["answer_tokens"] += answer_tokens
        for unit, amount in ((self.unit, records), ("tokens", tokens), ("answer_tokens", answer_tokens)):
            self.kept[source, language, unit] += amount

    def shorten(self, language: str, source: str, exchanges: int, answer_tokens: int) -> None:
        for counter in (self.languages[language], self.sources[source]):
            counter["shortened"] += 1
            counter["leading_exchanges_cut"] += exchanges
            counter["answer_tokens_cut"] += answer_tokens

    def lose(self, language: str, source: str, answer_tokens: int) -> None:
        """Answers that are left out because of the length of a row."""
        for counter in (self.languages[language], self.sources[source]):
            counter["answer_tokens_left_out"] += answer_tokens

    def total(self, key: str) -> int:
        return sum(counter[key] for counter in self.languages.values())

    def as_dict(self) -> dict:
        def sorted_counts(table: dict) -> dict:
            return {name: dict(sorted(counts.items())) for name, counts in sorted(table.items())}

        keys = ("kept", "held_back", "left_out", "shortened", "tokens", "answer_tokens", "answer_tokens_cut")
        keys += ("answer_tokens_left_out",)
        return {
            "read": self.read,
            **{key: self.total(key) for key in keys},
            "reasons": self.by_frequency(self.left_out),
            "mended": self.by_frequency(self.mended),
            "by_language": sorted_counts(self.languages),
            "by_source": sorted_counts(self.sources),
            "kept_by_source": nested(self.kept),
            "left_out_by_source": nested(self.dropped),
        }

    def by_frequency(self, table: dict[str, collections.Counter]) -> dict:
        return {
            name: {
                "records": sum(counts.values()),
                "by_language": dict(sorted(counts.items())),
                "first": self.examples[name],
            }
            for name, counts in sorted(table.items(), key=lambda item: (-sum(item[1].values()), item[0]))
        }

    def state(self) -> dict:
        """All of it as JSON, for merge()."""
        return {
            "read": self.read,
            **{name: getattr(self, name) for name in ("languages", "sources", "left_out", "mended", "examples")},
            **{name: [[*key, n] for key, n in getattr(self, name).items()] for name in ("kept", "dropped")},
        }

    def merge(self, state: dict) -> None:
        """Add what another ledger's state() counted of records that come after those counted here."""
        self.read += state["read"]
        for name in ("languages", "sources", "left_out", "mended"):
            for key, counts in state[name].items():
                getattr(self, name)[key].update(counts)
        for reason, places in state["examples"].items():
            self.examples[reason] = [*self.examples[reason], *places][:EXAMPLES]
        for name in ("kept", "dropped"):
            for *key, number in state[name]:
                getattr(self, name)[tuple(key)] += number


def nested(counts: collections.Counter) -> dict:
    """{(a, b, c): n} as {a: {b: {c: n}}}, in order."""
    tree: dict = {}
    for keys, number in sorted(counts.items()):
        inner = tree
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = number
    return tree


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
