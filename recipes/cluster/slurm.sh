#!/usr/bin/env bash
# One run on several nodes under Slurm, which may take the nodes away at any time:
#
#     sbatch recipes/cluster/slurm.sh recipe=pretrain scale=135m data.shards=/data/shards/final
#
# Slurm starts the workers itself, one a GPU: a launcher between them would have to pass signals on. Two minutes before
# the time limit every worker gets SIGUSR1 (on preemption SIGTERM), finishes its step, waits for the checkpoint and exits
# with 3; the job then puts itself back into the queue, and the same command goes on from that checkpoint.
# The folder and outputs/ must be on a file system that all nodes share.

#SBATCH --job-name=aquila
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Workers leave one after the other, with 3 when they were stopped, and nobody may end the rest for it, whatever the
# site's KillOnBadExit and WaitTime: the main one still writes. A worker that fails closes its connections, and so the
# others fail in their next collective, at its time-out at the latest.
# exec: the worker is the process that Slurm signals, not a shell around it.
srun --kill-on-bad-exit=0 --wait=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python train.py "$@"' worker "$@"
status=$?

if [ "$status" -eq 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
