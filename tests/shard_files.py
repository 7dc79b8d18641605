"""Shards of documents that are ids already, written as recipe=prepare writes them."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from aquila_sft.data import text_set


def write_part(
    folder: Path,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    shard_tokens: int,
    source: str,
    language: str,
    **about,
) -> list[Path]:
    """The shards of one source and language in `folder`. documents: (ids, bytes of the text); about: write_shard's."""
    part, policy = f"{source}.{language}", dict(holdout_fraction=0.0, holdout_max_bytes=0)
    with tempfile.TemporaryDirectory() as work:
        with text_set.IdsWriter(Path(work), about["vocab_size"]) as writer:
            for ids, text_bytes in documents:
                writer.add(part, np.asarray(ids), text_bytes, 0)
        planned = text_set.plan([Path(work)], SimpleNamespace(shard_tokens=shard_tokens, **policy))
        for name, shard in planned.items():
            text_set.write_shard(folder / Path(name).name, [Path(work)], shard, **about)
    return [folder / Path(name).name for name in planned]
