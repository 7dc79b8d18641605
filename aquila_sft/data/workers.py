"""Who runs the tasks of a Work (tasks.py): processes of this machine, or datatrove, which knows Slurm.

    processes   a pool of prepare.workers or data.workers processes, one step after the other
    datatrove   the same through datatrove's local executor
    slurm       every step is a job array of prepare.tasks or data.tasks tasks that waits for the one before; nobody
                waits here

Task i of n of an executor's does tasks i, i + n, i + 2n, … of a step. What is done is known by what is there, not by an
executor's own marks, so one may begin with any of them, and go on with another or with another number of tasks.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from aquila_sft import runtime
from aquila_sft.config.data import Workers
from aquila_sft.data.tasks import Step, Work
from aquila_sft.errors import Stopped, UserError


def run(work: Work, policy: Workers) -> None:
    """All steps, here and now."""
    from tqdm import tqdm

    # Starting processes takes longer than one slice takes.
    workers = policy.workers or (runtime.cores() if len(work.slices) > 1 else 1)
    for step in work.steps:
        tasks = step.tasks(work)
        left = [task for task in tasks if not step.target(work, task).exists()]
        if len(tasks) > 1 and len(left) < len(tasks):
            runtime.say(f"  {step.name}: {len(tasks) - len(left)} of {len(tasks)} tasks are done already")
        about = {"desc": step.name, "unit": " tasks", "mininterval": 1.0, "leave": False}
        with tqdm(total=len(left), disable=len(left) < 2, **about) as bar:
            if min(workers, len(left)) <= 1:
                for task in left:
                    step.run(work, task)
                    bar.update()
            else:
                in_processes(step, work, left, min(workers, len(left)), bar)


def in_processes(step: Step, work: Work, tasks: list[str], count: int, bar) -> None:
    # Not forked: the tokenizer's and the MinHash library's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, mp_context=context, initializer=settle) as pool:
        try:
            for done in as_completed([pool.submit(step.run, work, task) for task in tasks]):
                done.result()
                bar.update()
        except BrokenProcessPool:
            raise UserError(
                f"a process of the step {step.name} was killed, by the system when memory ran out or by someone; the "
                f"same command goes on, with fewer {work.settings}.workers= or a smaller {work.settings}.slice_mb= it "
                "takes less memory"
            ) from None
        except BaseException:  # a signal, too: what is half done is made again, nobody waits for it
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def settle() -> None:
    """A process of our pool: one thread, and gone when its parent is."""
    one_thread()
    runtime.die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the line above
        raise Stopped("the run that started this process is gone")


def one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"


def with_datatrove(work: Work, policy: Workers) -> None:
    """All steps as datatrove pipelines: here, or submitted to Slurm, where a step's jobs wait for those before."""
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    except ImportError:
        raise UserError(
            f"{work.settings}.executor={policy.executor.value} needs datatrove: pip install -e '.[corpus]'"
        ) from None
    from aquila_sft.data.datatrove_step import DatatroveStep

    before = None
    for step in work.steps:
        # A log folder of a new run: datatrove's marks of what is done would outlive what was done.
        about = {"logging_dir": str(fresh(work.folder / "logs" / step.name)), "skip_completed": False}
        pipeline = [DatatroveStep(step.name, work)]
        if policy.slurm is None:
            tasks = policy.tasks or policy.workers or runtime.cores()
            LocalPipelineExecutor(pipeline, tasks=tasks, workers=policy.workers or runtime.cores(), **about).run()
            continue
        jobs = policy.slurm
        before = SlurmPipelineExecutor(
            pipeline,
            tasks=policy.tasks,
            time=jobs.time,
            partition=jobs.partition,
            cpus_per_task=jobs.cpus_per_task,
            mem_per_cpu_gb=jobs.mem_per_cpu_gb,
            workers=jobs.at_once or -1,
            job_name=f"{work.settings}-{step.name}",
            env_command=jobs.setup,
            sbatch_args=jobs.sbatch,
            depends=before,
            **about,
        )
    if before is not None:
        before.run()  # submits what it depends on first


def fresh(folder: Path) -> Path:
    number = 0
    while (folder / str(number)).exists():
        number += 1
    return folder / str(number)
