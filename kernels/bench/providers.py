"""Who is timed: for each operation the implementations there are, how each is called, and why one cannot be here.

    ours              as it comes; ours-1GB: with that memory_budget_bytes
    eager             plain torch, as Transformers writes it: what the ratios are to
    compiled          torch.compile of that
    torch             torch's own operation: F.linear_cross_entropy with its chunking options, F.rms_norm
    liger, quack, cce, trl, flaggems        as they come
    …-large           with chunks of 4,096 tokens
    cce-exact         no gradient filtered away, sums in fp32

A maker gets the case and returns the function to call with the case's inputs. It imports what it needs, no earlier.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import EPS, IGNORE, OPERATIONS, Case

Check = Callable[[Case], str]

LARGE_CHUNK = 4096  # tokens
BUDGETS_GB = (0.5, 1, 2, 5)
PROVIDERS: dict[str, dict[str, "Provider"]] = {operation: {} for operation in OPERATIONS}
LIBRARIES = {  # provider -> its distribution; each has a row in every operation, and torch's are torch's
    "ours": "aquila-sft",
    "eager": "torch",
    "compiled": "torch",
    "torch": "torch",
    "liger": "liger-kernel",
    "cce": "cut-cross-entropy",
    "trl": "trl",
    "quack": "quack-kernels",
    "flaggems": "flag-gems",
}


@dataclasses.dataclass(frozen=True)
class Provider:
    make: Callable[[Case], Callable]
    checks: tuple[Check, ...]


def names(operation: str) -> list[str]:
    """All that have a row in this operation, in the order of the table."""
    known = list(PROVIDERS[operation])
    return known + [name for name in LIBRARIES if name not in known]


def why_not(name: str, case: Case) -> str:
    """'' where the provider can be asked for this case."""
    if name not in PROVIDERS[case.operation]:
        return f"has no {case.operation}"
    return next((why for check in PROVIDERS[case.operation][name].checks if (why := check(case))), "")


def version(name: str) -> str:
    try:
        return importlib.metadata.version(LIBRARIES[name.split("-")[0]])
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---- checks ----


def has(module: str, why: str = "not installed") -> Check:
    def check(case: Case) -> str:
        package = module.split(".")[0]
        return "" if importlib.util.find_spec(package) and importlib.util.find_spec(module) else why

    return check


def on_gpu(case: Case) -> str:
    return "" if case.device == "cuda" else "needs a GPU"


def on_hopper(case: Case) -> str:
    if case.device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0):
        return ""
    return "needs a GPU of compute capability 9.0 or later"


def in_bf16(case: Case) -> str:
    return "" if case.dtype == "bfloat16" else f"its backward takes bfloat16, not {case.dtype}"


def vocab_by_8(case: Case) -> str:
    return f"the vocabulary, {case.vocab}, is not a multiple of 8" if case.vocab % 8 else ""


def compiled_elsewhere(case: Case) -> str:
    # a CPU step is the first of its process
    return "" if case.device == "cuda" else "needs a GPU: on a CPU its compilation would be timed"


def of_torch(name: str) -> Check:
    return lambda case: "" if hasattr(torch.nn, name) else f"torch {torch.__version__} has none"


def provider(operation: str, name: str, *checks: Check) -> Callable:
    def register(make: Callable[[Case], Callable]) -> Callable[[Case], Callable]:
        PROVIDERS[operation][name] = Provider(make, checks)
        return make

    return register


# ---- linear_cross_entropy: (hidden, weight, target) -> mean loss ----


def plain_head(hidden, weight, target):
    return F.cross_entropy((hidden @ weight.T).float(), target, ignore_index=IGNORE)


def our_head(case: Case, **options) -> Callable:
    from aquila_kernels.linear_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, ignore_index=IGNORE, **options)


provider("linear_cross_entropy", "ours")(our_head)
for gb in BUDGETS_GB:
    provider("linear_cross_entropy", f"ours-{gb:g}GB", on_gpu)(
        functools.partial(our_head, memory_budget_bytes=int(gb * 1e9))
    )


@provider("linear_cross_entropy", "eager")
def _(case):
    return plain_head


@provider("linear_cross_entropy", "compiled", compiled_elsewhere)
def _(case):
    return torch.compile(plain_head, dynamic=False)


def torchs_head(case: Case, **options) -> Callable:
    # without options F.linear_cross_entropy is the plain computation
    options = torch.nn.LinearCrossEntropyOptions(**options)
    return functools.partial(F.linear_cross_entropy, ignore_index=IGNORE, options=options)


provider("linear_cross_entropy", "torch", of_torch("LinearCrossEntropyOptions"))(torchs_head)
provider("linear_cross_entropy", "torch-large", of_torch("LinearCrossEntropyOptions"))(
    functools.partial(torchs_head, batch_chunk_size=LARGE_CHUNK)
)


def ligers_head(case: Case, **options) -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return functools.partial(liger_fused_linear_cross_entropy, ignore_index=IGNORE, **options)


provider("linear_cross_entropy", "liger", has("liger_kernel"), on_gpu)(ligers_head)


@provider("linear_cross_entropy", "liger-large", has("liger_kernel"), on_gpu)
def _(case):
    # its chunk is tokens * chunk_mem_const * hidden / vocabulary, raised to a power of two
    return ligers_head(case, chunk_mem_const=-(-case.vocab * LARGE_CHUNK // (case.tokens * case.hidden)))


def cces_head(case: Case, **options) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, ignore_index=IGNORE, **options)


provider("linear_cross_entropy", "cce", has("cut_cross_entropy"), on_gpu, in_bf16)(cces_head)


@provider("linear_cross_entropy", "cce-exact", has("cut_cross_entropy"), on_gpu, in_bf16)
def _(case):
    # 25.1.1 has no presets: there the filter can be turned off, and the sums stay in bf16
    exact = {"impl": "cce_exact"} if importlib.util.find_spec("cut_cross_entropy.cce_utils") else {"filter_eps": None}
    return cces_head(case, **exact)


@provider("linear_cross_entropy", "trl", has("trl"))
def _(case):
    from trl.kernels import ChunkedLogProbFunction

    def head(hidden, weight, target):  # as its trainers call it, tiles of 32,768 columns and all
        has_target = target != IGNORE
        if hidden.is_cuda:
            hidden, target = hidden[has_target], target[has_target]
        log_probs = ChunkedLogProbFunction.apply(
            hidden, weight, None, target.clamp(min=0), 1.0, 32_768, None, 1.0, ("log_probs",)
        )[0]
        if not hidden.is_cuda:
            log_probs = log_probs.masked_fill(~has_target, 0)
        return -log_probs.sum() / has_target.sum().clamp(min=1)

    return head


@provider("linear_cross_entropy", "quack", has("quack"), on_hopper, vocab_by_8)
def _(case):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return functools.partial(chunked_linear_cross_entropy, ignore_index=IGNORE)


# ---- cross_entropy: (logits, target) -> mean loss ----


def plain_loss(logits, target):
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE)


@provider("cross_entropy", "ours", has("aquila_kernels.cross_entropy", "not in this version"))
def _(case):
    from aquila_kernels.cross_entropy import cross_entropy

    return functools.partial(cross_entropy, ignore_index=IGNORE)


@provider("cross_entropy", "eager")
def _(case):
    return plain_loss


@provider("cross_entropy", "compiled", compiled_elsewhere)
def _(case):
    return torch.compile(plain_loss, dynamic=False)


@provider("cross_entropy", "torch")
def _(case):
    return functools.partial(F.cross_entropy, ignore_index=IGNORE)


@provider("cross_entropy", "liger", has("liger_kernel"), on_gpu)
def _(case):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return functools.partial(liger_cross_entropy, ignore_index=IGNORE)


@provider("cross_entropy", "quack", has("quack"), on_hopper, vocab_by_8)
def _(case):
    from quack.cross_entropy import cross_entropy

    return functools.partial(cross_entropy, ignore_index=IGNORE)


@provider("cross_entropy", "flaggems", has("flag_gems"), on_gpu)
def _(case):
    from flag_gems.fused import cross_entropy_loss

    return functools.partial(cross_entropy_loss, ignore_index=IGNORE)


# ---- rms_norm: (x, weight) -> y ----


def plain_norm(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


@provider("rms_norm", "ours", has("aquila_kernels.rms_norm", "not in this version"))
def _(case):
    from aquila_kernels.rms_norm import rms_norm

    return functools.partial(rms_norm, eps=EPS)


@provider("rms_norm", "eager")
def _(case):
    return plain_norm


@provider("rms_norm", "compiled", compiled_elsewhere)
def _(case):
    return torch.compile(plain_norm, dynamic=False)


@provider("rms_norm", "torch")
def _(case):
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)


@provider("rms_norm", "liger", has("liger_kernel"), on_gpu)
def _(case):
    from liger_kernel.transformers.functional import liger_rms_norm

    return functools.partial(liger_rms_norm, eps=EPS)


@provider("rms_norm", "quack", has("quack"), on_hopper)
def _(case):
    from quack.rmsnorm import rmsnorm

    return functools.partial(rmsnorm, eps=EPS)


@provider("rms_norm", "flaggems", has("flag_gems"), on_gpu)
def _(case):
    from flag_gems.ops import rms_norm

    return lambda x, weight: rms_norm(x, list(weight.shape), weight, EPS)
