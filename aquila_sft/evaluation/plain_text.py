"""Any text as a task whose bits per byte are measured (bits.py).

    files -> documents (language by script) -> log-likelihood of each whole -> nats and UTF-8 bytes

Each document is read by itself, behind the begin token, in windows as long as the model.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from aquila_sft import runtime
from aquila_sft.data import documents
from aquila_sft.errors import UserError
from aquila_sft.evaluation.engine import ItemTask, Outcome


@dataclass(frozen=True)
class Text:
    prompt: str
    about: dict[str, str]


def read(files: dict[str, list[Path]], text_column: str, limit: int | None) -> list[Text]:
    """The first `limit` documents of every source and language. Raises UserError when there is none."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    texts, left_out = [], []
    for document, where in documents.read(files, text_column, lambda *why: left_out.append(why)):
        part = document.language, document.source
        counts[part] += 1
        if limit is None or counts[part] <= limit:
            about = {"where": where, "language": document.language, "source": document.source}
            texts.append(Text(document.text, about))
    if not texts:
        why = f" ({left_out[0][0]} at {left_out[0][3]})" if left_out else ""
        raise UserError(f"data.files={','.join(map(str, next(iter(files.values()))))} holds no text{why}")
    if left_out:
        runtime.say(
            f"  data.files: {len(left_out):,} records left out, the first: {left_out[0][0]} at {left_out[0][3]}"
        )
    return texts


def task(texts: list[Text]) -> ItemTask:
    def outcome(text: Text, results: list[float]) -> Outcome:
        return Outcome({"nats": -results[0], "bytes": float(len(text.prompt.encode()))}, about=text.about)

    return ItemTask("text", texts, lambda text: [("loglikelihood_rolling", (text.prompt,))], outcome)
