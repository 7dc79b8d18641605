"""cross_entropy of logits: the Triton kernels through the interpreter, and plain torch, against float64."""

import functools

import aquila_kernels.cross_entropy as module
import pytest
import torch
import torch.nn.functional as F
from aquila_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of inf and nan
IGNORE = -100
BLOCK = 64  # columns at a time: several blocks at a small vocabulary, and whole and broken ones
cross_entropy = functools.partial(module.cross_entropy, kernel="triton")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "launch", lambda dtype: {"BLOCK": BLOCK})


def seeded(rows=12, vocab=151, dtype=torch.float32, ignored_frac=0.3, seed=0):
    """Flat and peaked rows: logits have standard deviations from 0.1 to 8 over the rows."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=rng) * torch.linspace(0.1, 8, rows)[:, None]
    target = torch.randint(0, vocab, (rows,), generator=rng)
    target[torch.rand(rows, generator=rng) < ignored_frac] = IGNORE
    return logits.to(dtype), target


def loss_and_grad(loss_fn, logits, target, upstream=1.0, **options):
    logits = logits.detach().requires_grad_()
    loss = loss_fn(logits, target, **options)
    (loss * upstream).sum().backward()
    return loss.detach().double(), logits.grad.double()


def plain(logits, target, **options):
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE, **options)


def assert_at_most_twice_the_error(ours, plains, exacts, dtype):
    for our, their, exact in zip(ours, plains, exacts, strict=True):
        size = exact.norm().clamp(min=1)  # what a gradient is the difference of
        allowed = 2 * (their - exact).norm() + 4 * torch.finfo(torch.float32).eps * size
        allowed += torch.finfo(dtype).eps / 2 * size  # the one rounding that any result in the dtype has
        assert (our - exact).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "none"}])
@pytest.mark.parametrize("rows, vocab", [(0, 5), (1, 1), (1, 7), (37, 64), (5, 151), (2, 1003)])
def test_errors_are_at_most_twice_those_of_torch(rows, vocab, options, dtype):
    logits, target = seeded(rows, vocab, dtype, ignored_frac=0.3 if rows > 1 else 0)
    exact = loss_and_grad(reference.cross_entropy, logits.double(), target, 3.0, **options)
    theirs = loss_and_grad(plain, logits, target, 3.0, **options)
    ours = loss_and_grad(cross_entropy, logits, target, 3.0, **options)
    if rows == 0 and options.get("reduction", "mean") == "mean":
        assert ours[0].isnan() and theirs[0].isnan()
    else:
        assert_at_most_twice_the_error(ours, theirs, exact, dtype)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_together_mean_what_the_reference_says(reduction, kernel):
    logits, target = seeded()
    weights = torch.linspace(-1, 2, 12)
    options = {"reduction": reduction, "label_smoothing": 0.3, "z_loss": 1e-2}
    upstream = torch.linspace(-1, 3, 12, dtype=torch.float64) if reduction == "none" else 2.0
    outcomes = []
    for function, given in ((cross_entropy, logits), (reference.cross_entropy, logits.double())):
        how = {"kernel": kernel} if function is cross_entropy else {}
        leaf = weights.to(given.dtype, copy=True).requires_grad_()
        told = loss_and_grad(function, given, target, upstream, token_weights=leaf, **options, **how)
        outcomes.append((*told, leaf.grad.double()))
    for ours, exact in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("num_items", [17, torch.tensor(17), torch.tensor([17.0])])
def test_num_items_replaces_the_count_of_targets(num_items):
    logits, target = seeded()
    for reduction in ("mean", "sum"):
        loss, grad = loss_and_grad(cross_entropy, logits, target, reduction=reduction, num_items=num_items)
        want, want_grad = loss_and_grad(reference.cross_entropy, logits.double(), target, reduction="sum")
        torch.testing.assert_close(loss * 17, want, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad * 17, want_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction, loss", [("sum", 0.0), ("mean", float("nan"))])
def test_without_targets_the_loss_is_0_or_nan_and_the_gradient_0(reduction, loss):
    logits, target = seeded(ignored_frac=1.0)
    logits[3] = torch.nan  # nothing of an ignored row is used
    got, grad = loss_and_grad(cross_entropy, logits, target, reduction=reduction)
    torch.testing.assert_close(got, torch.tensor(loss).double(), equal_nan=True)
    assert not grad.any()


def test_a_common_offset_changes_nothing():
    logits, target = seeded()
    logits = logits.round(decimals=1).double().float()
    far = logits + 1e4
    exact = loss_and_grad(reference.cross_entropy, far.double(), target, reduction="sum")
    theirs = loss_and_grad(plain, far, target, reduction="sum")
    ours = loss_and_grad(cross_entropy, far, target, reduction="sum")
    assert_at_most_twice_the_error(ours, theirs, exact, torch.float32)


@pytest.mark.parametrize("where", [2, 70, 150])  # the first block, a later one, the broken one
def test_rows_beyond_the_range_of_exponentials_are_exact(where):
    logits, target = seeded(ignored_frac=0)
    target[:] = 40
    logits[::2, where] += 500  # nats above the target
    logits[1::2] -= 300
    logits[5, 40] += 400  # the target far above all
    exact = loss_and_grad(reference.cross_entropy, logits.double(), target, reduction="none")
    theirs = loss_and_grad(plain, logits, target, reduction="none")
    ours = loss_and_grad(cross_entropy, logits, target, reduction="none")
    assert_at_most_twice_the_error(ours, theirs, exact, torch.float32)


def test_logits_of_minus_infinity_have_no_probability():
    logits, target = seeded(rows=4, ignored_frac=0)
    target[:] = 100
    logits[0, :99] = -torch.inf  # all of the first block
    logits[1, 101:] = -torch.inf
    logits[2, 100] = -torch.inf  # the target: an infinite loss
    logits[3] = -torch.inf  # nothing left: no distribution
    ours = loss_and_grad(cross_entropy, logits, target, reduction="none")
    theirs = loss_and_grad(plain, logits, target, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert ours[0][2].isinf() and ours[0][3].isnan()


def test_great_logits_have_a_loss_though_their_square_has_none():
    logits, target = seeded(ignored_frac=0)
    exact = loss_and_grad(reference.cross_entropy, logits.double() * 1e30, target, reduction="sum")
    ours = loss_and_grad(cross_entropy, logits * 1e30, target, reduction="sum")
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 40, 150])
def test_nan_and_infinity_make_their_row_nan_and_no_other(value, column):
    logits, target = seeded(ignored_frac=0)
    target[:] = 40
    logits[7, column] = value
    loss, grad = loss_and_grad(cross_entropy, logits, target, reduction="none")
    others = torch.arange(12) != 7
    assert loss[7].isnan() and grad[7].isnan().any()
    assert not loss[others].isnan().any() and not grad[others].isnan().any()


@pytest.mark.parametrize("outside", [-1, 151, 2**40, -(2**40)])
def test_a_target_outside_is_refused_or_makes_the_loss_nan_without_a_stray_access(outside, monkeypatch):
    logits, target = seeded()
    target[5] = outside
    with pytest.raises(ValueError, match=rf"target\[5\]={outside} .*\[0, 151\).*-100"):
        cross_entropy(logits, target)
    with pytest.raises(ValueError, match=rf"target\[5\]={outside}"):
        module.cross_entropy(logits, target)
    monkeypatch.setattr(module, "refuse_targets_outside", lambda *_: None)  # as on a GPU, which is not waited for
    for kernel in ("triton", "torch"):
        loss = module.cross_entropy(logits, target, reduction="none", kernel=kernel)
        assert loss[5].isnan() and loss.isnan().sum() == 1
        assert module.cross_entropy(logits, target, kernel=kernel).isnan()


def test_nothing_given_is_written_to_and_a_second_backward_is_the_first():
    logits, target = seeded(dtype=torch.bfloat16)
    before = logits.clone(), target.clone()
    loss = cross_entropy(logits.requires_grad_(), target, z_loss=1e-3, label_smoothing=0.1) * 3
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    second = torch.autograd.grad(loss, logits)[0]
    assert torch.equal(first, second)
    assert torch.equal(logits.detach(), before[0]) and torch.equal(target, before[1])


def test_three_runs_are_bitwise_alike():
    logits, target = seeded(dtype=torch.bfloat16)
    runs = [loss_and_grad(cross_entropy, logits, target) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x.new_full((len(x), 9), torch.nan)], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x, x.new_full((len(x), 2), torch.nan), x], 1)[:, x.shape[1] + 2 :],
        lambda x: torch.cat([x, x])[::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    ],
    ids=["transposed", "padded", "the right half", "every second row", "one row many times", "off by one element"],
)
@pytest.mark.parametrize("vocab", [151, 128])
def test_strides_and_offsets_do_not_matter(view, vocab):
    logits, target = seeded(vocab=vocab)
    given = view(logits)
    expected = loss_and_grad(cross_entropy, given.contiguous().clone(), target)
    loss = cross_entropy(leaf := given.detach().requires_grad_(), torch.stack([target, target], 1)[:, 0])
    (grad,) = torch.autograd.grad(loss, leaf)
    # where a row begins decides which columns are summed together: fp32 sums of 151 terms
    torch.testing.assert_close((loss.detach().double(), grad.double()), expected, rtol=1e-5, atol=1e-7)


def test_rows_past_two_to_the_31_elements_are_found():
    far = 2**30 + 72  # the third row begins after 2^31 elements; pages that nobody touches cost no memory
    logits, target = seeded(3, 151, torch.bfloat16, ignored_frac=0)
    given, gradient = (torch.empty(2 * far + 151, dtype=torch.bfloat16).as_strided((3, 151), (far, 1)) for _ in "12")
    given.copy_(logits)
    options = {"ignore_index": IGNORE, "label_smoothing": 0.0}
    expected = loss_and_grad(cross_entropy, logits, target, reduction="none")
    loss, *stats = module.softmax_rows(given, target, z_loss=0.0, **options)
    module.gradient_rows(given, target, *stats, torch.ones(3), gradient, **options)
    assert torch.equal(loss.double(), expected[0]) and torch.equal(gradient.double(), expected[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_written_exponentials_are_the_gradient_but_for_a_factor_per_row(smoothing):
    logits, target = seeded(vocab=151)
    logits[2, 140] += 300  # a row that changes its offset after blocks were written
    logits[3, 100], target[3] = -torch.inf, 100
    options = {"ignore_index": IGNORE, "label_smoothing": smoothing, "z_loss": 1e-3}
    want, dlogits = loss_and_grad(reference.cross_entropy, logits.double(), target, reduction="none", **options)
    padded = F.pad(logits, (0, 9), value=torch.nan)
    loss, _, scale = module.softmax_rows(padded[:, :151], target, write_exp=True, **options)
    uniform = smoothing / 151 * (target != IGNORE)[:, None]
    rows = torch.arange(12) != 3  # its loss is infinite, and with a share of the uniform distribution nan
    torch.testing.assert_close(loss[rows].double(), want[rows], rtol=1e-5, atol=1e-6)
    got = (scale[:, None] * padded[:, :151] - uniform).double()
    torch.testing.assert_close(got[rows], dlogits[rows], rtol=1e-5, atol=1e-7)
    assert not padded[:, 151:].any()


def test_in_place_the_gradient_is_the_same():
    logits, target = seeded()
    options = {"ignore_index": IGNORE, "label_smoothing": 0.1}
    _, *stats = module.softmax_rows(logits, target, z_loss=0.0, **options)
    apart = torch.empty_like(logits)
    module.gradient_rows(logits, target, *stats, torch.ones(12), apart, **options)
    module.gradient_rows(logits, target, *stats, torch.ones(12), logits, **options)
    assert torch.equal(apart, logits)


def test_the_operators_are_what_torch_expects_of_one():
    logits, target = seeded(4, 70)
    torch.library.opcheck(module._cross_entropy, (logits.requires_grad_(), target, IGNORE, 0.1, 1e-3))
    logits = F.pad(logits.detach(), (0, 2))[:, :70]
    stats = torch.zeros(4), torch.ones(4)
    torch.library.opcheck(module._cross_entropy_backward, (torch.ones(4), logits, target, *stats, IGNORE, 0.1))


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_compiled_into_one_graph_it_is_the_same(kernel):
    logits, target = seeded(4, 70)

    def loss_of(logits, target):
        return cross_entropy(logits * 2, target, num_items=5, kernel=kernel) * 2

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    got, want = (loss_and_grad(f, logits, target) for f in (compiled, loss_of))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_arguments_that_cannot_be_meant_are_refused():
    logits, target = seeded()
    with pytest.raises(ValueError, match=r"logits \[N, V\] with V > 0, got \(12, 0\)"):
        cross_entropy(logits[:, :0], target)
    with pytest.raises(ValueError, match=r"target int64 \[12\], got torch.int32"):
        cross_entropy(logits, target.int())
    with pytest.raises(ValueError, match="reduction='average'"):
        cross_entropy(logits, target, reduction="average")
    with pytest.raises(ValueError, match="float64; use float32, bfloat16 or float16"):
        cross_entropy(logits.double(), target)
    with pytest.raises(ValueError, match=r"token_weights, a tensor \[12\], got \(3,\)"):
        cross_entropy(logits, target, token_weights=torch.ones(3))
