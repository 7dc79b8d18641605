"""What only a GPU can show; skipped without one."""

import pytest
import torch
from aquila_kernels import reference
from aquila_kernels.cross_entropy import cross_entropy
from aquila_kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])  # TF32 off; bf16 eps
@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab", [5003, 5008])  # an odd one is padded
def test_the_loss_on_a_gpu_is_the_references_in_float64(vocab, reduction, kernel, dtype, tolerance):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1257, 72), torch.randn(vocab, 72) / 8
    target = torch.randint(0, vocab, (1257,))
    target[::3] = -100
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": reduction}
    budget = 512 * vocab * dtype.itemsize  # three chunks
    outcomes = []
    for function, device, kind, more in (
        (reference.linear_cross_entropy, "cpu", torch.float64, {}),
        (linear_cross_entropy, "cuda", dtype, {"kernel": kernel, "memory_budget_bytes": budget}),
    ):
        given = [t.to(dtype).to(device, kind).requires_grad_() for t in (hidden, weight)]
        loss = function(*given, target.to(device), **options, **more).sum()
        loss.backward()
        outcomes.append([loss.detach().double().cpu(), *(g.grad.double().cpu() for g in given)])
    for exact, ours in zip(*outcomes, strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm()


def test_rows_past_two_to_the_31_logits_have_their_gradient():
    """14,200 rows of 151,851: all at once in one chunk, the last of them alone as the expectation."""
    torch.manual_seed(0)
    hidden = torch.randn(14_200, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(151_851, 64, device="cuda", dtype=torch.bfloat16) / 8
    target = torch.randint(0, 151_851, (14_200,), device="cuda")
    last = slice(-100, None)
    grads, losses = [], []
    for rows in (slice(None), last):
        h = hidden[rows].clone().requires_grad_()
        linear_cross_entropy(h, weight, target[rows], reduction="sum", memory_budget_bytes=5 * 2**30).backward()
        grads.append(h.grad[last].float())
        losses.append(
            cross_entropy((hidden[rows].detach() @ weight.T), target[rows], reduction="none", kernel="triton")[last]
        )
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab", [1003, 1008])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])  # eps of either
def test_cross_entropy_of_logits_on_a_gpu_is_the_references_in_float64(vocab, dtype, tolerance):
    torch.manual_seed(0)
    logits, target = (torch.randn(999, vocab) * 5).to(dtype), torch.randint(0, vocab, (999,))
    logits[::7, 5] += 300  # rows that change their offset on the way
    target[::3] = -100
    outcomes = []
    for function, device, kind in ((reference.cross_entropy, "cpu", torch.float64), (cross_entropy, "cuda", dtype)):
        given = logits.to(device, kind).requires_grad_()
        loss = function(given, target.to(device), label_smoothing=0.1)
        loss.backward()
        outcomes.append([loss.detach().double().cpu(), given.grad.double().cpu()])
    for exact, ours in zip(*outcomes, strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_the_loss_does_not_wait_for_the_gpu_and_a_target_outside_makes_it_nan(kernel):
    hidden, weight = torch.randn(64, 32, device="cuda", requires_grad=True), torch.randn(1000, 32, device="cuda")
    target = torch.randint(0, 1000, (64,), device="cuda")
    num_items = torch.tensor(64, device="cuda")
    linear_cross_entropy(hidden, weight, target, kernel=kernel).backward()  # compiles, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, target, num_items=num_items, kernel=kernel).backward()
        outside = target.index_fill(0, num_items - 60, 1000)
        losses = [
            linear_cross_entropy(hidden.detach(), weight, outside, kernel=kernel),
            cross_entropy(hidden.detach() @ weight.T, outside, kernel=kernel),
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isnan() for loss in losses)
    with pytest.raises(ValueError, match=r"target\[4\]=1000"):
        linear_cross_entropy(hidden, weight, outside, check_targets=True, kernel=kernel)


def test_forward_and_backward_are_captured_in_a_graph_and_replayed():
    weight = torch.randn(1003, 32, device="cuda", requires_grad=True)
    hidden, target = torch.randn(64, 32, device="cuda"), torch.randint(0, 1003, (64,), device="cuda")
    weight.grad = torch.zeros_like(weight)

    def step():
        weight.grad.zero_()
        loss = linear_cross_entropy(hidden, weight, target, kernel="triton")
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    captured = loss.clone(), weight.grad.clone()
    expected = step().detach(), weight.grad
    assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_three_runs_on_a_gpu_are_bitwise_alike(kernel):
    torch.manual_seed(0)
    hidden = torch.randn(1000, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5003, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 5003, (1000,), device="cuda")
    runs = []
    for _ in range(3):
        loss = linear_cross_entropy(hidden, weight, target, kernel=kernel, memory_budget_bytes=2**22)
        runs.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


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


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_a_swapped_model_on_a_gpu_agrees_with_the_stock_one_and_isolates(attention):
    from transformers import MistralConfig, MistralForCausalLM

    from aquila_sft import settle, swap

    sizes = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    config = MistralConfig(num_hidden_layers=2, vocab_size=5003, attn_implementation=attention, **sizes)
    model = MistralForCausalLM(config).cuda()
    swap.install(model, "triton", asked=True)
    for enabled in (False, True):
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=enabled)
        assert settle.settle(model, "cuda", autocast, asked=True) == attention
