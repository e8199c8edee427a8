"""select_tokens: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import functools
import math

import calls
import checks
import pytest
import torch
from calls import COMPILED_CUDA, DTYPES, IMPLEMENTATIONS_CUDA, LAYOUTS, Call, normal, runs
from left_out import light
from torch import Tensor

from fastcss._cosine import unit
from fastcss.ops import select_tokens

# A cosine keeps this distance from the threshold, and a token's best class from the second. The cosine of two rounded
# unit rows is off by 2.5 / √D of this unit, and then rounded itself.
UNIT = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def make(
    batch, count, classes, width, length, *, threshold=0.1, dtype=torch.float32, device="cpu", seed=0, **options
) -> Call:
    """Tokens whose classes no rounding changes: those too near to two of them or to the threshold are drawn again."""
    text = normal(batch, classes, width, seed=seed).to(dtype)
    tokens = normal(batch, count, width, seed=seed + 1).to(dtype)
    for again in range(2, 200):
        unclear = ~clear(tokens, text, threshold, UNIT[dtype])
        if not unclear.any():
            break
        tokens = torch.where(unclear[..., None], normal(*tokens.shape, seed=seed + again).to(dtype), tokens)
    else:
        raise AssertionError("no such tokens")
    options |= {"threshold": threshold, "length": length}
    return Call(select_tokens, {"tokens": tokens.to(device), "classes": text.to(device)}, options)


def cosines(tokens: Tensor, classes: Tensor) -> Tensor:
    return unit(tokens.double()) @ unit(classes.double()).mT  # [B, N, C]


def clear(tokens: Tensor, classes: Tensor, threshold: float, unit: float) -> Tensor:
    """[B, N]"""
    cosine, off = cosines(tokens, classes), 2.5 / tokens.shape[2] ** 0.5
    near = ((cosine - threshold).abs() < unit * (off + abs(threshold))).any(2)
    best = cosine.sort(dim=2, descending=True).values
    return ~near if classes.shape[1] == 1 else ~near & (best[..., 0] - best[..., 1] >= unit * (off + 1))


def literal(tokens: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """r of eq. A.2 by eq. 3 and 4, [B, C]; 0 where no token has a positive S′, for which the paper has 0 / 0."""
    norm = torch.linalg.vector_norm
    s = (tokens @ classes.mT) / norm(tokens, dim=2)[..., None] / norm(classes, dim=2)[:, None]  # (3)
    s = torch.where(s >= threshold, s, 0)  # (4)
    return (s * (s > 0)).sum(1) / (s > 0).sum(1).clamp(min=1)


CASES = {  # B, N, C, D, length
    "one element": (1, 1, 1, 1, 1),
    "no images": (0, 5, 3, 4, 9),
    "no tokens": (2, 0, 3, 4, 9),
    "one class": (2, 31, 1, 33, 70),
    "one token": (2, 1, 20, 33, 70),
    "part of a token": (2, 97, 3, 65, 40),
    "C 21": (2, 97, 21, 33, 150),
    "all and zeros": (1, 33, 5, 21, 1000),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"N 1500": (2, 1500, 20, 64, 128), "C 150": (1, 577, 150, 130, 260), "D 256": (1, 300, 20, 256, 512)}


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


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, **options) -> None:
    calls.assert_as_good_as_eager(call, impl, tolerance, peers=functools.partial(peers, call), **options)


def peers(call: Call, name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradient of a cosine is what is left of that of a product: nothing, where the two rows are parallel."""
    if name == "dclasses":
        count = (cosines(**call.tensors) >= call.options["threshold"]).sum(1)
        if call.options.get("presence") == "best":
            count = exact["counts"]
        slope = dys[2].double() / count.clamp(min=1).sqrt() / call.tensors["classes"].double().norm(dim=-1)
        return [exact[name], torch.where(count > 0, slope, 0)]
    return [exact[name]]


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


# --- the same again, autograd, torch.library, torch.compile, torch.vmap ----------------------------------------------


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_reproducible_and_of_its_image_alone(impl, device):
    call = make(3, 40, 5, 18, 50, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl)


@pytest.mark.parametrize("case", ["C 21", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, device):
    checks.gradcheck(make(2, 6, 3, 4, 7, dtype=torch.float64, device=device), impl)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_finite_differences(impl, device):
    checks.assert_slope(make(2, 40, 5, 18, 70, device=device), impl)


@pytest.mark.parametrize("needs", ["tokens", "classes"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_one_gradient(impl, needs, device):
    """The presence alone has a gradient here."""
    call = make(2, 40, 5, 18, 70, device=device)
    slopes = []
    for name in ("reference", impl):
        leaf = call.tensors[needs].clone().requires_grad_()
        presence = call.having(**{needs: leaf}).outputs(name)["presence"]
        slopes += torch.autograd.grad(presence.square().sum(), leaf)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(1, 6, 3, 4, 7, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_autocast_rounds_no_cosine(impl, device):
    """Tensors of two dtypes are taken in the wider one."""
    call = make(2, 40, 5, 18, 70, device=device)
    want = call.outputs(impl)
    half = call.tensors["tokens"].bfloat16()
    wide = call.having(tokens=half.float()).outputs(impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        checks.assert_bitwise(call.outputs(impl), want)
        checks.assert_bitwise(call.having(tokens=half).outputs(impl), wide)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 20, 5, 9, 30, device=device), impl)


@pytest.mark.parametrize("mapped", [("tokens", "classes"), ("tokens",), ("classes",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, device):
    call = make(2, 6, 3, 5, 12, device=device)
    checks.assert_maps(call, impl, mapped)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_opcheck(impl, device):
    """And what is saved for the backward pass is what the schema says."""
    for shape in ((2, 40, 5, 18, 70), (0, 5, 3, 4, 9), (1, 0, 2, 3, 5)):
        tokens, classes = make(*shape, device=device).tensors.values()
        cosine = cosines(tokens, classes)
        want, place = cosine.max(dim=2)
        bits = (cosine >= 0.1).int() << torch.arange(shape[2], device=device)
        for best_only in (False, True):
            found = checks.opcheck("select_tokens", impl, tokens, classes, 0.1, shape[-1], best_only)
            selected, counts, presence, *saved = found
            support, best, above = saved
            assert torch.equal(best, place.where(want >= 0.1, -1).int())
            assert torch.equal(support, counts if best_only else (cosine >= 0.1).sum(1))
            assert torch.equal(above, best.new_empty(*best.shape, 0) if best_only else bits.sum(2, keepdim=True).int())
            gradients = (torch.ones_like(selected), torch.ones_like(presence))
            checks.opcheck("select_tokens_backward", impl, *gradients, tokens, classes, *saved)
