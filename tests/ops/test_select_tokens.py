"""select_tokens: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import functools
import math

import calls
import checks
import pytest
import torch
from calls import COMPILED_CUDA, DTYPES, IMPLEMENTATIONS_CUDA, LAYOUTS, Call, normal, runs
from hypothesis import strategies as st
from torch import Tensor

from fastcss._cosine import unit
from fastcss.ops import select_tokens

# How near a token may come to the threshold or to its second best class: what the cosine of two rounded rows of length
# one is off, and then itself rounded.
CLEAR = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make(
    batch, count, classes, width, length, *, threshold=0.1, dtype=torch.float32, device="cpu", seed=0, **options
) -> Call:
    """Tokens whose class no rounding changes: those too near to two classes or to the threshold are drawn again."""
    text = normal(batch, classes, width, seed=seed).to(dtype)
    tokens = normal(batch, count, width, seed=seed + 1).to(dtype)
    for again in range(2, 200):
        unclear = ~clear(tokens, text, threshold, CLEAR[dtype])
        if not unclear.any():
            break
        tokens = torch.where(unclear[..., None], normal(*tokens.shape, seed=seed + again).to(dtype), tokens)
    else:
        raise AssertionError("no such tokens")
    options |= {"threshold": threshold, "length": length}
    return Call(select_tokens, {"tokens": tokens.to(device), "classes": text.to(device)}, options)


def clear(tokens: Tensor, classes: Tensor, threshold: float, margin: float) -> Tensor:
    """[B, N]"""
    cosine = (unit(tokens.double()) @ unit(classes.double()).mT).sort(dim=2, descending=True).values
    near = (cosine[..., 0] - threshold).abs() < margin
    return ~near if classes.shape[1] == 1 else ~near & (cosine[..., 0] - cosine[..., 1] >= margin)


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
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    light = case not in (*LARGE, "C 21", "all and zeros") if dtype == torch.float32 else case == "C 21"
    runs(select_tokens, impl, device, light and dtype != torch.float16)
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, **options) -> None:
    calls.assert_as_good_as_eager(call, impl, tolerance, peers=functools.partial(peers, call), **options)


def peers(call: Call, name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradient of a cosine is what is left of that of a product: nothing, where the two rows are parallel."""
    if name == "dclasses":
        slope = dys[2].double() / exact["counts"].clamp(min=1).sqrt() / call.tensors["classes"].double().norm(dim=-1)
        return [exact[name], torch.where(exact["counts"] > 0, slope, 0)]
    return [exact[name]]


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_is_what_the_paper_says(impl, device):
    """By hand: cosines 1 and 0.6 with the first class, 0.8 with the second, none with the third."""
    runs(select_tokens, impl, device)
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
def test_of_equal_cosines_the_lower_class_wins(impl, dtype, device):
    """Lengths are powers of two: the cosines are 1, 0.5, 0 and -1 in any dtype; one of τ survives."""
    runs(select_tokens, impl, device, dtype == torch.bfloat16)
    axes = torch.eye(8)
    half = axes[0] + axes[1] + axes[2] + axes[3]
    classes = torch.stack([axes[1], 4 * axes[0], axes[0], axes[1] / 2, half])[None].to(device, dtype)
    tokens = torch.stack([axes[1], 2 * axes[0], half / 4, axes[2], -axes[0], axes[7]])[None].to(device, dtype)
    expected = {
        1.0: [1, 1, 0, 0, 1],
        0.5: [1, 1, 0, 0, 2],
        0.0: [3, 1, 0, 0, 2],  # the last two: 0 with the first
        -1.0: [3, 1, 0, 0, 2],
    }
    for threshold, counts in expected.items():
        got = select_tokens(tokens, classes, threshold=threshold, length=24, impl=impl)
        assert got.counts.tolist() == [counts]
        assert got.tokens[0, 0, :8].tolist() == axes[1].tolist()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_no_survivor(impl, device):
    call = make(2, 70, 5, 33, 50, threshold=1, device=device).leaves()
    got = call.results(runs(select_tokens, impl, device), call.output_gradients())
    assert not any(tensor.count_nonzero() for tensor in got.values())


@pytest.mark.parametrize("threshold", [0.3, -0.2, 0, -1])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_thresholds(impl, threshold, device, tolerances):
    call = make(2, 70, 5, 9, 50, threshold=threshold, device=device)
    assert_as_good_as_eager(call, runs(select_tokens, impl, device, threshold == -1), tolerances[torch.float32])
    if threshold == -1:
        assert call.outputs(impl)["counts"].sum(1).tolist() == [70, 70]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_rows_of_zeros_have_cosine_0(impl, dtype, device):
    """They survive a threshold of 0 or less, for the first class; a class of zeros takes what is below 0 elsewhere."""
    runs(select_tokens, impl, device, dtype == torch.float32)
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
def test_nan_survives_for_no_class(impl, value, device):
    """A token that is NaN is as if it were not there, a class that is takes none; where all are nothing survives."""
    call = make(2, 70, 5, 9, 50, threshold=-1, device=device)
    runs(select_tokens, impl, device, math.isnan(value))
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
def test_any_strides(impl, layout, device, tolerances):
    """Tokens that are all alike go to one class; classes that were would be ties."""
    runs(select_tokens, impl, device, layout in ("NCHW", "a slice", "expanded batch"))
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


@pytest.mark.parametrize(("impl", "examples"), [("composed", 10), ("cpu", 30), ("triton", 2), ("cuda", 10)])
def test_any_shape_and_stride(impl, examples, device, tolerances):
    runs(select_tokens, impl, device)
    count = st.integers(0, 300 if impl != "triton" else 40)
    shapes = st.tuples(st.integers(0, 3), count, st.integers(1, 40), st.integers(4, 80), st.integers(1, 300))
    change = functools.partial(make, device=device)
    calls.check_any_shape_and_stride(change, shapes, impl, tolerances[torch.float32], examples, assert_as_good_as_eager)


# --- the same again, autograd, torch.library, torch.compile, torch.vmap ----------------------------------------------


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_reproducible_and_of_its_image_alone(impl, device):
    call = make(3, 40, 5, 18, 50, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, runs(select_tokens, impl, device))
    checks.assert_batch_invariant(call, impl)


@pytest.mark.parametrize("case", ["C 21", *LARGE])
def test_threads_do_not_change_results(case):
    runs(select_tokens, "cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, device):
    checks.gradcheck(make(2, 6, 3, 4, 7, dtype=torch.float64, device=device), impl)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_finite_differences(impl, device):
    checks.assert_slope(make(2, 40, 5, 18, 70, device=device), runs(select_tokens, impl, device))


@pytest.mark.parametrize("needs", ["tokens", "classes"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_one_gradient(impl, needs, device):
    """Of the presence alone."""
    call = make(2, 40, 5, 18, 70, device=device)
    runs(select_tokens, impl, device)
    slopes = []
    for name in ("reference", impl):
        leaf = call.tensors[needs].clone().requires_grad_()
        presence = call.having(**{needs: leaf}).outputs(name)["presence"]
        slopes += torch.autograd.grad(presence.square().sum(), leaf)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(1, 6, 3, 4, 7, device=device), runs(select_tokens, impl, device))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_autocast_rounds_no_cosine(impl, device):
    """Tensors of two dtypes are taken in the wider one."""
    call = make(2, 40, 5, 18, 70, device=device)
    want = call.outputs(runs(select_tokens, impl, device))
    half = call.tensors["tokens"].bfloat16()
    wide = call.having(tokens=half.float()).outputs(impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        checks.assert_bitwise(call.outputs(impl), want)
        checks.assert_bitwise(call.having(tokens=half).outputs(impl), wide)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 20, 5, 9, 30, device=device), runs(select_tokens, impl, device))


@pytest.mark.parametrize("mapped", [("tokens", "classes"), ("tokens",), ("classes",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_vmap(impl, mapped, device):
    call = make(2, 6, 3, 5, 12, device=device)
    checks.assert_maps(call, runs(select_tokens, impl, device, len(mapped) > 1), mapped)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_opcheck(impl, device):
    """And what is saved for the backward pass is what the schema says."""
    runs(select_tokens, impl, device)
    for shape in ((2, 40, 5, 18, 70), (0, 5, 3, 4, 9), (1, 0, 2, 3, 5)):
        tokens, classes = make(*shape, device=device).tensors.values()
        found = checks.opcheck("select_tokens", impl, tokens, classes, 0.1, shape[-1])
        selected, counts, presence, best, cosine = found
        want, place = (unit(tokens) @ unit(classes).mT).max(dim=2)
        torch.testing.assert_close(cosine, want)
        assert torch.equal(best, place.where(want >= 0.1, -1).int())
        gradients = (torch.ones_like(selected), torch.ones_like(presence))
        checks.opcheck("select_tokens_backward", impl, *gradients, tokens, classes, counts, best, cosine)
