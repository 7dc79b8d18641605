"""The ledger of all instruct_* sets in a folder of real data, as the table of data/README.md.

PYTHONPATH=. python tests/instruct_ledger.py <folder> <qwen.tiktoken> [settings of recipe=sft]
"""

import sys
import tempfile
from pathlib import Path

import train
from aquila_sft import chat_template
from aquila_sft.config.runs import SftRun
from aquila_sft.data import sft_set, sources
from aquila_sft.data.chat_encoder import Encoder
from aquila_sft.tokenizer import convert_tiktoken


def prepared(root: Path, ranks: Path, folder: Path, *settings: str) -> tuple[dict, Path]:
    """The ledger of all sets together, and the folder of the prepared set."""
    run: SftRun = train.compose_run(
        ["recipe=sft", "scale=135m", f"data.files={root}/instruct_*/*.json*", "data.unreadable=leave_out", *settings]
    )
    files = [file for file in sources.find(run.data.files) if file.name != "SOURCE.json"]
    tokenizer = convert_tiktoken(ranks, folder / "tokenizer")
    tokenizer.chat_template = chat_template.chatml(run.tokenizer.system)
    encode = Encoder(tokenizer, run.tokenizer.system, folder / "encoder.json")
    return sft_set.prepare(files, folder / "set", encode, sft_set.policy_of(run), {}, run.data), folder / "set"


def table(report: dict) -> str:
    lines = ["| source | language | what became of it | rows | tokens | answer tokens |", "|---|---|---|---|---|---|"]

    def line(source: str, language: str, fate: str, amounts: dict) -> None:
        figures = " | ".join(f"{amounts.get(unit, 0):,}" for unit in ("rows", "tokens", "answer_tokens"))
        lines.append(f"| {source} | {language} | {fate} | {figures} |")

    for source in sorted(report["by_source"]):
        for language, amounts in report["kept_by_source"].get(source, {}).items():
            line(source, language, "kept", amounts)
        for language, reasons in report["left_out_by_source"].get(source, {}).items():
            for reason, amounts in reasons.items():
                line(source, language, f"*{reason}*", amounts)
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        report, _ = prepared(Path(sys.argv[1]), Path(sys.argv[2]), Path(scratch), *sys.argv[3:])
        print(table(report))
        totals = ("read", "kept", "held_back", "left_out", "shortened", "tokens", "answer_tokens", "answer_tokens_cut")
        print("\n" + ", ".join(f"{key.replace('_', ' ')} {report[key]:,}" for key in totals))
        for name in ("mended", "reasons"):
            print(f"{name}: " + ", ".join(f"{what} {about['records']:,}" for what, about in report[name].items()))
