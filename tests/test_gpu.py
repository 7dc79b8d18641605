"""What only a GPU can show; skipped without one."""

import pytest
import torch
from aquila_kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])  # TF32 off; bf16 eps
def test_the_loss_on_a_gpu_is_the_cpus(dtype, tolerance):
    torch.manual_seed(0)
    hidden, weight = torch.randn(257, 72), torch.randn(5003, 72)
    target = torch.randint(0, 5003, (257,))
    target[::3] = -100
    gradients = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        given = [t.to(device, kind).requires_grad_() for t in (hidden, weight)]
        loss = linear_cross_entropy(*given, target.to(device), num_items=100)
        loss.backward()
        gradients.append([loss.double().cpu(), *(g.grad.double().cpu() for g in given)])
    for exact, ours in zip(*gradients, strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm()


def test_the_loss_does_not_wait_for_the_gpu():
    hidden, weight = torch.randn(64, 32, device="cuda", requires_grad=True), torch.randn(1000, 32, device="cuda")
    target = torch.randint(0, 1000, (64,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, target, num_items=torch.tensor(64, device="cuda")).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
