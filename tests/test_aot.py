"""The Triton kernels compile for GPUs that are not here, and fit them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels/bench"))
KEY = ("operation", "kernel", "case", "target")


def table(path):
    with open(path, newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_every_kernel_fits_and_the_table_that_is_kept_is_todays(tmp_path):
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernels/bench/aot.py"), "--out", str(tmp_path / "aot.csv")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    kept, made = table(ROOT / "kernels/bench/results/aot.csv"), table(tmp_path / "aot.csv")
    assert kept.keys() == made.keys()
    for key, row in made.items():
        assert kept[key] == row or kept[key]["triton"] != row["triton"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 70_000}, "70,000 of 65,536 bytes"),
        ({"wide_loads": 0}, "16 bytes at once"),
        ({"products": 1}, "without matrix instructions"),
    ],
)
def test_a_kernel_that_does_not_fit_is_named(change, said):
    import aot

    row = {
        "target": "gfx942",
        "spill_bytes": 0,
        "shared_bytes": 65_536,
        "wide_loads": 1,
        "products": 0,
        "matrix_instructions": 0,
    }
    assert aot.faults(row) == []
    assert [said in fault for fault in aot.faults(row | change)] == [True]


@pytest.mark.slow
def test_a_kernel_that_multiplies_matrices_is_seen_to_do_so(tmp_path):
    """No kernel that is shipped has products: the instrument is shown one that does."""
    (tmp_path / "product.py").write_text(PRODUCT)
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "kernels/bench"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "product.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "True"] * 4


PRODUCT = """
import aot, triton, triton.language as tl

@triton.jit
def product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))

types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
for target in aot.TARGETS:
    row = aot.compiled(aot.Case(product, "", types, {"N": 64}, {"num_warps": 4}), target)
    print(row["products"], row["matrix_instructions"] > 0)
"""
