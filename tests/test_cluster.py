"""The cluster examples do what they say: workers get the signal, 3 puts the job back into the queue."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[1] / "recipes/cluster"
WORKER = """#!/usr/bin/env bash
# train.py: says who it is, and ends with 3 when it is told to stop, the main process last, which has more to write
echo "$$ rank=$RANK local=$LOCAL_RANK world=$WORLD_SIZE at=$MASTER_ADDR words=$*" >> "$SAID"
trap '[ $RANK = 0 ] && sleep 1.2; echo "rank $RANK left" >> "$SAID"; exit 3' USR1 TERM
for _ in $(seq 600); do sleep 0.05; [ -e "$DONE" ] && exit 0; done
"""
# Slurm's own: starts the tasks, hands them signals, returns the highest status. A site may have set KillOnBadExit, by
# which the first task that fails ends the others, and WaitTime, by which the first that ends does, a while later.
SRUN = """#!/usr/bin/env bash
kill_on_bad_exit=1 wait=1
while [[ "$1" == --* ]]; do
    case "$1" in
        --kill-on-bad-exit=*) kill_on_bad_exit=${1#*=} ;;
        --wait=*) wait=${1#*=} ;;
        *) exit 9 ;;
    esac
    shift
done
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids="$pids $!"; done
wait -n -p first
status=$?
if [ $status -ne 0 ] && [ $kill_on_bad_exit -eq 1 ]; then kill -9 $pids; fi
if [ $wait -gt 0 ]; then sleep $wait; kill -9 $pids; fi
highest=$status
pids=${pids/ $first/}
for pid in $pids; do wait "$pid"; status=$?; [ $status -gt $highest ] && highest=$status; done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && echo node0 && exit
echo "$@" >> "$SAID"
"""
TORCHRUN = """#!/usr/bin/env bash
for task in 0 1; do RANK=$task LOCAL_RANK=$task WORLD_SIZE=2 python "$@" & pids="$pids $!"; done
for pid in $pids; do wait "$pid" || failed=1; done
exit ${failed:-0}
"""


@pytest.fixture
def cluster(tmp_path):
    """run(script): the process, with a scheduler and workers that only say what they were told."""
    for name, text in (("python", WORKER), ("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SAID": str(tmp_path / "said"),
        "DONE": str(tmp_path / "done"),
        "MASTER_ADDR": "node0",
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"},
    }
    return tmp_path, lambda script: subprocess.Popen([CLUSTER / script, "recipe=pretrain", "a=b c"], env=env)


def workers(folder: Path) -> list[str]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = (folder / "said").read_text().splitlines() if (folder / "said").exists() else []
        if len(lines) == 2:
            return sorted(line.split(" ", 1)[1] for line in lines)
        time.sleep(0.02)
    raise AssertionError("no two workers")


@pytest.mark.parametrize("script", ["slurm.sh", "torchrun.sh"])
def test_bash_finds_nothing_wrong(script):
    assert subprocess.run(["bash", "-n", CLUSTER / script]).returncode == 0


def test_slurm_starts_the_workers_itself_and_requeues_a_job_that_was_stopped(cluster):
    folder, run = cluster
    job = run("slurm.sh")
    expected = [f"rank={i} local={i} world=2 at=node0 words=train.py recipe=pretrain a=b c" for i in range(2)]
    assert workers(folder) == expected
    for line in (folder / "said").read_text().splitlines():
        os.kill(int(line.split()[0]), signal.SIGUSR1)  # as --signal=USR1@120 does, to the tasks
    assert job.wait(60) == 3
    assert (folder / "said").read_text().splitlines()[2:] == ["rank 1 left", "rank 0 left", "requeue 7"]


def test_a_slurm_job_that_is_done_is_not_requeued(cluster):
    folder, run = cluster
    job = run("slurm.sh")
    workers(folder)
    (folder / "done").touch()
    assert job.wait(60) == 0 and "requeue" not in (folder / "said").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_torchrun_s_workers_get_the_signal_that_the_script_gets(cluster, number):
    folder, run = cluster
    job = run("torchrun.sh")
    workers(folder)
    job.send_signal(number)
    assert job.wait(60) == 3
