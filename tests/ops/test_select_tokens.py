"""select_tokens: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import checks
import pytest
import torch
from calls import DTYPES, IMPLEMENTATIONS_CUDA, LAYOUTS, normal
from left_out import light
from select_inputs import CASES, LARGE, assert_as_good_as_eager, clear, cosines, make
from torch import Tensor

from fastcss.ops import select_tokens


def literal(tokens: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """r of eq. A.2 by eq. 3 and 4, [B, C]; 0 where no token has a positive S′, for which the paper has 0 / 0."""
    norm = torch.linalg.vector_norm
    s = (tokens @ classes.mT) / norm(tokens, dim=2)[..., None] / norm(classes, dim=2)[:, None]  # (3)
    s = torch.where(s >= threshold, s, 0)  # (4)
    return (s * (s > 0)).sum(1) / (s > 0).sum(1).clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(
    lambda case, dtype: (
        (case, dtype) == ("C 21", torch.bfloat16)
        or (dtype == torch.float32 and case not in (*LARGE, "C 21", "all and zeros"))
    )
)
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize(
    ("case", "dtype"), [("C 21", torch.float32), ("C 21", torch.bfloat16), ("D 256", torch.float32)]
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda case, dtype: case == "C 21" and dtype == torch.float32)
def test_presence_of_the_best_alone(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device, presence="best")
    assert_as_good_as_eager(call, impl, tolerances[dtype])


def near_classes(batch: int, count: int, classes: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """All have a direction in common, so that a token is near to many of them, or, every fifth, to none."""
    common = normal(batch, 1, width, seed=7)
    tokens, text = normal(batch, count, width), normal(batch, classes, width, seed=1)
    tokens += 0.6 * common
    tokens[:, ::5] *= -1
    return tokens.to(device), (text + 0.8 * common).to(device)


@pytest.mark.parametrize("shape", [(2, 37, 6, 20), (1, 40, 33, 12), (2, 600, 70, 40)], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
@light(lambda shape: shape[1] < 100)
def test_presence_and_its_gradients_are_those_of_equation_a2(impl, shape, device):
    """Tokens reach several classes, whose bits take more than one word; some classes are no token's best."""
    tensors = near_classes(*shape, device)
    wide, leaves = ([x.to(dtype).requires_grad_() for x in tensors] for dtype in (torch.float64, torch.float32))
    reached = (cosines(*tensors) >= 0.2).sum(2)
    assert reached.max() >= 3
    assert reached.min() == 0
    assert not clear(*tensors, 0.2, 0).logical_not().any()
    want, found = literal(*wide, 0.2), select_tokens(*leaves, threshold=0.2, length=50, impl=impl)
    torch.testing.assert_close(found.presence.double(), want, rtol=1e-6, atol=1e-7)
    weights = normal(*want.shape, seed=2, device=device)
    exact = torch.autograd.grad((want * weights).sum(), wide)
    for got, grad in zip(torch.autograd.grad((found.presence * weights).sum(), leaves), exact, strict=True):
        assert (got - grad).norm() <= 2e-6 * grad.norm()
    best = select_tokens(*tensors, threshold=0.2, length=50, presence="best", impl=impl)
    assert torch.equal(best.tokens, found.tokens)
    assert torch.equal(best.counts, found.counts)
    assert not torch.allclose(best.presence, found.presence)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_of_two_near_classes_both_are_found(impl, device):
    """No token is best for the second, and yet all 300 reach it."""
    axes = torch.eye(16, device=device)
    classes = torch.stack([axes[0], 0.9 * axes[0] + 0.19**0.5 * axes[1], axes[2]])[None]
    tokens = 0.8 * axes[:1] + 0.6 * torch.nn.functional.normalize(normal(300, 13, device=device)) @ axes[3:]
    found = select_tokens(tokens[None], classes, threshold=0.3, length=32, impl=impl)
    assert found.counts.tolist() == [[300, 0, 0]]
    torch.testing.assert_close(found.presence, torch.tensor([[0.8, 0.72, 0.0]], device=device))
    assert not found.tokens[0, 1:].any()
    before = select_tokens(tokens[None], classes, threshold=0.3, length=32, presence="best", impl=impl)
    torch.testing.assert_close(before.presence, torch.tensor([[0.8, 0.0, 0.0]], device=device))


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_is_what_the_paper_says(impl, device):
    """The results are worked out by hand: cosines are 1 and 0.6 with the first class, 0.8 with the second, and none
    with the third."""
    tokens = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 4.0, 3.0], [3.0, 0.0, -4.0], [0.0, 0.0, -5.0]]], device=device)
    classes = torch.tensor([[[7.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, -1.0, 0.0]]], device=device)
    found = select_tokens(tokens, classes, threshold=0.5, length=7, impl=impl)
    assert found.tokens.tolist() == [[[2, 0, 0, 3, 0, -4, 0], [0, 4, 3, 0, 0, 0, 0], [0] * 7]]
    assert found.counts.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(found.presence, torch.tensor([[0.8, 0.8, 0.0]], device=device))
    short = select_tokens(tokens, classes, threshold=0.5, length=2, impl=impl)
    assert torch.equal(short.tokens, found.tokens[..., :2])
    assert torch.equal(short.counts, found.counts)
    assert torch.equal(short.presence, found.presence)


# --- ties, thresholds, rows of zeros, NaN ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
@light(lambda dtype: dtype == torch.bfloat16)
def test_of_equal_cosines_the_lower_class_wins(impl, dtype, device):
    """Lengths are powers of two: the cosines are 1, 0.5, 0 and -1 in any dtype; one of τ survives."""
    axes = torch.eye(8)
    half = axes[0] + axes[1] + axes[2] + axes[3]
    classes = torch.stack([axes[1], 4 * axes[0], axes[0], axes[1] / 2, half])[None].to(device, dtype)
    tokens = torch.stack([axes[1], 2 * axes[0], half / 4, axes[2], -axes[0], axes[7]])[None].to(device, dtype)
    expected = {
        1.0: ([1, 1, 0, 0, 1], [1] * 5),
        0.5: ([1, 1, 0, 0, 2], [0.75, 0.75, 0.75, 0.75, 0.625]),
        0.0: ([3, 1, 0, 0, 2], [0.25, 0.3, 0.3, 0.25, 0.5]),  # the last two: 0 with the first
        -1.0: ([3, 1, 0, 0, 2], [0.25, 0.5 / 6, 0.5 / 6, 0.25, 2 / 6]),
    }
    for threshold, (counts, presence) in expected.items():
        got = select_tokens(tokens, classes, threshold=threshold, length=24, impl=impl)
        assert got.counts.tolist() == [counts]
        assert got.tokens[0, 0, :8].tolist() == axes[1].tolist()
        torch.testing.assert_close(got.presence, torch.tensor([presence], device=device).to(dtype))


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_of_equal_cosines_in_other_blocks_the_lower_class_wins(impl, device):
    """A tiled kernel goes through the classes block by block."""
    classes = torch.tensor([1.0, 0.0]).expand(1, 150, 2).clone()
    classes[0, :7] = torch.tensor([0.0, 1.0])
    tokens = torch.tensor([[[2.0, 0.0]]])
    found = select_tokens(tokens.to(device), classes.to(device), threshold=0.5, length=2, impl=impl)
    assert found.counts[0].nonzero().tolist() == [[7]]


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_tokens_of_a_class_that_lie_far_apart(impl, device, monkeypatch):
    """The kernel sums the counts of 512 blocks of tokens at a time; in the interpreter, of four."""
    count = 40_000
    if impl == "triton" and device == "cpu":
        from triton.language import constexpr

        count = 600
        monkeypatch.setattr("fastcss.kernels.select_tokens.BLOCKS", constexpr(4))
    tokens, classes = torch.zeros(1, count, 2, device=device), torch.tensor([[[1.0, 0.0]]], device=device)
    tokens[0, [3, count // 2, count - 5], 0] = torch.tensor([1.0, 2.0, 3.0], device=device)
    found = select_tokens(tokens, classes, threshold=0.5, length=6, impl=impl)
    assert found.counts.tolist() == [[3]]
    assert found.tokens.flatten().tolist() == [1, 0, 2, 0, 3, 0]


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_no_survivor(impl, device):
    call = make(2, 70, 5, 33, 50, threshold=1, device=device).leaves()
    got = call.results(impl, call.output_gradients())
    assert not any(tensor.count_nonzero() for tensor in got.values())


@pytest.mark.parametrize("threshold", [0.3, -0.2, 0, -1])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda threshold: threshold == -1)
def test_thresholds(impl, threshold, device, tolerances):
    call = make(2, 70, 5, 9, 50, threshold=threshold, device=device)
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])
    if threshold == -1:
        assert call.outputs(impl)["counts"].sum(1).tolist() == [70, 70]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
@light(lambda dtype: dtype == torch.float32)
def test_rows_of_zeros_have_cosine_0(impl, dtype, device):
    """They survive a threshold of 0 or less, for the first class; a class of zeros takes what is below 0 elsewhere."""
    call = make(1, 70, 5, 33, 400, threshold=0.1, dtype=dtype, device=device)
    want = call.outputs(impl)
    call.tensors["tokens"][0, 9] = 0
    call.tensors["classes"][0, 3] = 0
    low = call.having(threshold=0.0).outputs(impl)
    assert low["presence"].isfinite().all()
    if dtype == torch.float32:
        checks.assert_gradients_as_reference(call.having(threshold=-0.5), impl)
    assert low["presence"][0, 3] == 0
    high = call.outputs(impl)
    assert high["counts"][0, 3] == 0
    zeros = call.having(tokens=torch.zeros_like(call.tensors["tokens"])).having(threshold=0.0).outputs(impl)
    assert zeros["counts"].tolist() == [[70, 0, 0, 0, 0]]
    assert zeros["presence"].tolist() == [[0] * 5]
    assert want["presence"].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
@light(lambda value: math.isnan(value))
def test_nan_survives_for_no_class(impl, value, device):
    """A token that is NaN is as if it were not there, a class that is takes none; where all are nothing survives."""
    call = make(2, 70, 5, 9, 50, threshold=-1, device=device)
    tokens, classes = call.tensors.values()
    kept = torch.arange(70, device=device) != 31
    want = call.having(tokens=tokens[:, kept]).outputs(impl)
    tokens[:, 31, 4] = value
    got = call.outputs(impl)
    assert torch.equal(got["counts"], want["counts"])
    assert torch.equal(got["tokens"], want["tokens"])
    torch.testing.assert_close(got["presence"], want["presence"])
    classes[1, 2, 3] = value
    others = torch.tensor([0, 1, 3, 4], device=device)
    want = call.having(classes=classes[:, others]).outputs(impl)
    got = call.outputs(impl)
    assert torch.equal(got["counts"][1, others], want["counts"][1])
    assert torch.equal(got["tokens"][1, others], want["tokens"][1])
    assert not any(got[name][1, 2].count_nonzero() for name in got)
    classes[1] = value
    assert not call.outputs(impl)["counts"][1].count_nonzero()


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda layout: layout in ("NCHW", "a slice", "expanded batch"))
def test_any_strides(impl, layout, device, tolerances):
    """Tokens that are all alike go to one class; classes that were would be ties."""
    call = make(2, 66, 5, 18, 70, device=device)
    if layout == "expanded batch":
        call = call.map(lambda t: t[:1].expand(t.shape) if isinstance(t, Tensor) else t)
    else:
        changed = {n: LAYOUTS[layout](t) for n, t in call.tensors.items() if layout != "expanded rows" or n == "tokens"}
        call = call.having(**changed)
    layout = "a slice" if layout == "expanded rows" else layout
    dselected, dcounts, dpresence = call.output_gradients()
    dys = (LAYOUTS[layout](dselected), dcounts, LAYOUTS[layout](dpresence))
    assert_as_good_as_eager(call, impl, tolerances[torch.float32], gradients=dys)
