"""recipe=tokenizer: the published tiktoken vocabulary becomes a folder that AutoTokenizer loads."""

from collections.abc import Callable
from pathlib import Path

from aquila_sft import run_dir, runtime
from aquila_sft.config import TokenizerRun
from aquila_sft.errors import UserError


def run(cfg: TokenizerRun, compose_run: Callable[[list[str]], object]) -> None:
    runtime.settle(offline=True)
    if runtime.world_size() > 1:
        raise UserError(f"recipe=tokenizer is one process's work; {runtime.world_size()} were launched")
    ranks = Path(cfg.tokenizer.ranks).expanduser()
    if not ranks.is_file():
        raise UserError(f"tokenizer.ranks={ranks}: no such file")
    identity = run_dir.identity_of(cfg, vocabulary=run_dir.files_sha256([ranks]))
    with run_dir.opened(cfg, identity) as out:
        if out.is_finished():
            runtime.say(f"{out.final} is there already, made from the same ranks")
            return
        from aquila_sft.chat_template import chatml
        from aquila_sft.tokenizer import convert_tiktoken, is_published, save_tokenizer

        tokenizer = convert_tiktoken(ranks, out.final)
        tokenizer.chat_template = chatml(cfg.tokenizer.system)
        save_tokenizer(tokenizer, out.final)
        out.write_summary(
            status="done",
            stage=cfg.stage,
            scale=cfg.scale,
            demo=cfg.demo,
            entries=len(tokenizer),
            published_vocabulary=is_published(tokenizer),
        )
        which = "the published vocabulary" if is_published(tokenizer) else "not the published vocabulary"
        runtime.say(f"{out.final}: {len(tokenizer):,} entries, {which}")
