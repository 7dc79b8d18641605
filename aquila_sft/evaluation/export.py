"""Items as files, for another harness: python -m aquila_sft.evaluation.export <hub or folder> <out> [limit]

<out>/<part>.<score>/validation.jsonl: {prompt, choices, gold, golds}, examples included, in the reference's order
"""

import dataclasses
import json
import sys
from pathlib import Path

from aquila_sft.errors import DONE, USER_ERROR, UserError
from aquila_sft.evaluation import benchmarks, items


def main(words: list[str]) -> int:
    if len(words) not in (2, 3) or len(words) == 3 and not words[2].isdigit():
        print(__doc__.split("\n")[0], file=sys.stderr)
        return USER_ERROR
    data, out, limit = words[0], Path(words[1]), int(words[2]) if len(words) == 3 else None
    try:
        for name in benchmarks.GROUPS["card"]:
            benchmark = benchmarks.load(name)
            for part, listed in items.read(benchmark, data, out.with_name(f"{out.name}-data"), limit).items():
                write(out / f"{part.replace(':', '_')}.{benchmark.score}" / "validation.jsonl", listed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return DONE


def write(path: Path, listed: list[items.Item]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n" for item in listed)
    path.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
