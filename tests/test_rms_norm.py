"""RMSNorm: the Triton kernels through the interpreter, against plain torch in float64."""

import functools

import aquila_kernels.rms_norm
import pytest
import torch
import triton
import triton.language as tl
from aquila_kernels import reference
from aquila_kernels.rms_norm import _rms_norm, _rms_norm_backward, blocks
from triton_interpreter import to_bf16, to_fp32

rms_norm = functools.partial(aquila_kernels.rms_norm.rms_norm, kernel="triton")
DTYPES = [torch.float32, torch.bfloat16]


def inputs(rows, hidden, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(rows, hidden, generator=generator) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(hidden, generator=generator)
    return [t.to(dtype) for t in (x, weight, dy)]


def outcome(function, x, weight, dy, eps=1e-5):
    """(y, dx, dweight) in float64."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = function(x, weight, eps)
    y.backward(dy.to(y.dtype))
    return [t.double() for t in (y.detach(), x.grad, weight.grad)]


def chain(x, weight, eps):
    """As transformers' LlamaRMSNorm computes it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, hidden", [(1, 1), (37, 7), (5, 64), (37, 576), (3, 1003), (2, 5000)])
def test_errors_are_at_most_twice_those_of_the_plain_chain(rows, hidden, dtype):
    x, weight, dy = inputs(rows, hidden, dtype)
    exact = outcome(reference.rms_norm, *(t.double() for t in (x, weight, dy)))
    for ours, plain, true in zip(outcome(rms_norm, x, weight, dy), outcome(chain, x, weight, dy), exact, strict=True):
        size = true.norm()
        allowed = 2 * (plain - true).norm() + 4 * torch.finfo(torch.float32).eps * size
        # one rounding to the dtype is what any result has, however the plain chain's happened to fall
        allowed += torch.finfo(dtype).eps / 2 * size
        assert (ours - true).norm() <= allowed


def test_bf16_is_rounded_to_the_nearest_and_never_used_raw():
    """The correction itself: without it every bf16 figure of this file would be wrong unnoticed."""
    numbers = torch.randn(4096)
    assert torch.equal(torch.from_numpy(to_fp32(to_bf16(numbers.numpy()))), numbers.bfloat16().float())

    @triton.jit
    def product(a_ptr, b_ptr, out_ptr, raw_ptr, RAW: tl.constexpr):
        at = tl.arange(0, 16)
        a = tl.load(a_ptr + at[:, None] * 16 + at[None, :])
        b = tl.load(b_ptr + at[:, None] * 16 + at[None, :])
        tl.store(out_ptr + at[:, None] * 16 + at[None, :], tl.dot(a, b))
        if RAW:
            tl.store(raw_ptr, tl.sum(tl.sum(a, 0), 0))

    a, b, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    product[(1,)](a, b, out, out, RAW=False)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="raise it to fp32 first"):
        product[(1,)](a, b, out, out, RAW=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_given_is_written_to_and_a_second_backward_is_the_first(dtype):
    x, weight, dy = inputs(37, 72, dtype)
    before = [t.clone() for t in (x, weight, dy)]
    leaves = [t.requires_grad_() for t in (x, weight)]
    y = rms_norm(*leaves)
    first = torch.autograd.grad(y, leaves, 3 * dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, 3 * dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, weight, dy), before, strict=True))


def test_three_runs_are_bitwise_alike():
    given = inputs(100, 72, torch.bfloat16)
    runs = [outcome(rms_norm, *given) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x, x])[::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    ],
    ids=["transposed", "columns of a wider one", "every second row", "one row many times", "off by one element"],
)
def test_strides_and_offsets_do_not_matter(view):
    x, weight, dy = inputs(12, 40, torch.bfloat16)
    x, dy = view(x), view(dy)
    given = (x, torch.cat([weight, weight])[::2], dy)
    expected = outcome(rms_norm, *(t.contiguous().clone() for t in given))
    leaf, weight = x.detach().requires_grad_(), given[1].detach().requires_grad_()
    y = rms_norm(leaf, weight)
    got = [t.double() for t in (y.detach(), *torch.autograd.grad(y, (leaf, weight), dy))]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_more_dimensions_no_rows_and_a_frozen_weight():
    x, weight, dy = inputs(24, 40, torch.float32)
    expected = outcome(rms_norm, x, weight, dy)
    got = outcome(rms_norm, x.view(2, 3, 4, 40), weight, dy.view(2, 3, 4, 40))
    assert got[0].shape == (2, 3, 4, 40) and all(
        torch.equal(a.flatten(), b.flatten()) for a, b in zip(got, expected, strict=True)
    )
    y, dx, dweight = outcome(rms_norm, x[:0], weight, dy[:0])
    assert y.shape == dx.shape == (0, 40) and not dweight.any()
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, weight).backward(dy)
    assert weight.grad is None and torch.equal(leaf.grad.double(), expected[1])
    r = torch.ones(24)
    assert _rms_norm_backward(dy, x, weight, r, False)[1].shape == (0,)


def test_nan_stays_in_its_row_and_great_numbers_are_no_trouble():
    x, weight, _ = inputs(8, 40, torch.float32)
    x[3, 5] = torch.nan
    x[4] *= 1e15
    x[5] = 0
    y = rms_norm(x, weight)
    assert y[3].isnan().all() and not y[[0, 1, 2, 4, 5, 6, 7]].isnan().any()
    torch.testing.assert_close(y[4], reference.rms_norm(x[4], weight))
    assert not y[5].any()


def test_fp32_weights_and_bf16_rows_give_what_torch_promotes_them_to():
    x, weight, dy = inputs(6, 40, torch.bfloat16)
    x, weight = x.requires_grad_(), weight.float().requires_grad_()
    y = rms_norm(x, weight)
    assert y.dtype == (weight * x).dtype == torch.float32
    y.backward(dy.float())
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("needs_dweight", [True, False])
def test_the_operators_are_what_torch_expects_of_one(needs_dweight):
    x, weight, dy = inputs(9, 24, torch.float32)
    torch.library.opcheck(_rms_norm, (x.requires_grad_(), weight.requires_grad_(needs_dweight), 1e-5))
    x, weight, r = x.detach(), weight.detach(), torch.ones(9)
    torch.library.opcheck(_rms_norm_backward, (dy, x, weight, r, needs_dweight))


def test_compiled_into_one_graph_it_is_the_same():
    x, weight, dy = inputs(9, 24, torch.float32)
    compiled = torch.compile(lambda x, w, eps: rms_norm(x * 2, w, eps) * 2, fullgraph=True, backend="aot_eager")
    got = outcome(compiled, x, weight, dy)
    expected = outcome(lambda x, w, eps: rms_norm(x * 2, w, eps) * 2, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("hidden", [1, 64, 100, 576, 1536, 4096, 65536])
def test_a_row_is_covered_by_its_two_blocks(hidden):
    launch = blocks(hidden)
    assert launch["HEAD"] <= hidden <= launch["HEAD"] + launch["TAIL"]
    assert launch["HEAD"] + launch["TAIL"] < 2 * hidden or hidden == 1
    assert all(n & (n - 1) == 0 for n in (launch["HEAD"], launch["TAIL"], launch["ROWS"]))


def test_rows_past_two_to_the_31_elements_are_found():
    far = 2**30 + 64  # the third row begins after 2^31 elements; pages that nobody touches cost no memory
    x, dy = (torch.empty(2 * far + 8, dtype=torch.bfloat16).as_strided((3, 8), (far, 1)) for _ in range(2))
    near_x, weight, near_dy = inputs(3, 8, torch.bfloat16)
    x.copy_(near_x), dy.copy_(near_dy)
    assert torch.equal(rms_norm(x, weight), rms_norm(near_x, weight))
    r = torch.ones(3)
    for ours, expected in zip(
        _rms_norm_backward(dy, x, weight, r, True), _rms_norm_backward(near_dy, near_x, weight, r, True), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "x, weight",
    [((3, 4), (5,)), ((3, 4), (1, 4)), ((3, 0), (0,)), ((), (1,))],
    ids=["width", "matrix", "empty", "scalar"],
)
def test_other_shapes_are_refused(x, weight):
    with pytest.raises(ValueError, match="expected x"):
        rms_norm(torch.zeros(x), torch.zeros(weight))


def test_an_eps_that_is_no_number_from_0_on_is_refused():
    for eps in (-1e-5, float("nan")):
        with pytest.raises(ValueError, match=f"eps={eps}; use a small positive number"):
            aquila_kernels.rms_norm.rms_norm(torch.ones(2, 4), torch.ones(4), eps, kernel="torch")


def test_float64_is_refused_by_the_kernel():
    with pytest.raises(ValueError, match="float64"):
        rms_norm(torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4))


def test_left_to_itself_it_is_plain_torch_on_a_cpu_and_compiles_into_one_graph():
    x, weight, dy = inputs(9, 24, torch.float32)
    auto = torch.compile(aquila_kernels.rms_norm.rms_norm, fullgraph=True, backend="aot_eager")
    expected = outcome(reference.rms_norm, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(outcome(auto, x, weight, dy), expected, strict=True))
    with pytest.raises(ValueError, match="kernel='cuda'; use one of auto, triton, torch"):
        aquila_kernels.rms_norm.rms_norm(x, weight, kernel="cuda")
