"""linear_cross_entropy's path for a GPU, its kernels through the interpreter and its products by the CPU's library."""

import functools

import aquila_kernels.cross_entropy
import pytest
import tensors_made
import torch
from aquila_kernels import linear_cross_entropy as module
from aquila_kernels import linear_cross_entropy_triton as path
from aquila_kernels import reference
from aquila_kernels.arguments import Terms
from tensors_made import IGNORE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of inf and nan
linear_cross_entropy = functools.partial(module.linear_cross_entropy, kernel="triton")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks at a small vocabulary."""
    monkeypatch.setattr(aquila_kernels.cross_entropy, "launch", lambda dtype: {"BLOCK": 64})
    monkeypatch.setitem(path._TARGET_LAUNCH, "BLOCK", 32)


def seeded(rows=21, hidden=40, vocab=151, *, dtype=torch.float32, **options):
    return tensors_made.seeded(rows, hidden, vocab, dtype=dtype, **options)


def loss_and_grads(*given, **options):
    return [t.double() for t in tensors_made.loss_and_grads(*given, **options)]


def assert_at_most_twice_the_error(ours, plains, exacts, dtype):
    for our, their, exact in zip(ours, plains, exacts, strict=True):
        size = exact.norm().clamp(min=1e-3)
        # the products' sums of H and V terms in fp32, and the one rounding that any result in the dtype has
        allowed = 2 * (their - exact).norm() + 16 * torch.finfo(torch.float32).eps * size
        allowed += torch.finfo(dtype).eps / 2 * size
        assert (our - exact).norm() <= allowed


ROW_BYTES = {torch.float32: 160 * 4, torch.bfloat16: 160 * 2}  # of 151 columns, padded
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-2, "token_weights": torch.linspace(-1, 2, 21)},
    "all, none": {
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "token_weights": torch.linspace(-1, 2, 21),
        "reduction": "none",
    },
    "num_items": {"num_items": torch.tensor([17])},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
@pytest.mark.parametrize("rows_at_once", [None, 5])
def test_errors_are_at_most_twice_those_of_torch(options, rows_at_once, dtype):
    h, w, target = seeded(dtype=dtype)
    budget = None if rows_at_once is None else rows_at_once * ROW_BYTES[dtype]
    upstream = torch.linspace(-1, 3, 21) if options.get("reduction") == "none" else 2.5
    exact = loss_and_grads(reference.linear_cross_entropy, h.double(), w.double(), target, upstream, **options)
    plain = loss_and_grads(reference.linear_cross_entropy, h, w, target, upstream, **options)
    ours = loss_and_grads(linear_cross_entropy, h, w, target, upstream, memory_budget_bytes=budget, **options)
    assert_at_most_twice_the_error(ours, plain, exact, dtype)


@pytest.mark.parametrize("shape", [(0, 8, 5), (1, 1, 1), (1, 8, 7), (3, 8, 16), (37, 24, 131)])
def test_other_shapes_too(shape):
    h, w, target = seeded(*shape, ignored_frac=0)
    exact = loss_and_grads(reference.linear_cross_entropy, h.double(), w.double(), target, reduction="sum")
    plain = loss_and_grads(reference.linear_cross_entropy, h, w, target, reduction="sum")
    ours = loss_and_grads(linear_cross_entropy, h, w, target, reduction="sum")
    assert_at_most_twice_the_error(ours, plain, exact, torch.float32)


def test_rows_are_masked_on_a_device_that_is_not_waited_for():
    """On a CPU rows without a target are left out beforehand; on a GPU the kernels see them."""
    h, w, target = seeded()
    h[target == IGNORE] = 1e4
    upstream, terms = (target != IGNORE) / 17, Terms(IGNORE, 0.1, 1e-3)
    options = {"num_items": 17, "label_smoothing": 0.1, "z_loss": 1e-3}
    want = loss_and_grads(reference.linear_cross_entropy, h.double(), w.double(), target, **options)
    loss, dh, dw = path.losses_and_gradients(h, w, target, upstream, terms, (True, True), None)
    torch.testing.assert_close([(loss.sum() / 17).double(), dh.double(), dw.double()], want, rtol=1e-4, atol=1e-6)
    _, *stats = path.losses(h, w, target, terms, None)
    dh, dw = path.gradients(h, w, target, *stats, upstream, terms, (True, True), None)
    torch.testing.assert_close([dh.double(), dw.double()], want[1:], rtol=1e-4, atol=1e-6)
    target[5] = 2**40
    loss, dh, dw = path.losses_and_gradients(h, w, target, upstream, terms, (True, True), None)
    assert loss[5].isnan() and loss.isnan().sum() == 1 and dh[5].isnan().all() and dh.isnan().any(1).sum() == 1


@pytest.mark.parametrize("reduction, loss", [("sum", 0.0), ("mean", float("nan"))])
@pytest.mark.parametrize("rows", [0, 4])
def test_without_targets_loss_is_0_or_nan_as_in_torch_and_gradients_are_0(rows, reduction, loss):
    h, w, target = seeded(rows, 8, 30, ignored_frac=1.0)
    got, dh, dw = loss_and_grads(linear_cross_entropy, h, w, target, reduction=reduction)
    torch.testing.assert_close(got, torch.tensor(loss).double(), equal_nan=True)
    assert not dh.any() and not dw.any()


def test_a_confident_row_keeps_its_gradient_in_bf16():
    h, w = torch.tensor([[8.0, 0.0]]).bfloat16(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).bfloat16()
    target = torch.tensor([0])
    _, dh, _ = loss_and_grads(linear_cross_entropy, h, w, target)
    _, exact, _ = loss_and_grads(reference.linear_cross_entropy, h.double(), w.double(), target)
    assert (dh - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("distance", [50, 500, 3000])
def test_rows_whose_loss_is_beyond_the_range_of_exponentials_are_right(distance):
    h, w, target = seeded(6, 8, 151, ignored_frac=0)
    h[:, 0], w[:, 0] = 1, 0
    w[140, 0], target[:] = distance, 3
    options = {"reduction": "sum"}
    exact = loss_and_grads(reference.linear_cross_entropy, h.double(), w.double(), target, **options)
    plain = loss_and_grads(reference.linear_cross_entropy, h, w, target, **options)
    ours = loss_and_grads(linear_cross_entropy, h, w, target, **options)
    assert_at_most_twice_the_error(ours, plain, exact, torch.float32)


def test_a_common_offset_of_all_logits_changes_nothing():
    h, w, target = seeded(ignored_frac=0)
    offset = torch.cat([h, torch.full((21, 1), 1e4)], 1), torch.cat([w, torch.ones(151, 1)], 1)
    # logits near 1e4 are rounded to 2^-10 in fp32
    torch.testing.assert_close(
        linear_cross_entropy(*offset, target), linear_cross_entropy(h, w, target), rtol=0, atol=2**-9
    )


def test_the_loss_does_not_see_rounded_logits_of_its_targets():
    """Every token is its own target and certain: plain bf16 logits near 30 are off by up to 0.06."""
    h, w, target = seeded(8, 40, 151, dtype=torch.bfloat16, ignored_frac=0)
    w[target] += 4 * h / h.float().norm(dim=1, keepdim=True)
    exact = reference.linear_cross_entropy(h.double(), w.double(), target, reduction="none")
    ours = linear_cross_entropy(h, w, target, reduction="none").double()
    plain = reference.linear_cross_entropy(h, w, target, reduction="none").double()
    assert (ours - exact).norm() < 0.5 * (plain - exact).norm()


def test_the_weights_gradient_has_no_bias_on_rare_rows_however_many_chunks():
    """Sums in bf16 lose what is small beside them: a slope below or above 1, not noise."""
    rng = torch.Generator().manual_seed(0)
    rows, hidden, vocab = 256, 16, 64
    h = torch.randn(rows, hidden, generator=rng).bfloat16()
    w = (torch.randn(vocab, hidden, generator=rng) * 0.3).bfloat16()
    target = torch.randint(0, 8, (rows,), generator=rng)  # 56 of the rows of w are never a target
    target[::3] = IGNORE  # 170 targets: 1 / N is no number of bf16
    exact = loss_and_grads(reference.linear_cross_entropy, h.double(), w.double(), target)[2][8:]
    plain = loss_and_grads(reference.linear_cross_entropy, h, w, target)[2][8:]
    ours = loss_and_grads(linear_cross_entropy, h, w, target, memory_budget_bytes=8 * 64 * 2)[2][8:]

    def slope(of):
        return ((of * exact).sum() / (exact * exact).sum() - 1).abs()

    assert slope(ours) <= 2 * slope(plain) + 2**-10
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_given_is_written_to_and_a_second_backward_is_the_first(reduction):
    h, w, target = seeded(dtype=torch.bfloat16)
    before = [t.clone() for t in (h, w, target)]
    leaves = h.requires_grad_(), w.requires_grad_()
    loss = (linear_cross_entropy(h, w, target, reduction=reduction) * 3).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, kept)) and all(map(torch.equal, first, second))
    assert all(map(torch.equal, (h, w, target), before))


def test_three_runs_are_bitwise_alike():
    given = seeded(dtype=torch.bfloat16)
    runs = [loss_and_grads(linear_cross_entropy, *given, memory_budget_bytes=4000) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_input_costs_no_product(frozen, reduction, monkeypatch):
    h, w, target = seeded()
    _, dh, dw = loss_and_grads(linear_cross_entropy, h, w, target, reduction="sum")
    products = []
    product = path._product
    monkeypatch.setattr(path, "_product", lambda out, *a, **k: products.append(out.shape) or product(out, *a, **k))
    h.requires_grad_(frozen != "hidden"), w.requires_grad_(frozen != "weight")
    linear_cross_entropy(h, w, target, reduction=reduction).sum().backward()
    assert len(products) == 1
    kept, want = (w.grad, dw) if frozen == "hidden" else (h.grad, dh)
    torch.testing.assert_close(kept.double(), want, rtol=1e-5, atol=1e-6)
    assert (h if frozen == "hidden" else w).grad is None


def test_an_even_weight_in_the_products_dtype_is_not_copied_and_an_odd_one_ends_in_zeros():
    even = torch.randn(32, 8)
    assert path._padded(even, torch.float32) is even
    odd = path._padded(torch.randn(33, 8), torch.bfloat16)
    assert odd.shape == (48, 8) and odd.dtype == torch.bfloat16 and not odd[33:].any()


def test_chunks_fill_the_budget_and_are_at_least_4096_rows_without_one():
    row_bytes = 151_856 * 2
    assert path.rows_within(None, row_bytes) == 7040
    assert path.rows_within(None, 2 * row_bytes) == 4096
    assert path.rows_within(5 * 2**30, row_bytes) == 17_664
    assert path.rows_within(row_bytes * 100, row_bytes) == 100
    assert path.rows_within(1, row_bytes) == 0
    x, weight = torch.randn(300, 4), torch.randn(16, 4)
    seen = []
    for rows, logits in path._chunks(x, weight, 260 * 64):
        torch.testing.assert_close(logits, x[rows] @ weight.T)
        seen.append((rows.start, rows.stop))
    assert seen == [(0, 256), (256, 300)]
    assert [rows for rows, _ in path._chunks(x[:5], weight, 1)] == [slice(i, i + 1) for i in range(5)]
    assert list(path._chunks(x[:0], weight, None)) == []


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_operators_are_what_torch_expects_of_one(reduction):
    h, w, target = seeded(4, 8, 40)
    ones, terms, how = (target != IGNORE).float(), (IGNORE, 0.1, 1e-3), (False, torch.float32, None, "triton")
    given = h.requires_grad_(), w.requires_grad_(), target
    if reduction == "sum":
        torch.library.opcheck(module._reduced, (*given, ones, ones, ones.sum(), *terms, *how, True, True))
    else:
        torch.library.opcheck(module._per_token, (*given, *terms, *how))


def test_compiled_into_one_graph_it_is_the_same():
    h, w, target = seeded(9, 8, 40)

    def head(h, w, target):
        return linear_cross_entropy(h * 2, w, target, z_loss=1e-3) * 2

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    got, want = (loss_and_grads(f, h, w, target) for f in (compiled, head))
    assert all(map(torch.equal, got, want))


def test_strided_inputs_match_contiguous_ones():
    h, w, target = seeded()
    want = loss_and_grads(linear_cross_entropy, h, w, target)
    h_strided = h.T.contiguous().T.requires_grad_()
    w_strided = torch.cat([w, w], 1)[:, : w.shape[1]].requires_grad_()
    loss = linear_cross_entropy(h_strided, w_strided, torch.stack([target, target], 1)[:, 0])
    got = [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (h_strided, w_strided)))]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_log_probs_are_the_references_and_autocast_sets_the_products():
    h, w, target = seeded()
    got = module.linear_log_probs(h, w, target, kernel="triton")
    want = reference.linear_log_probs(h.double(), w.double(), target)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_bf16 = loss_and_grads(linear_cross_entropy, h, w, target)
    asked = loss_and_grads(linear_cross_entropy, h, w, target, compute_dtype=torch.bfloat16)
    assert all(map(torch.equal, in_bf16, asked))


def test_float64_is_refused_by_the_kernels():
    h, w, target = seeded(dtype=torch.float64)
    with pytest.raises(ValueError, match="float64 has no Triton kernel"):
        linear_cross_entropy(h, w, target)
