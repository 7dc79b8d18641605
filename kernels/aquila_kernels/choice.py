"""Which code an operation runs: Triton's kernels where there is a GPU for them, plain torch elsewhere, or as asked."""

import functools
import importlib.util

import torch

KERNELS = ("auto", "triton", "torch")


@torch.compiler.assume_constant_result
def pick_kernel(asked: str, device: torch.device) -> str:
    """'triton' or 'torch' for tensors on `device`; ValueError where 'triton' is asked for and cannot run."""
    if asked not in KERNELS:
        raise ValueError(f"kernel={asked!r}; use one of {', '.join(KERNELS)}.")
    if asked == "torch":
        return "torch"
    missing = why_not_triton(device)
    if asked == "triton" and missing and not is_interpreted():
        raise ValueError(f"kernel='triton': {missing}; use kernel='auto' or 'torch'.")
    return "torch" if missing and asked == "auto" else "triton"


@functools.lru_cache
def why_not_triton(device: torch.device) -> str:
    """Why Triton's kernels cannot run on `device`; '' where they can: Nvidia from Ampere on, and AMD under ROCm."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":  # what torch calls AMD's GPUs too
        return f"Triton's kernels need a GPU, and the tensors are on {device.type}"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"Triton's kernels need an Ampere GPU or later, and {device} has compute capability {capability}"
    return ""


def is_interpreted() -> bool:
    """Triton's interpreter runs the kernels on a CPU, slowly, for tests; then 'triton' may be asked for there."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
