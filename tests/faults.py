"""One-line faults that a person could make here, planted one by one in a copy: which of them does the suite catch?

    python tests/faults.py              all of tests/faults/*.patch, and the score
    python tests/faults.py mask-inverted labels-not-shifted

A patch begins with what the fault does and which test files should find it. They run against the untouched copy first:
a test that fails anyhow catches nothing. A fault that no named test finds has survived.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_name("faults")
ENOUGH = 0.95  # of the faults are to be caught
LIMIT_S = 900  # for the tests of one fault: one that hangs a test is caught too


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    tests: tuple[str, ...]
    patch: Path

    @classmethod
    def read(cls, patch: Path) -> "Fault":
        about = dict(line.split(": ", 1) for line in patch.read_text("utf-8").splitlines()[:2])
        return cls(patch.stem, about["what"], tuple(about["tests"].split()), patch)

    def applied(self, copy: Path, *how: str) -> None:
        subprocess.run(["git", "apply", *how, self.patch], cwd=copy, check=True, capture_output=True)


def copy_of(root: Path, folder: Path) -> Path:
    """The project's own files; the patches are applied to them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


def first_failure(copy: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails in the copy, None when all pass."""
    paths = [copy, copy / "kernels"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "--no-header"]
    try:
        done = subprocess.run([*command, *tests], cwd=copy, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"a test that took more than {LIMIT_S} s"
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"pytest ended with {done.returncode} in {copy}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="faults; none: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults tried at the same time")
    asked = parser.parse_args()
    faults = [Fault.read(patch) for patch in sorted(FAULTS.glob("*.patch"))]
    if unknown := set(asked.names) - {fault.name for fault in faults}:
        parser.error(f"no fault {', '.join(sorted(unknown))} in {FAULTS}")
    faults = [fault for fault in faults if not asked.names or fault.name in asked.names]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copies = [copy_of(ROOT, Path(folder) / str(job)) for job in range(asked.jobs)]
        tests = sorted({test for fault in faults for test in fault.tests})
        print(f"{len(faults)} faults, {len(tests)} files of tests; these run without a fault first", flush=True)
        with ThreadPoolExecutor(asked.jobs) as pool:
            parts = [tuple(tests[job :: asked.jobs]) for job in range(asked.jobs)]
            if failed := [name for name in pool.map(first_failure, copies, parts) if name]:
                print(f"error: {', '.join(failed)} fails without any fault", file=sys.stderr)
                return 2

            def tried(fault: Fault) -> tuple[Fault, str | None]:
                copy, began = copies.pop(), time.monotonic()
                fault.applied(copy)
                try:
                    found = first_failure(copy, fault.tests)
                finally:
                    fault.applied(copy, "--reverse")
                    copies.append(copy)
                told = f"caught by {found}" if found else "SURVIVED"
                print(f"{fault.name}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
                return fault, found

            results = list(pool.map(tried, faults))
    print("\n| fault | what it does | caught by |\n|---|---|---|")
    for fault, found in results:
        print(f"| {fault.name} | {fault.what} | {found or '**nothing**'} |")
    caught = sum(found is not None for _, found in results)
    print(f"\n{caught} of {len(results)} faults caught ({caught / len(results):.0%})")
    return 0 if caught >= ENOUGH * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
