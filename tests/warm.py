"""`python train.py …` as a process of its own, without the 9 s of CPU that importing torch and transformers costs it.

One server for each process of the tests imports the libraries (never this project) and forks for each command. A fork
has its own environment, folder, arguments, output and exit status, and is killed like any other process. What a library
reads from the environment while it is imported is the server's: a test of such a variable starts a python of its own.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"
LIBRARIES = ["torch", "transformers", "accelerate", "datasets", "peft", "trl", "hydra", "safetensors.torch"]


class Process:
    """What subprocess.Popen is to another program; stdout and stderr are what was written so far."""

    def __init__(self, words, *, script=TRAIN, cwd=None, env=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self.files = [tempfile.NamedTemporaryFile(prefix="warm-") for _ in range(2)]
        names = [file.name for file in self.files]
        given = (str(script), [str(w) for w in words], str(cwd or os.getcwd()), dict(env or os.environ), *names)
        self.process = context.Process(target=_main, args=given)
        self.process.start()
        self.pid, self.args = self.process.pid, [str(script), *given[1]]

    stdout = property(lambda self: Path(self.files[0].name).read_text("utf-8"))
    stderr = property(lambda self: Path(self.files[1].name).read_text("utf-8"))
    returncode = property(lambda self: self.process.exitcode)

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()
        self.process.join()


def run(words, *, timeout=180, **how) -> subprocess.CompletedProcess:
    """As subprocess.run with captured text."""
    process = Process(words, **how)
    process.wait(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, process.stdout, process.stderr)


def together(*words, script=TRAIN) -> list[Process]:
    """A run of two processes, without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": 2}
    about |= {"OMP_NUM_THREADS": 1, "PYTHONUNBUFFERED": 1}
    envs = [os.environ | {k: str(v) for k, v in (about | {"RANK": i, "LOCAL_RANK": i}).items()} for i in (0, 1)]
    return [Process(words, script=script, env=env) for env in envs]


def ended(both: list[Process]) -> list[Process]:
    """As they are when all is done."""
    assert [process.wait(90) for process in both] == [0, 0], both[0].stderr + both[1].stderr
    return both


def _main(script, words, cwd, env, stdout, stderr):
    for number, name in ((1, stdout), (2, stderr)):
        handle = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *words]
    sys.path[0:0] = [str(Path(script).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(script, run_name="__main__")
