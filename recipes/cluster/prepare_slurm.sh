#!/usr/bin/env bash
# recipe=prepare on a Slurm cluster: each step of it becomes a job array that waits for the step before. Run this on a
# login node, in the repository's root, with everything on a file system that all nodes see. It submits and leaves with
# status 3; give it again when the jobs are done, and it writes MANIFEST.json and the ledger. Jobs that failed or were
# killed: give it again, too; what is there is kept. Needs pip install -e '.[corpus]'. Change the names to yours.
set -euo pipefail
cd "$(dirname "$0")/../.."

python train.py recipe=prepare scale=135m run_name=corpus \
  tokenizer.path=outputs/135m/tokenizer/final \
  data.files='{dclm: /corpora/dclm/*.jsonl.zst, fineweb_edu: /corpora/fineweb-edu/*.parquet, cci3_hq: /corpora/cci3-hq/*.jsonl}' \
  prepare.decontaminate=/corpora/benchmarks \
  prepare.slice_mb=1024 \
  prepare.executor=slurm prepare.tasks=512 \
  prepare.slurm='{partition: cpu, time: "24:00:00", cpus_per_task: 1, mem_per_cpu_gb: 8, at_once: 128, setup: source .venv/bin/activate}' \
  "$@"
