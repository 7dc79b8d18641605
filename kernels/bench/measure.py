"""Time and peak memory of one pass of an operation, and what the device can do at best, measured beside it.

On a GPU: CUDA events around each repeat. Before each a buffer much larger than the L2 is written, so that nothing is
read from it that an earlier repeat left there, and the CPU is ahead of the GPU: launches are timed, waiting for them is
not. Peak memory is the allocator's, over one step that is not timed, less what was allocated before it.

On a CPU: one repeat in a process of its own (see run.py). Peak memory is the process's high-water mark less what that
was once the inputs existed. Either contains the gradients.
"""

import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case, Inputs

FLUSH_BYTES = 2**30  # 0.2 ms of an H200
WARM_UPS = 3  # on a GPU, at full size: kernels are compiled and chosen


def passes(step: Callable, inputs: Inputs, case: Case, repeats: int) -> tuple[list[dict], tuple]:
    """A record for each pass, and the results of the first: output and gradients."""
    records, results = [], ()
    for which in case.passes:
        prepare, run = _parts(step, inputs, which)
        measure = _on_gpu if case.device == "cuda" else _on_cpu
        record, (out, gradients) = measure(prepare, run, repeats)
        if not records:
            results = (out, gradients)
        elif case.device == "cpu":
            record["extra_bytes"] = None  # the first pass set the high-water mark
        records.append({"pass": which, **record})
    return records, results


def _parts(step: Callable, inputs: Inputs, which: str) -> tuple[Callable, Callable]:
    """What is done before each repeat, untimed, and what is timed."""

    def fresh():
        if inputs.kept is not None:
            with torch.no_grad():
                inputs.given[0].copy_(inputs.kept)
        return None if inputs.upstream is None else inputs.upstream.clone()

    def gradients(out, upstream):
        return out, torch.autograd.grad(out, inputs.leaves, upstream)

    def forward(_):
        with torch.no_grad():
            return step(*inputs.given), ()

    if which == "forward":
        return fresh, forward
    if which == "backward":  # after a forward of its own, so that what is kept may be used up
        return lambda: (step(*inputs.given), fresh()), lambda state: gradients(*state)
    return fresh, lambda upstream: gradients(step(*inputs.given), upstream)


def _on_gpu(prepare: Callable, run: Callable, repeats: int) -> tuple[dict, tuple]:
    for _ in range(WARM_UPS):
        run(prepare())
    state = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run(state)
    torch.cuda.synchronize()
    extra_bytes = torch.cuda.max_memory_allocated() - before

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        state = prepare()
        flush.zero_()
        start.record()
        run(state)
        end.record()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in events]
    return {"seconds": seconds, "cpu_seconds": [], "extra_bytes": extra_bytes}, result


def _on_cpu(prepare: Callable, run: Callable, repeats: int) -> tuple[dict, tuple]:
    seconds, cpu_seconds, result = [], [], None
    before = high_water_bytes()
    for _ in range(repeats):
        state = prepare()
        began, cpu_began = time.perf_counter(), time.process_time()
        result = run(state)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    extra_bytes = high_water_bytes() - before
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_bytes": extra_bytes}, result


def high_water_bytes() -> int:
    try:  # getrusage's mark is, at first, that of the process which started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ceilings(case: Case, repeats: int) -> dict[str, float]:
    """Bytes a second of a copy and, in the case's dtype, operations a second of a matrix product, medians."""
    like = {"device": case.device, "dtype": case.torch_dtype}
    on_gpu = case.device == "cuda"
    measure = _on_gpu if on_gpu else _on_cpu

    def rate(amount: float, run: Callable) -> float:
        run(None)
        record, _ = measure(lambda: None, run, repeats)
        return amount / statistics.median(record["seconds"])

    source, target = torch.ones(2, 2**30 if on_gpu else 2**27, dtype=torch.int8, device=case.device)
    rates = {"copy": rate(2.0 * source.numel(), lambda _: (target.copy_(source), ()))}
    side = 8192 if on_gpu else 1024
    shapes = {"product_square": (side, side, side)}
    if case.operation == "linear_cross_entropy":
        shapes["product_of_the_head"] = (case.tokens, case.hidden, case.vocab)
    for name, (rows, inner, columns) in shapes.items():
        a, b = torch.randn(rows, inner, **like), torch.randn(columns, inner, **like)
        out = torch.empty(rows, columns, **like)
        rates[name] = rate(2.0 * rows * inner * columns, lambda _, a=a, b=b, out=out: (torch.mm(a, b.T, out=out), ()))
    return rates
