#!/usr/bin/env bash
# One node of a run on several, without a scheduler. On every node, the same line but for NODE_RANK:
#
#     NODES=2 NODE_RANK=0 MASTER_ADDR=node0 recipes/cluster/torchrun.sh recipe=pretrain scale=135m
#
# SIGTERM, SIGINT or SIGUSR1 to this script goes to the workers of its node, and so to all: they agree after every step.
# torchrun itself would give them 30 seconds and then kill them, so it is not told.
# Exit status: 0 done, 3 stopped by a signal, else torchrun's own, which makes 1 of every failure; summary.json of the
# run says what a worker would have said.

set -uo pipefail

torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${PROCESSES:-gpu}" \
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" train.py "$@" &
launcher=$!

stopped=0
stop() {
    stopped=1
    pkill -USR1 -P "$launcher" # its children: the workers
}
trap stop TERM INT USR1

# `wait` ends when a trap has run, and then there is more to wait for
wait "$launcher"
status=$?
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher"
    status=$?
done

if [ "$stopped" -eq 1 ] && [ "$status" -ne 0 ]; then
    exit 3
fi
exit "$status"
