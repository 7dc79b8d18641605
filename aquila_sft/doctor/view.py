"""What a run that is only looked at shows, printed line by line, and what is wrong with it, gathered."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from aquila_sft import prerequisites, runtime
from aquila_sft.config.runs import CheckRun, Run
from aquila_sft.doctor import examine
from aquila_sft.doctor.examine import Absent
from aquila_sft.doctor.findings import Finding, error, warning
from aquila_sft.errors import UserError


class View:
    """`run` is looked at as `cfg` wants it."""

    def __init__(self, cfg: CheckRun, run: Run, compose_run: prerequisites.ComposeRun) -> None:
        self.cfg, self.run, self.compose_run = cfg, run, compose_run
        self.findings: list[Finding] = []
        self.before: dict[str, Run] = {}  # the recipes that it takes its inputs from
        self.is_all_here = True

    def say(self, name: str, text: str) -> None:
        runtime.say(f"  {name:<14}{text}")

    def add(self, findings: Iterable[Finding]) -> None:
        self.findings += findings

    def error(self, code: str, text: str) -> None:
        self.findings.append(error(code, text))

    def warning(self, code: str, text: str) -> None:
        self.findings.append(warning(code, text))

    def attempt(self, part: Callable, *given: object) -> object | None:
        """What `part` makes of it; None where something is not here yet, or at fault: then that is a finding."""
        try:
            return part(*given)
        except Absent as absent:
            self.say("not here yet", str(absent))
            self.is_all_here = False
        except UserError as wrong:
            self.error("input", str(wrong))
        return None

    def needs(self) -> None:
        """What the recipes before make is taken where they are finished; what is missing is named, and not made."""
        self.before = examine.needs(self.run, self.compose_run)
        missing = examine.take(self.run, self.before)
        for name, other in self.before.items():
            state = "finished" if name not in missing else "would be built first" if self.run.demo else "not there"
            way = f"; run it first, or give {prerequisites.GIVEN_BY[name]}" if state == "not there" else ""
            self.say("needs", f"recipe={name} -> {other.output_dir}: {state}{way}")

    def directory(self) -> None:
        state, differing = examine.state_of(self.run)
        self.say("run directory", f"{self.run.output_dir}: {state}")
        if differing and not self.run.overwrite:
            self.error(
                "directory-taken",
                f"output_dir={self.run.output_dir} holds a run of another configuration ({'; '.join(differing)}): give "
                "run_name=, or overwrite=true to replace it",
            )

    @property
    def free_disk(self) -> int:
        if self.cfg.machine.disk_gb:
            return int(self.cfg.machine.disk_gb * 1e9)
        here = Path(self.run.output_dir).absolute()
        return shutil.disk_usage(next(path for path in (here, *here.parents) if path.exists())).free
