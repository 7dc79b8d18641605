"""linear_cross_entropy and linear_log_probs against the plain-torch specification, called in fp64."""

import pytest
import tensors_made
import torch
from aquila_kernels import linear_cross_entropy as module
from aquila_kernels import linear_cross_entropy_torch, reference
from aquila_kernels.arguments import Terms
from aquila_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from tensors_made import IGNORE, LargestTensors, loss_and_grads

# N tokens, H hidden, V vocabulary: one row; one column; ragged.
SHAPES = [(1, 8, 7), (5, 3, 1), (7, 64, 300), (33, 72, 1001), (130, 16, 4097)]
SMALL_BUDGET = 50_000  # bytes: many chunks of tokens and tiles of the vocabulary at the larger shapes


@pytest.fixture(autouse=True)
def cpu_that_multiplies_bf16(monkeypatch):
    """Whatever machine this is; the substitute for one that does not has a test of its own."""
    monkeypatch.setattr(linear_cross_entropy_torch, "_cpu_has_bf16", lambda: True)


def seeded(rows=33, hidden=72, vocab=1001, *, dtype=torch.float64, **options):
    return tensors_made.seeded(rows, hidden, vocab, dtype=dtype, **options)


def assert_equal_to_rounding(got, want, eps):
    """The largest error is within `eps` of the largest entry (entries of one gradient share a scale)."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        error, scale = (a.double() - b.double()).nan_to_num().abs(), b.double().nan_to_num().abs()
        assert error.numel() == 0 or error.max() <= eps * scale.max()


# fp64 sums of up to 4097 terms; fp32 logits up to ~30, whose rounding (2e-6) is a relative error of exp.
@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored_frac", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_match_the_reference(shape, ignored_frac, reduction, dtype, eps):
    h, w, target = seeded(*shape, dtype=dtype, ignored_frac=ignored_frac)
    h64, w64 = h.double(), w.double()
    exact = loss_and_grads(reference.linear_cross_entropy, h64, w64, target, reduction=reduction)
    for budget in (None, SMALL_BUDGET):
        ours = loss_and_grads(linear_cross_entropy, h, w, target, reduction=reduction, memory_budget_bytes=budget)
        assert [t.dtype for t in ours] == [dtype] * 3
        assert_equal_to_rounding(ours, exact, eps)


def test_a_budget_below_one_logit_means_one_token_and_one_column_at_a_time():
    h, w, target = seeded(7, 8, 100)
    got = loss_and_grads(linear_cross_entropy, h, w, target, memory_budget_bytes=1)
    assert_equal_to_rounding(got, loss_and_grads(reference.linear_cross_entropy, h, w, target), 1e-13)


def test_gradients_are_the_derivative_of_the_loss():
    h, w, target = seeded(5, 4, 11)
    h, w = h.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, target, num_items=3), (h, w))


@pytest.mark.parametrize("reduction, loss", [("sum", 0.0), ("mean", float("nan"))])
@pytest.mark.parametrize("rows", [0, 4])
def test_without_targets_loss_is_0_or_nan_as_in_torch_and_gradients_are_0(rows, reduction, loss):
    h, w, target = seeded(rows, 8, 30, dtype=torch.float32, ignored_frac=1.0)
    got, dh, dw = loss_and_grads(linear_cross_entropy, h, w, target, reduction=reduction)
    want = torch.nn.functional.cross_entropy(h @ w.T, target, reduction=reduction)
    torch.testing.assert_close(got, torch.tensor(loss), equal_nan=True)
    torch.testing.assert_close(want, torch.tensor(loss), equal_nan=True)
    assert torch.equal(dh, torch.zeros_like(h)) and torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize("num_items", [17, torch.tensor(17), torch.tensor([17.0])])
def test_num_items_replaces_the_count_of_targets(num_items):
    h, w, target = seeded()
    want = loss_and_grads(reference.linear_cross_entropy, h, w, target, reduction="sum", upstream=1 / 17)
    for reduction in ("mean", "sum"):
        loss, *grads = loss_and_grads(linear_cross_entropy, h, w, target, reduction=reduction, num_items=num_items)
        assert loss.shape == ()
        assert_equal_to_rounding((loss * 17, *grads), want, 1e-13)


def test_two_micro_batches_with_the_same_num_items_sum_to_the_whole():
    h, w, target = seeded()
    num_items = (target != IGNORE).sum()
    loss, dh, dw = loss_and_grads(linear_cross_entropy, h, w, target)
    halves = [
        loss_and_grads(linear_cross_entropy, h[rows], w, target[rows], num_items=num_items)
        for rows in (slice(0, 10), slice(10, None))
    ]
    summed = halves[0][0] + halves[1][0], torch.cat([halves[0][1], halves[1][1]]), halves[0][2] + halves[1][2]
    assert_equal_to_rounding(summed, (loss, dh, dw), 1e-14)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_confident_tokens_lose_no_more_in_fp32_than_in_torch(reduction):
    """p - 1 of a token whose logits are large: from exp(z - lse) it would be off by half a digit of lse."""
    h, w, target = seeded(64, 32, 200, dtype=torch.float32, ignored_frac=0)
    w *= 32**0.5
    h = w[target] * (4 / 32**0.5) + 0.1 * h.sign()
    outcomes = []
    for loss_fn, kind in (
        (linear_cross_entropy, torch.float32),
        (reference.linear_cross_entropy, torch.float32),
        (reference.linear_cross_entropy, torch.float64),
    ):
        summed = lambda *given, f=loss_fn: f(*given, reduction=reduction).sum()  # noqa: E731
        outcomes.append(loss_and_grads(summed, h.to(kind), w.to(kind), target))
    for ours, plain, exact in zip(*outcomes, strict=True):
        assert (ours.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_smoothing_works_whatever_the_products_are_in(given):
    h, w, target = seeded(dtype=given)
    options = {"label_smoothing": 0.1}
    got = linear_cross_entropy(h, w, target, compute_dtype=torch.float64, **options)
    want = reference.linear_cross_entropy(h.double(), w.double(), target, **options)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_no_worse_than_the_plain_bf16_loss(shape):
    h, w, target = seeded(*shape, dtype=torch.bfloat16)
    exact = loss_and_grads(reference.linear_cross_entropy, h.double(), w.double(), target, reduction="sum")
    plain = loss_and_grads(reference.linear_cross_entropy, h, w, target, reduction="sum")
    for budget in (None, SMALL_BUDGET):
        ours = loss_and_grads(linear_cross_entropy, h, w, target, reduction="sum", memory_budget_bytes=budget)
        assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
        for a, b, e in zip(ours, plain, exact, strict=True):
            # Both round logits, dlogits and the result to bf16; how the errors fall differs by a rounding.
            assert (a.double() - e).norm() <= (b.double() - e).norm() + 2**-8 * e.norm()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_cpu_without_bf16_products_multiplies_in_fp32_and_rounds_each_gradient_once(monkeypatch, reduction):
    monkeypatch.setattr(linear_cross_entropy_torch, "_cpu_has_bf16", lambda: False)
    h, w, target = seeded(dtype=torch.bfloat16)

    def summed(*inputs):
        return linear_cross_entropy(*inputs, reduction=reduction).sum()

    loss, *gradients = loss_and_grads(summed, h, w, target, upstream=0.3)
    exact_loss, *exact = loss_and_grads(
        reference.linear_cross_entropy, h.double(), w.double(), target, 0.3, reduction="sum"
    )
    assert loss.dtype == torch.float32
    assert abs(loss - exact_loss) <= 1e-6 * exact_loss
    for got, want in zip(gradients, exact, strict=True):
        assert got.dtype == torch.bfloat16
        # half a last place of bf16 of each entry, and what fp32 sums of entries of all sizes lose
        assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-6 * want.abs().max()).all()


@pytest.mark.parametrize("upstream", [1.0, 0.3, -1.7])
def test_bf16_gradients_are_rounded_once_whatever_the_upstream_gradient(upstream):
    h, w, target = seeded(dtype=torch.bfloat16)
    got = loss_and_grads(linear_cross_entropy, h, w, target, upstream, compute_dtype=torch.float32)
    in_fp32 = loss_and_grads(linear_cross_entropy, h.float(), w.float(), target, upstream)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(got[1:], in_fp32[1:], strict=True))


def test_autocast_sets_the_dtype_of_the_products_and_compute_dtype_overrides_it():
    h, w, target = seeded(dtype=torch.float32)
    in_bf16 = loss_and_grads(linear_cross_entropy, h, w, target, compute_dtype=torch.bfloat16)
    in_fp32 = loss_and_grads(linear_cross_entropy, h, w, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # backward runs inside as well
        by_autocast = loss_and_grads(linear_cross_entropy, h, w, target)
        overridden = loss_and_grads(linear_cross_entropy, h, w, target, compute_dtype=torch.float32)
    assert [t.dtype for t in by_autocast] == [torch.float32] * 3
    assert all(map(torch.equal, by_autocast, in_bf16))
    assert all(map(torch.equal, overridden, in_fp32))
    assert not torch.equal(in_bf16[0], in_fp32[0])


def test_bf16_products_keep_the_gradient_of_a_confident_row():
    # p is within 1e-3 of 1: bf16(p) - 1 would be 0 or -2**-9, and the row's gradient wrong or gone.
    h, w = torch.tensor([[8.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    target = torch.tensor([0])
    _, dh, _ = loss_and_grads(linear_cross_entropy, h, w, target, compute_dtype=torch.bfloat16)
    _, exact, _ = loss_and_grads(reference.linear_cross_entropy, h.double(), w.double(), target)
    assert (dh - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_a_common_offset_of_all_logits_changes_nothing():
    h, w, target = seeded(dtype=torch.float32, ignored_frac=0)
    offset = torch.cat([h, torch.full((33, 1), 1e4)], 1), torch.cat([w, torch.ones(1001, 1)], 1)
    loss = linear_cross_entropy(*offset, target)
    # Logits near 1e4 are rounded to 2**-10 in fp32.
    torch.testing.assert_close(loss, linear_cross_entropy(h, w, target), rtol=0, atol=2**-9)


def test_great_logits_have_a_loss_though_their_square_has_none():
    h, w, target = seeded(dtype=torch.float32)
    got = linear_cross_entropy(h * 1e30, w, target)
    want = reference.linear_cross_entropy(h.double() * 1e30, w.double(), target)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 2**18])
def test_no_tensor_has_the_size_of_the_logits(dtype, budget):
    rows, hidden, vocab = 512, 8, 3001  # far fewer hidden than rows, so that weight's gradient is small too
    h, w, target = seeded(rows, hidden, vocab, dtype=dtype, ignored_frac=0)
    with LargestTensors() as plain:
        loss_and_grads(reference.linear_cross_entropy, h, w, target)
    assert max(plain.numels) == rows * vocab  # the instrument sees the logits where they exist
    with LargestTensors() as ours:
        loss_and_grads(linear_cross_entropy, h, w, target, memory_budget_bytes=budget)
        with torch.no_grad():
            linear_cross_entropy(h, w, target, memory_budget_bytes=budget)
        linear_log_probs(h, w, target, memory_budget_bytes=budget)
    # Unless told otherwise half of the logits at most; told, no more than the budget (inputs are smaller).
    assert max(ours.numels) <= (rows // 2 * vocab if budget is None else budget // dtype.itemsize)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_gradient(frozen):
    h, w, target = seeded(dtype=torch.float32)
    _, dh, dw = loss_and_grads(linear_cross_entropy, h, w, target)
    h.requires_grad_(frozen != "hidden"), w.requires_grad_(frozen != "weight")
    with LargestTensors() as ours:
        linear_cross_entropy(h, w, target).backward()
    num_tiles = 2 * 3  # two halves of the tokens; 448 + 448 + 105 columns
    assert ours.num_products == 2 * num_tiles  # the logits and one gradient
    if frozen == "hidden":
        assert h.grad is None and torch.equal(w.grad, dw)
    else:
        assert w.grad is None and torch.equal(h.grad, dh)
        assert w.numel() not in ours.numels


def test_only_rows_with_a_target_are_computed_on_cpu():
    h, w, target = seeded(rows=200, hidden=4, ignored_frac=0.8, dtype=torch.float32)
    num_targets = int((target != IGNORE).sum())
    with LargestTensors() as ours:
        loss_and_grads(linear_cross_entropy, h, w, target)
    assert max(ours.numels) == (num_targets + 1) // 2 * 1001  # the logits of half of them


@pytest.mark.parametrize("ignored_frac", [0.4, 1.0])
def test_computing_all_rows_and_masking_as_other_devices_do_gives_the_same(ignored_frac):
    h, w, target = seeded(ignored_frac=ignored_frac)
    upstream, terms = (target != IGNORE).double() / 17, Terms(IGNORE, 0.1, 1e-3)
    loss, *grads = linear_cross_entropy_torch.losses_and_gradients(h, w, target, upstream, terms, (True, True), None)
    options = {"num_items": 17, "label_smoothing": 0.1, "z_loss": 1e-3}
    want = loss_and_grads(linear_cross_entropy, h, w, target, **options)
    assert_equal_to_rounding((loss.sum() / 17, *grads), want, 1e-13)
    target[3] = 1001  # cannot be refused without waiting for the device
    loss, *_ = linear_cross_entropy_torch.losses(h, w, target, terms, None)
    assert loss[3].isnan() and loss.isnan().sum() == 1


def test_nothing_is_saved_without_gradients_and_only_the_gradients_with_them():
    h, w, target = seeded(ignored_frac=0, dtype=torch.float32)
    h.requires_grad_(), w.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            loss = linear_cross_entropy(h, w, target)
        assert loss.grad_fn is None and not saved
        linear_cross_entropy(h, w, target)
    assert [t.shape for t in saved] == [h.shape, w.shape]


@pytest.mark.parametrize("upstream", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_gives_the_same_gradients_and_writes_to_no_input(dtype, upstream):
    h, w, target = seeded(dtype=dtype)
    h.requires_grad_(), w.requires_grad_()
    num_items, before = torch.tensor(5), [t.detach().clone() for t in (h, w, target)]
    loss = linear_cross_entropy(h, w, target, num_items=num_items) * upstream
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (h, w))
    assert all(map(torch.equal, first, kept)) and all(map(torch.equal, first, second))
    assert all(map(torch.equal, (h, w, target), before)) and num_items == 5


def test_a_gradient_that_nothing_scales_is_handed_on_without_a_copy_and_may_still_be_added_to():
    h, w, target = seeded(dtype=torch.float32)
    h.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(h, w, target)
    (first,), (second,) = (torch.autograd.grad(loss, w, retain_graph=True) for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    kept = first.clone()
    for times in (1, 2, 3):  # .grad is added to in place: not what is kept for the next backward
        loss.backward(retain_graph=times < 3)
        assert torch.allclose(w.grad, times * kept, rtol=1e-6, atol=0)


def test_several_upstream_gradients_at_once_are_mapped_over():
    h, w, target = seeded(dtype=torch.float32)
    loss = linear_cross_entropy(h.requires_grad_(), w, target)
    (one,) = torch.autograd.grad(loss, h, retain_graph=True)
    (both,) = torch.autograd.grad(loss, h, torch.tensor([1.0, 3.0]), is_grads_batched=True)
    assert torch.equal(both, torch.stack([one, 3 * one]))


@pytest.mark.parametrize("upstream", [-2.5, 0.0, 1e-3])
def test_upstream_gradient_scales_both_gradients(upstream):
    h, w, target = seeded()
    ours = loss_and_grads(linear_cross_entropy, h, w, target, upstream=upstream)
    exact = loss_and_grads(reference.linear_cross_entropy, h, w, target, upstream=upstream)
    assert_equal_to_rounding(ours, exact, 1e-13)


def test_a_weight_tied_to_the_embedding_gets_both_gradients():
    _, w, target = seeded()
    tokens = torch.randint(0, len(w), (33,), generator=torch.Generator().manual_seed(1))
    grads = []
    for loss_fn in (linear_cross_entropy, reference.linear_cross_entropy):
        tied = w.clone().requires_grad_()
        loss_fn(torch.nn.functional.embedding(tokens, tied).tanh(), tied, target).backward()
        grads.append(tied.grad)
    assert_equal_to_rounding(grads[:1], grads[1:], 1e-13)


def test_strided_inputs_match_contiguous_ones():
    h, w, target = seeded()
    want = loss_and_grads(linear_cross_entropy, h, w, target)
    h_strided = h.T.contiguous().T.requires_grad_()
    w_strided = torch.cat([w, w], 1)[:, : w.shape[1]].requires_grad_()
    loss = linear_cross_entropy(h_strided, w_strided, torch.stack([target, target], 1)[:, 0])
    got = loss.detach(), *torch.autograd.grad(loss, (h_strided, w_strided))
    assert_equal_to_rounding(got, want, 1e-13)


def test_ignore_index_may_be_a_token_id():
    h, w, target = seeded(ignored_frac=0)
    target[::3] = 5
    got = loss_and_grads(linear_cross_entropy, h, w, target, ignore_index=5)
    assert_equal_to_rounding(got, loss_and_grads(reference.linear_cross_entropy, h, w, target, ignore_index=5), 1e-13)


@pytest.mark.parametrize("value", [-1, 1001, -101])
@pytest.mark.parametrize("loss_fn", [linear_cross_entropy, linear_log_probs])
def test_an_out_of_range_target_is_named_with_its_position(loss_fn, value):
    h, w, target = seeded()
    target[20] = value
    with pytest.raises(ValueError, match=rf"target\[20\]={value} .*\[0, 1001\).*-100"):
        loss_fn(h, w, target)


def test_arguments_that_cannot_be_meant_are_refused():
    h, w, target = seeded()
    with pytest.raises(ValueError, match="reduction='average'; use 'mean', 'sum' or 'none'"):
        linear_cross_entropy(h, w, target, reduction="average")
    with pytest.raises(ValueError, match="memory_budget_bytes=0; use an integer from 1"):
        linear_cross_entropy(h, w, target, memory_budget_bytes=0)
    with pytest.raises(ValueError, match="memory_budget_bytes=1.5; use an integer"):
        linear_cross_entropy(h, w, target, memory_budget_bytes=1.5)
    with pytest.raises(ValueError, match="ignore_index=None; use an integer"):
        linear_cross_entropy(h, w, target, ignore_index=None)
    for num_items in (0, -3, float("nan")):
        for given in (num_items, torch.tensor(num_items)):
            with pytest.raises(ValueError, match=f"num_items={num_items}; use the number of targets"):
                linear_cross_entropy(h, w, target, num_items=given)
    with pytest.raises(ValueError, match="num_items is a count and gets no gradient"):
        linear_cross_entropy(h, w, target, num_items=torch.tensor(7.0, requires_grad=True))
    with pytest.raises(ValueError, match="hidden is torch.float16; use float32 or bfloat16"):
        linear_cross_entropy(h.half(), w, target)
    with pytest.raises(ValueError, match=r"token_weights, a tensor \[33\], got list"):
        linear_cross_entropy(h, w, target, token_weights=[1.0] * 33)
    with pytest.raises(ValueError, match="weight is torch.int64; use float32 or bfloat16"):
        linear_cross_entropy(h, w.long(), target)
    with pytest.raises(ValueError, match="z_loss=nan"):
        linear_cross_entropy(h, w, target, z_loss=float("nan"))
    with pytest.raises(ValueError, match="num_items has 2 elements"):
        linear_cross_entropy(h, w, target, num_items=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="label_smoothing=1.5"):
        linear_cross_entropy(h, w, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"token_weights, a tensor \[33\], got \(32,\)"):
        linear_cross_entropy(h, w, target, token_weights=torch.ones(32))
    with pytest.raises(ValueError, match="reduction='none', or detach"):
        linear_cross_entropy(h, w, target, token_weights=torch.ones(33, requires_grad=True))
    with pytest.raises(ValueError, match="compute_dtype=torch.float16"):
        linear_cross_entropy(h, w, target, compute_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"target int64 \[33\], got torch.int32"):
        linear_cross_entropy(h, w, target.int())
    with pytest.raises(ValueError, match=r"\(33, 72\) and \(1001, 71\)"):
        linear_cross_entropy(h, w[:, 1:], target)


OPTIONS = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "token_weights": torch.linspace(-1, 2, 33)},
    {"token_weights": torch.linspace(0, 2, 33), "num_items": 7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_mean_what_the_reference_says(options, reduction):
    h, w, target = seeded()
    options = options | {"reduction": reduction}
    upstream = torch.linspace(-1, 3, 33, dtype=torch.float64) if reduction == "none" else torch.tensor(1.0)

    def reduced(loss_fn, h, w, target):  # each row its own upstream gradient
        return (loss_fn(h, w, target, **options) * upstream).sum()

    got, want = (
        loss_and_grads(lambda *a, loss_fn=loss_fn: reduced(loss_fn, *a), h, w, target)
        for loss_fn in (linear_cross_entropy, reference.linear_cross_entropy)
    )
    assert_equal_to_rounding(got, want, 1e-12)


def test_the_reference_smooths_as_torch_does_and_weighs_as_its_definition():
    h, w, target = seeded()
    logits, smooth = h @ w.T, {"label_smoothing": 0.2, "ignore_index": IGNORE}
    want = torch.nn.functional.cross_entropy(logits, target, **smooth)
    torch.testing.assert_close(reference.cross_entropy(logits, target, **smooth), want)
    is_target, weights = target != IGNORE, torch.rand(33, dtype=torch.float64)
    lse = logits.logsumexp(1)
    each = lse - logits[torch.arange(33), target.clamp(min=0)] + 0.01 * lse**2
    want = (each * weights)[is_target].sum() / weights[is_target].sum()
    torch.testing.assert_close(reference.cross_entropy(logits, target, z_loss=0.01, token_weights=weights), want)


def test_per_token_losses_hold_no_gradient_and_no_logits():
    h, w, target = seeded(512, 8, 3001, dtype=torch.float32)
    h.requires_grad_(), w.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with LargestTensors() as forward:
            loss = linear_cross_entropy(h, w, target, reduction="none", memory_budget_bytes=2**18)
    assert loss.shape == (512,) and (loss[target == IGNORE] == 0).all()
    assert max(t.numel() for t in saved) == w.numel()  # what was given, and numbers a token
    with LargestTensors() as backward:
        loss.sum().backward()
    assert max(forward.numels | backward.numels) <= 2**18 // 4


def test_per_token_gradients_of_a_frozen_input_are_not_computed_and_backward_may_run_again():
    h, w, target = seeded(dtype=torch.float32)
    _, dh, _ = loss_and_grads(linear_cross_entropy, h, w, target, reduction="sum")
    loss = linear_cross_entropy(h.requires_grad_(), w, target, reduction="none").sum()
    with LargestTensors() as ours:
        loss.backward(retain_graph=True)
    assert ours.num_products == 2 * 3 and w.numel() not in ours.numels  # tiles: the logits and one gradient
    assert_equal_to_rounding([h.grad], [dh], 1e-5)
    first = h.grad.clone()
    loss.backward()
    assert torch.equal(h.grad, 2 * first)


def test_targets_are_checked_where_asked_even_if_no_loss_is_reduced():
    h, w, target = seeded()
    target[20] = 1001
    for check in (True, False):  # on a CPU always
        with pytest.raises(ValueError, match=r"target\[20\]=1001"):
            linear_cross_entropy(h, w, target, reduction="none", check_targets=check)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_operators_are_what_torch_expects_of_one(reduction):
    h, w, target = seeded(6, 8, 40, dtype=torch.float32)
    ones, terms, how = (target != IGNORE).float(), (IGNORE, 0.1, 1e-3), (False, torch.float32, None, "torch")
    for needs in ((True, True), (True, False)):
        given = h.requires_grad_(needs[0]), w.requires_grad_(needs[1]), target
        if reduction == "sum":
            torch.library.opcheck(module._reduced, (*given, ones, ones, ones.sum(), *terms, *how, *needs))
        else:
            torch.library.opcheck(module._per_token, (*given, *terms, *how))
            stats = [t.detach() for t in module._per_token(*given, *terms, *how)[1:]]
            given = ones, h.detach(), w.detach(), target, *stats, *terms, *how[1:], *needs
            torch.library.opcheck(module._per_token_backward, given)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_into_one_graph_it_is_the_same(reduction):
    h, w, target = seeded(9, 8, 40, dtype=torch.float32)

    def head(h, w, target):
        return linear_cross_entropy(h * 2, w, target, reduction=reduction, label_smoothing=0.1).sum() * 2

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    got, want = (loss_and_grads(f, h, w, target) for f in (compiled, head))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_of_a_gradient_is_refused(reduction):
    h, w, target = seeded()
    h, w = h.requires_grad_(), w.requires_grad_()
    # the upstream gradient is a constant in the first, not in the second: both would go wrong in silence
    for upstream in (torch.tensor(1.0, dtype=h.dtype), h.sum()):
        with pytest.raises(RuntimeError, match="no gradient of its own; leave create_graph|not implemented|autograd"):
            loss = linear_cross_entropy(h, w, target, reduction=reduction).sum()
            (dh,) = torch.autograd.grad(loss * upstream, h, create_graph=True)
            dh.square().sum().backward()


def test_tensors_on_different_devices_are_refused_and_on_meta_nothing_is_computed():
    h, w, target = seeded(dtype=torch.float32)
    with pytest.raises(ValueError, match="hidden is on cpu, weight on meta and target on cpu; they have to be on one"):
        linear_cross_entropy(h, w.to("meta"), target)
    on_meta = [t.to("meta") for t in (h, w, target)]
    assert linear_cross_entropy(*on_meta).device.type == "meta"
    assert linear_cross_entropy(*on_meta, reduction="none").shape == target.shape


def test_a_sharded_weight_is_refused():
    h, w, target = seeded()
    w.full_tensor = lambda: w  # as a DTensor has it
    with pytest.raises(ValueError, match="weight is sharded over processes"):
        linear_cross_entropy(h, w, target)


@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8, 30)])
def test_log_probs_match_the_reference_and_are_0_where_ignored(shape, dtype, eps):
    h, w, target = seeded(*shape, dtype=dtype)
    got = linear_log_probs(h.requires_grad_(), w, target, memory_budget_bytes=SMALL_BUDGET)
    assert got.dtype == dtype and not got.requires_grad
    want = reference.linear_log_probs(h.detach().double(), w.double(), target)
    assert_equal_to_rounding([got], [want], eps)
    assert (got[target == IGNORE] == 0).all()


def test_log_probs_of_bf16_inputs_are_fp32():
    h, w, target = seeded(dtype=torch.bfloat16)
    assert linear_log_probs(h, w, target).dtype == torch.float32
