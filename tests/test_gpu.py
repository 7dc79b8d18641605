"""What only a GPU can show; skipped without one."""

import pytest
import torch
from aquila_kernels import reference
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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])  # eps of either
@pytest.mark.parametrize("hidden", [128, 576, 1003])
def test_rms_norm_on_a_gpu_is_the_reference_in_float64(hidden, dtype, tolerance):
    from aquila_kernels.choice import is_interpreted
    from aquila_kernels.rms_norm import rms_norm

    assert not is_interpreted(), "run with -m gpu: otherwise the kernels are interpreted"
    torch.manual_seed(0)
    given = [torch.randn(999, hidden), torch.randn(hidden), torch.randn(999, hidden)]
    results = []
    for function, device, kind in ((reference.rms_norm, "cpu", torch.float64), (rms_norm, "cuda", dtype)):
        x, weight, dy = (t.to(dtype).to(device, kind) for t in given)
        y = function(x.requires_grad_(), weight.requires_grad_())
        y.backward(dy)
        results.append([t.double().cpu() for t in (y.detach(), x.grad, weight.grad)])
    for exact, ours in zip(*results, strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm()
