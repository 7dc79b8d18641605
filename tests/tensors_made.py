"""What an operation makes on its way, seen from outside."""

import torch
from aquila_kernels import linear_cross_entropy as module
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensors(TorchDispatchMode):
    """Records the size of every tensor that an operation returns, and counts matrix products; inside ours too."""

    ours = {op._opoverload: op._init_fn for op in (module._reduced, module._per_token, module._per_token_backward)}

    def __init__(self):
        super().__init__()
        self.numels, self.num_products = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.ours:
            with self:
                return self.ours[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numels.add(t.numel())
        return out
