"""Where the time of a training step goes, on a CPU: any command whose loop is a transformers Trainer's.

    python recipes/study/where_time_goes.py --steps 2 -- train.py recipe=sft …
    python recipes/study/where_time_goes.py --steps 2 -- <site-packages>/trl/scripts/sft.py --packing true …

torch.profiler watches from the end of step 1 to the end of step 1 + `steps`: data, forward, backward, optimizer, log.
The self time of every operation goes to the part of the step that its callers, its name or its shapes tell; what
is nobody's is Python between operations. Nothing is evaluated or saved afterwards: the process ends.
"""

import argparse
import collections
import os
import runpy
import sys
import time
from pathlib import Path

import torch
from transformers.trainer_callback import CallbackHandler

CALLERS = {  # first match from the operation outwards
    "head and loss": ("linear_cross_entropy", "ChunkedLogProb", "IndexPutBackward"),
    "optimizer, clipping": ("Optimizer.", "_foreach_norm", "_foreach_mul", "_fused_adam", "linalg_vector_norm"),
    "data": ("DataLoader",),
    "attention itself": ("scaled_dot_product", "ScaledDotProduct"),
    "embedding": ("aten::embedding", "EmbeddingBackward"),
    "gradients added up": ("AccumulateGrad",),
}


def part(event, intermediate: int) -> str:
    chain = []
    caller = event
    while caller is not None:
        chain.append(caller.name)
        caller = caller.cpu_parent
    for name, marks in CALLERS.items():
        if any(mark in link for link in chain for mark in marks):
            return name
    shapes = [shape for shape in event.input_shapes or () if isinstance(shape, (list, tuple)) and shape]
    is_product = event.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")
    is_wide = any(intermediate in shape for shape in shapes)
    if is_product:
        return "products of the MLP" if is_wide else "products of q, k, v, o"
    if any("to_copy" in link or link == "aten::copy_" for link in chain):
        return "casts and copies"
    if any(len(shape) > 1 and shape[-1] == shape[-2] > 64 for shape in shapes):
        return "attention mask"
    if is_wide:
        return "activation of the MLP"
    return "norms, rope, residuals, rest" if event.name.startswith("aten::") else "autograd engine"


class Watch:
    """In place of CallbackHandler.on_step_end, whose `self` it is handed."""

    def __init__(self, steps: int) -> None:
        self.steps, self.on_step_end = steps, CallbackHandler.on_step_end
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)

    def __call__(self, handler, args, state, control):
        if state.global_step == 1:
            self.profiler.start()
            self.began, self.began_cpu = time.perf_counter(), time.process_time()
        elif state.global_step == 1 + self.steps:
            seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.began_cpu
            self.profiler.stop()
            self.report(seconds, cpu, handler.model.config.get_text_config().intermediate_size)
            os._exit(0)
        return self.on_step_end(handler, args, state, control)

    def report(self, seconds: float, cpu: float, intermediate: int) -> None:
        of_parts, counts, ops = collections.Counter(), collections.Counter(), collections.Counter()
        for event in self.profiler.events():
            name = part(event, intermediate)
            of_parts[name] += event.self_cpu_time_total / 1e6
            ops[name, event.name] += event.self_cpu_time_total / 1e6
            counts[name] += 1
        of_parts["Python between operations"] = seconds - of_parts.total()
        print(f"\n{seconds / self.steps:.2f} s a step ({cpu / self.steps:.2f} s of CPU), {self.steps} step(s)\n")
        print("| part | share | s a step | operations a step | the largest |\n|---|---|---|---|---|")
        for name, spent in of_parts.most_common():
            largest = [
                f"{op[1].removeprefix('aten::')} {s / spent:.0%}" for op, s in ops.most_common() if op[0] == name
            ]
            told = f"| {name} | {spent / seconds:.1%} | {spent / self.steps:.3f} | {counts[name] // self.steps:,} |"
            print(f"{told} {', '.join(largest[:3])} |")
        sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("command", nargs="+", help="a script and its words")
    args = parser.parse_args()
    watch = Watch(args.steps)
    CallbackHandler.on_step_end = lambda *given: watch(*given)
    sys.argv = args.command
    sys.path.insert(0, str(Path(args.command[0]).parent.absolute()))
    runpy.run_path(args.command[0], run_name="__main__")
