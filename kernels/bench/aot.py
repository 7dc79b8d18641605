"""Every kernel that is shipped, compiled for GPUs that need not be there: registers, spills, shared memory, loads,
matrix instructions.

    python kernels/bench/aot.py        # prints a table, writes results/aot.csv; status 1 if a kernel is not fit to ship

A kernel that spills registers, needs more shared memory than the GPU has, loads its rows piece by piece, or multiplies
matrices without the instructions for it is slow, and no test of its results shows it. (No kernel of today multiplies
matrices: the products are the library's.) They are compiled as a launch would compile them: the same constants,
pointers at multiples of 16 bytes, sizes and strides that are multiples of 16 but for an odd vocabulary's.
"""

import argparse
import csv
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from aquila_kernels import cross_entropy, linear_cross_entropy_triton, rms_norm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE = Path(__file__).parent / "results" / "aot.csv"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # a block may have
TYPES = {"fp32": "*fp32", "bf16": "*bf16"}


@dataclasses.dataclass(frozen=True)
class Case:
    kernel: triton.JITFunction
    name: str
    types: dict[str, str]  # argument -> Triton type; all others are constants
    constants: dict[str, int]
    options: dict[str, int]  # of the launch: num_warps, …
    unaligned: tuple[str, ...] = ()  # integers that are no multiple of 16


def cases() -> list[Case]:
    """The shapes of Aquila-135M and of the bundled world, as training meets them."""
    return [*of_rms_norm(), *of_cross_entropy(), *of_target_logit()]


def split(launch: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """A launch's constants, in capitals, and its options."""
    return {k: v for k, v in launch.items() if k.isupper()}, {k: v for k, v in launch.items() if not k.isupper()}


def of_cross_entropy() -> list[Case]:
    """Logits of the head, padded, whose exponentials are written or whose gradient is; logits with an odd stride."""
    numbers = {"num_columns": "i32", "stride": "i32", "ignore_index": "i32", "label_smoothing": "fp32"}
    found = []
    for logits, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        constants, options = split(cross_entropy.launch(dtype))
        rows = {"logits_ptr": TYPES[logits], "target_ptr": "*i64", "target_logit_ptr": "*fp32"}
        forward = rows | dict.fromkeys(("loss_ptr", "offset_ptr", "scale_ptr"), "*fp32") | numbers | {"z_loss": "fp32"}
        backward = rows | dict.fromkeys(("offset_ptr", "scale_ptr", "upstream_ptr"), "*fp32")
        backward |= {"dlogits_ptr": TYPES[logits]} | numbers
        for (name, of_head, writes), smoothing in itertools.product(
            (("head", True, True), ("head, no gradient", True, False), ("odd stride", False, False)), (False, True)
        ):
            name = f"{name} {logits}{' smoothed' if smoothing else ''}"
            kind = constants | {"HAS_TARGET_LOGIT": of_head, "SMOOTHING": smoothing}
            unaligned = ("num_columns", "ignore_index") if of_head else ("num_columns", "ignore_index", "stride")
            if not of_head:  # the target's logit is in its row
                kind |= {"target_logit_ptr": None}
            types = {k: v for k, v in forward.items() if k not in kind}
            kernel = cross_entropy._softmax_rows
            found.append(Case(kernel, name, types, kind | {"WRITE_EXP": writes}, options, unaligned))
            if writes or not of_head:
                types = {k: v for k, v in backward.items() if k not in kind}
                found.append(Case(cross_entropy._gradient_rows, name, types, kind, options, unaligned))
    return found


def of_target_logit() -> list[Case]:
    constants, options = split(linear_cross_entropy_triton._TARGET_LAUNCH)
    found = []
    for kind in ("bf16", "fp32"):
        types = {"x_ptr": TYPES[kind], "weight_ptr": TYPES[kind], "target_ptr": "*i64", "out_ptr": "*fp32"}
        types |= {"num_columns": "i32", "x_stride": "i32"}
        kernel = linear_cross_entropy_triton._target_logit
        found.append(Case(kernel, f"H=576 {kind}", types, constants | {"H": 576}, options, ("num_columns",)))
    return found


def of_rms_norm() -> list[Case]:
    found = []
    for hidden in (576, 128):
        for rows, weights in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
            constants, options = split(rms_norm.blocks(hidden))
            x, weight, result = TYPES[rows], TYPES[weights], "*fp32" if "fp32" in (rows, weights) else "*bf16"
            shape = f"H={hidden} x {rows} weight {weights}"
            forward = {"x_ptr": x, "weight_ptr": weight, "y_ptr": result, "r_ptr": "*fp32"}
            forward |= {"num_rows": "i32", "x_stride": "i32", "eps": "fp32"}
            found.append(Case(rms_norm._forward, shape, forward, constants, options))
            backward = {"dy_ptr": result, "x_ptr": x, "weight_ptr": weight, "r_ptr": "*fp32", "dx_ptr": x}
            backward |= {"dweight_ptr": "*fp32", "num_rows": "i32", "dy_stride": "i32", "x_stride": "i32"}
            for needs_dweight, which in ((True, ""), (False, ", frozen")):
                kind = constants | {"NEEDS_DWEIGHT": needs_dweight}
                found.append(Case(rms_norm._backward, shape + which, backward, kind, options))
    return found


def compiled(case: Case, target: str) -> dict:
    """One row of the table."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in case.unaligned)
    ]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=case.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    kernel = triton.compile(source, target=TARGETS[target], options=case.options)
    measured = of_amd(kernel) if target.startswith("gfx") else of_nvidia(kernel, TARGETS[target].arch)
    return {
        "operation": Path(case.kernel.fn.__code__.co_filename).stem,
        "kernel": case.kernel.fn.__name__.strip("_"),
        "case": case.name,
        "target": target,
        "num_warps": case.options["num_warps"],
        **measured,
        "products": case.kernel.src.count("tl.dot("),
        "shared_bytes": kernel.metadata.shared,
        "triton": triton.__version__,
    }


def of_nvidia(kernel, arch: int) -> dict:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        chip = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
        told = subprocess.run(
            [get_ptxas(arch).path, "-v", f"--gpu-name={chip}", str(path), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", told)[1]),
        "spill_bytes": int(re.search(r"(\d+) bytes spill stores", told)[1]),
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v[48]\.", ptx)),  # 16 bytes a lane
        "narrow_loads": len(re.findall(r"ld\.global[.\w:]*\.[bf](?:8|16)\b", ptx)),
        "matrix_instructions": len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)", ptx)),
    }


def of_amd(kernel) -> dict:
    text = kernel.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        "spill_bytes": 4 * 64 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx[24]", text)),  # 8 or 16 bytes
        "narrow_loads": len(re.findall(r"(?:global|buffer)_load_u?(?:short|byte)", text)),
        "matrix_instructions": len(re.findall(r"\bv_mfma_", text)),
    }


def faults(row: dict) -> list[str]:
    """Why a kernel is not fit to ship; none if it is."""
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes of registers")
    if row["shared_bytes"] > SHARED_BYTES[row["target"]]:
        found.append(f"needs {row['shared_bytes']:,} of {SHARED_BYTES[row['target']]:,} bytes of shared memory")
    if not row["wide_loads"]:
        found.append("loads no 8 or 16 bytes at once")
    if row["products"] and not row["matrix_instructions"]:
        found.append("multiplies matrices without matrix instructions")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE)
    out = parser.parse_args().out
    rows = [compiled(case, target) for case in cases() for target in TARGETS]
    shown = [name for name in rows[0] if name != "triton"]
    print(f"triton {triton.__version__}\n\n| {' | '.join(shown)} |\n|{'---|' * len(shown)}")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in shown)} |")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    unfit = [(row, found) for row in rows if (found := faults(row))]
    for row, found in unfit:
        where = f"{row['operation']} {row['kernel']}, {row['case']}, {row['target']}"
        print(f"error: {where}: {'; '.join(found)}", file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
