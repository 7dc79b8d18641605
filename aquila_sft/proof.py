"""Was every row trained on once, and none lost? What a run says it consumed, against its order and its shards.

    python -m aquila_sft.proof outputs/mini/pretrain

The newest checkpoint holds the rows of every part and the ledger's hash (data/consumed.py), metrics.jsonl those of the
ones before. Here the order is walked again, in one process, from one to the next: each must have added exactly its
rows. A run does this itself at its end, for as many of its newest rows as take seconds; the command for all of them.
"""

import math
import sys
from pathlib import Path

from aquila_sft.data.consumed import BITS, Consumed, recount
from aquila_sft.data.loader import Loader
from aquila_sft.errors import DONE, USER_ERROR, UserError

ROWS_AT_THE_END = 2**17
BEGIN = {"step": 0, "rows": {}, "ledger": "0"}


def ledgers(metrics: list[dict], parts: list[str], step: int, consumed: Consumed) -> list[dict]:
    """What was consumed at every checkpoint, up to the newest, which is at `step` and says so itself."""
    newest = {"step": step, "rows": consumed.rows_of(parts), "ledger": consumed.hash}
    return [*(line for line in metrics if "ledger" in line and line["step"] <= step), newest]


def check(loader: Loader, checkpoints: list[dict], *, max_rows: float = math.inf) -> str:
    """The verdict on `ledgers`, in words. Raises UserError when something is amiss."""
    total = reread = 0
    for before, now in reversed(list(zip([BEGIN, *checkpoints], checkpoints, strict=False))):
        where = f"between steps {before['step']:,} and {now['step']:,}"
        places = loader.trained_on(before["step"], now["step"])
        expected = rows_of(loader, places)
        for name, rows in expected.items():
            if (found := now["rows"][name] - before["rows"].get(name, 0)) != rows:
                raise UserError(
                    f"{where} the run's order has {rows:,} rows of {name} and the ledger {found:,}: rows were "
                    f"{'lost' if found < rows else 'trained on twice'}; do not trust the checkpoints from here on"
                )
        total += (rows := sum(expected.values()))
        if total > max_rows:
            continue
        reread += rows
        found = (int(now["ledger"], 16) - int(before["ledger"], 16)) % 2**BITS
        if found != recount(loader.order, loader.parts, places, loader.length, loader.pad_id).total:
            raise UserError(
                f"{where} other rows or tokens were trained on than the shards have in the run's order: the shards "
                "have changed, or rows were lost; do not trust the checkpoints from here on"
            )
    return f"nothing lost, nothing twice: {total:,} rows counted, {reread:,} of them read again"


def rows_of(loader: Loader, places: list[tuple[int, int]]) -> dict[str, int]:
    """Rows of every part at these places."""
    drawn = [(loader.order.drawn(first), loader.order.drawn(end)) for first, end in places]
    return {name: sum(end[name] - first[name] for first, end in drawn) for name in loader.order.parts}


def of_run(folder: Path) -> str:
    """The verdict on a run's directory, from what lies in it and the shards that it names."""
    import yaml
    from omegaconf import OmegaConf

    from aquila_sft import checkpoint, door
    from aquila_sft.data.shards import Prepared
    from aquila_sft.log import MetricsFile
    from aquila_sft.run_dir import read_json
    from aquila_sft.tokenizer import load_tokenizer

    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"{folder}: no config.yaml there; give the directory of a run of recipe=pretrain") from None
    newest = next(reversed(checkpoint.all_of(folder / "checkpoints")), None)
    if not isinstance(settings, dict) or settings.get("stage") != "pretrain" or newest is None:
        raise UserError(f"{folder} has no checkpoint of recipe=pretrain or anneal")
    cfg = door.load(OmegaConf.create(settings | {"scale_is_explicit": True}))  # it passed that check when it began
    if wrong := checkpoint.problem(newest):
        raise UserError(f"{newest} is damaged ({wrong}); the command that trained, given again, makes it again")
    prepared = Prepared(Path(cfg.data.shards))
    pad_id = load_tokenizer(prepared.tokenizer_folder).pad_token_id
    loader = Loader.of_run(cfg, prepared, device="cpu", pad_id=pad_id)
    state = read_json(newest / "state.json")
    loader.skipped = [tuple(window) for window in state["loader"]["skipped"]]
    metrics, consumed = MetricsFile.lines(folder / "metrics.jsonl"), Consumed.of_state(state["ledger"])
    return check(loader, ledgers(metrics, loader.order.parts, state["step"], consumed))


if __name__ == "__main__":
    try:
        print(of_run(Path(sys.argv[1] if len(sys.argv) == 2 else "give the directory of one run")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.exit(DONE)
