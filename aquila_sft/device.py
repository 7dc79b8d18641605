"""What this machine can do, and what a run therefore uses: device, kernel, precision, attention, rows at once.

Each choice comes with its reason, in words for the person at the terminal. What was asked for explicitly and is not
possible stops the run; nothing falls back in silence.
"""

import dataclasses
from pathlib import Path

import torch

from aquila_sft import swap
from aquila_sft.attention import BY_DOCUMENT
from aquila_sft.config.model import Attention, KernelChoice, Precision, Train
from aquila_sft.errors import UserError


@dataclasses.dataclass(frozen=True)
class Choices:
    """How a run uses its device. `reasons`: one line for each choice."""

    device: str  # cuda, mps, cpu
    kernel: str  # triton, torch: what computes norms and loss
    precision: Precision  # of the matrix products; weights and optimizer stay fp32
    attention: str  # the transformers name
    reasons: list[str]


def of_this_machine() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose(train: Train, kernel: KernelChoice) -> Choices:
    device = of_this_machine()
    kernel, why_kernel = swap.choose_kernel(kernel, device)
    precision, why_precision = choose_precision(train.precision, device)
    attention, why_attention = choose_attention(train.attention, device, precision)
    return Choices(
        device,
        kernel,
        precision,
        attention,
        [
            f"device {device}"
            + (
                f" ({torch.cuda.get_device_name()})"
                if device == "cuda"
                else f" ({torch.get_num_threads()} threads)"
                if device == "cpu"
                else ""
            ),
            f"kernel {kernel}: {why_kernel}",
            f"precision {precision.value}: {why_precision}",
            f"attention {attention}: {why_attention}",
        ],
    )


def choose_precision(asked: Precision, device: str) -> tuple[Precision, str]:
    """fp16 is not offered: its range needs loss scaling, and a GPU without bf16 is as exact and simpler in fp32."""
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "matrix products in bf16, weights and sums in fp32" if has_bf16 else "this GPU has no bf16"
    elif device == "cpu":
        has_bf16 = bool(bf16_instructions())
        why = (
            f"matrix products in bf16 ({bf16_instructions()}), weights and sums in fp32"
            if has_bf16
            else "this CPU has no bf16 instructions, bf16 would be slower"
        )
    else:
        has_bf16, why = False, "autocast is not used on Apple's MPS"
    if asked is Precision.auto:
        return (Precision.bf16 if has_bf16 else Precision.fp32), why
    if asked is Precision.bf16 and not has_bf16 and device != "cpu":
        raise UserError(f"train.precision=bf16: {why}; use fp32 or auto")
    return asked, "asked for"


def bf16_instructions() -> str:
    """The CPU's bf16 matrix instructions, '' for none."""
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), "")


def choose_attention(asked: Attention, device: str, precision: Precision) -> tuple[str, str]:
    """Packed rows need attention that keeps conversations apart; settle.settle proves it for the one chosen.

    All of these isolate by position_ids. On a CPU a row is cut into its documents (attention.py). On a GPU flash and
    flex attention skip what a conversation cannot see, where sdpa computes and masks it; what that gains was not
    measured (kernels/bench/gpu.py does). Flex attention is compiled by Triton, so it wants a GPU that Triton's kernels
    support. It is compiled again for rows that are one document, for evaluation and for other shapes; after eight
    versions (torch's limit) it would run uncompiled, right but slow.
    """
    from transformers.utils import is_flash_attn_2_available

    has_flash = device == "cuda" and is_flash_attn_2_available()
    if asked is Attention.auto:
        if has_flash and precision is Precision.bf16:
            return "flash_attention_2", "flash-attn is installed, and computes nothing between packed conversations"
        if swap.choose_kernel("auto", device)[0] == "triton":
            return "flex_attention", "skips blocks between packed conversations, compiled for this GPU"
        if device == "cpu":
            return BY_DOCUMENT, "each packed conversation by itself: what it cannot see is not computed"
        return "sdpa", "isolates packed conversations by their positions on every device"
    if asked is Attention.flash_attention_2 and not has_flash:
        raise UserError(
            "train.attention=flash_attention_2: the flash-attn package or a GPU for it is missing; "
            "use train.attention=sdpa"
        )
    if asked is Attention.flash_attention_2 and precision is not Precision.bf16:
        raise UserError("train.attention=flash_attention_2 computes in bf16 alone; use train.attention=sdpa")
    if asked is Attention.flex_attention and device != "cuda":
        raise UserError(f"train.attention=flex_attention has no backward pass on {device}; use train.attention=sdpa")
    return asked.value, "asked for"


def micro_batch_rows(train: Train, rows_per_process: int, device: str, memory_bytes: int | None = None) -> int:
    """Rows of one forward pass: as asked, or the largest divisor of a process's rows that its memory should hold.

    memory_bytes: of an imagined GPU; None: of this machine's.
    """
    if train.micro_batch_rows is not None:
        if rows_per_process % train.micro_batch_rows:
            raise UserError(
                f"train.micro_batch_rows={train.micro_batch_rows} does not divide the {rows_per_process} "
                "rows that one process has in a step (train.tokens_per_step / train.max_length / processes)"
            )
        return train.micro_batch_rows
    # On a CPU more rows only cost memory. On a GPU the activations of Aquila-135M should take some 0.6 MB a token in
    # bf16 (34 x hidden size x layers bytes, an estimate, not measured);
    # 512 tokens per GiB leave a good half of the memory to weights, optimizer and the loss.
    if device == "cuda":
        memory_bytes = memory_bytes or torch.cuda.get_device_properties(0).total_memory
    tokens = 1024 if device != "cuda" else 512 * memory_bytes // 2**30
    limit = max(1, tokens // train.max_length)
    return max(n for n in range(1, min(limit, rows_per_process) + 1) if rows_per_process % n == 0)


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the GPU where there is one, else the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
