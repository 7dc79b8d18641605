"""The definitions in recipes/eval/*.yaml: which benchmarks there are, and which of them a run asks for.

eval.tasks=card | english | chinese | instruct | text | names -> [Benchmark, …], the card's order
"""

from dataclasses import dataclass, field
from pathlib import Path

from aquila_sft.door import nearest
from aquila_sft.errors import UserError

FOLDER = Path(__file__).parents[2] / "recipes" / "eval"
ENGLISH = (
    "hellaswag",
    "arc",
    "piqa",
    "mmlu",
    "commonsenseqa",
    "triviaqa",
    "winogrande",
    "openbookqa",
    "gsm8k",
    "siqa",
)
CHINESE = ("ceval", "cmmlu")
CHATS = ("ifeval", "instruct_zh", "instruct_en")
INSTRUCT = (*CHATS, "references")
TEXT = ("text",)
GROUPS = {
    "card": ENGLISH + CHINESE,
    "english": ENGLISH,
    "chinese": CHINESE,
    "instruct": INSTRUCT,
    "all": ENGLISH + CHINESE + INSTRUCT + TEXT,
}
KNOWN = GROUPS["all"]


@dataclass(frozen=True)
class Source:
    """Where the items of a benchmark, or of a part of it, are."""

    hub: dict  # repo, files, shots, revision
    local: tuple[str, ...]  # names in a folder, the first that is there


@dataclass(frozen=True)
class Benchmark:
    """One row of the table. `parts`: what it is the mean of, each with its source; a plain one has itself alone."""

    name: str
    row: str
    language: str
    form: str  # choices | answer
    reader: str
    prompt: str
    score: str  # acc_norm | acc | trivia | gsm8k
    shots: int
    parts: dict[str, Source]
    topics: dict[str, str] = field(default_factory=dict)  # part -> what the prompt calls it
    columns: tuple[str, ...] = ()  # of files without a header
    choice: str = ""
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 0
    local_shots: tuple[str, ...] = ()


def load(name: str) -> Benchmark:
    import yaml

    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    subjects = given.pop("subjects", {})
    hub, local = given.pop("hub", None), given.pop("local", None)
    parts = given.pop("parts", None) or {name: {"hub": hub, "local": local}}
    if subjects:
        parts = {
            f"{name}:{subject}": {"hub": hub, "local": [pattern.format(subject=subject) for pattern in local]}
            for subject in subjects
        }
    return Benchmark(
        name=name,
        parts={part: Source(source["hub"], tuple(source["local"])) for part, source in parts.items()},
        topics={f"{name}:{subject}": topic for subject, topic in subjects.items()},
        **{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()},
    )


def asked(tasks: list[str]) -> list[str]:
    """Names of benchmarks for names and groups, each once, in the card's order. Raises UserError."""
    names: set[str] = set()
    for task in tasks:
        if task not in GROUPS and task not in KNOWN:
            choices = [*GROUPS, *KNOWN]
            raise UserError(f"eval.tasks={task} is not one of {', '.join(choices)}{nearest(task, choices)}")
        names |= set(GROUPS.get(task, (task,)))
    return [name for name in KNOWN if name in names]
