"""phrase_pool: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import functools
import math

import calls
import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, LAYOUTS, Call, normal, runs
from left_out import light
from torch import Tensor

from fastcss._cosine import unit
from fastcss.ops import phrase_pool


def make(batch, classes, count, width, *, dtype=torch.float32, device="cpu", seed=0) -> Call:
    """Phrases on both sides of the image: cosines of 0.7 and more, and rows of any length."""
    cls = normal(batch, width, seed=seed)
    phrases = normal(classes, count, width, seed=seed + 1)
    if batch:
        phrases = phrases + cls[0] * normal(classes, count, 1, seed=seed + 2)
    return Call(phrase_pool, {"cls": cls.to(device, dtype), "phrases": phrases.to(device, dtype)})


def peers(call: Call, name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradient of cls is what is left of a difference (the softmax's) of a difference (the cosine's): nothing where
    there is one phrase or one channel."""
    if name != "dcls":
        return [exact[name]]
    cls, phrases = (tensor.double() for tensor in call.tensors.values())
    weights = torch.einsum("bd,cmd->bcm", unit(cls), unit(phrases)).softmax(2)
    slope = weights * torch.einsum("bcd,cmd->bcm", dys[0].double(), phrases)
    return [exact[name], torch.einsum("bcm,cmd->bd", slope, unit(phrases)) / cls.norm(dim=-1, keepdim=True)]


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, **options) -> None:
    calls.assert_as_good_as_eager(call, impl, tolerance, peers=functools.partial(peers, call), **options)


CASES = {  # B, C, M, D
    "one element": (1, 1, 1, 1),
    "no images": (0, 2, 5, 3),
    "no channels": (2, 3, 5, 0),
    "one phrase": (2, 21, 1, 33),
    "one class": (3, 1, 31, 65),
    "one channel": (2, 3, 5, 1),
    "C 21": (2, 21, 7, 33),
    "B 5": (5, 20, 31, 150),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"D 530": (2, 33, 9, 530), "M 150": (1, 5, 150, 64), "C 150": (33, 150, 4, 40)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(
    lambda case, dtype: (
        (case, dtype) == ("C 21", torch.bfloat16) or (dtype == torch.float32 and case not in (*LARGE, "C 21", "B 5"))
    )
)
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    assert_as_good_as_eager(make(*(CASES | LARGE)[case], dtype=dtype, device=device), impl, tolerances[dtype])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_is_the_equations(impl, device):
    """(1) and (2) by hand, in Python's numbers."""
    call = make(2, 3, 4, 5, device=device)
    (found,) = call(impl)
    cls, phrases = (tensor.tolist() for tensor in call.tensors.values())
    for b in range(2):
        for c in range(3):
            shares = [
                math.exp(sum(map(float.__mul__, cls[b], phrase)) / (math.hypot(*cls[b]) * math.hypot(*phrase)))
                for phrase in phrases[c]
            ]
            for d in range(5):
                want = sum(share * phrase[d] for share, phrase in zip(shares, phrases[c], strict=True)) / sum(shares)
                assert found[b, c, d].item() == pytest.approx(want, rel=1e-4, abs=1e-6)


# --- rows of zeros, infinities, NaN ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype: dtype == torch.float32)
def test_rows_of_zeros_have_cosine_0(impl, dtype, device, tolerances):
    """An image of zeros takes the mean of the phrases; a phrase of zeros has its weight."""
    call = make(3, 21, 7, 33, dtype=dtype, device=device)
    call.tensors["cls"][1] = 0
    call.tensors["phrases"][4, 2] = 0
    exact, eager, ours = (
        c.outputs(name)["phrase_pool"].double()
        for c, name in ((call.map(Tensor.double), "reference"), (call, "reference"), (call, impl))
    )
    torch.testing.assert_close(exact[1], call.tensors["phrases"].double().mean(1))
    assert (ours - exact).norm() <= 1.2 * (eager - exact).norm() + 2 * tolerances[dtype] * exact.norm()
    if dtype == torch.float32:
        checks.assert_gradients_as_reference(call, impl)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["cls", "phrases"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_and_inf_propagate(impl, name, value, device):
    call = make(2, 5, 7, 9, device=device)
    call.tensors[name][1, ..., 3] = value
    checks.assert_not_finite_as_reference(call, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype: dtype == torch.float16)
def test_lengths_whose_squares_no_dtype_holds(impl, dtype, device, tolerances):
    """The squares of these rows are above 65504 and below 6e-8: no float16."""
    call = make(2, 5, 7, 33, dtype=dtype, device=device)
    large = call.having(cls=call.tensors["cls"] * 500, phrases=call.tensors["phrases"] / 1000)
    exact, ours = large.map(Tensor.double).outputs("reference"), large.outputs(impl)
    exact, ours = exact["phrase_pool"], ours["phrase_pool"].double()
    assert (ours - exact).norm() <= 4 * max(tolerances[dtype], 1e-6) * exact.norm()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_phrases_whose_length_is_infinite_have_cosine_0(impl, device):
    """The squares of these elements are beyond float32; the phrases themselves are not."""
    call = make(2, 5, 7, 33, device=device)
    mean = call.tensors["phrases"][3].mean(0)
    call.tensors["phrases"][3] *= 1e30
    want, found = (call.outputs(name)["phrase_pool"] for name in ("reference", impl))
    for pooled in (want, found):
        torch.testing.assert_close(pooled[:, 3] / 1e30, mean.expand(2, -1))
    torch.testing.assert_close(found[:, :3], want[:, :3])


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout in ("NCHW", "expanded batch"))
def test_any_strides(impl, layout, device, tolerances):
    call = make(3, 5, 7, 18, device=device).map(LAYOUTS[layout])
    dys = tuple(LAYOUTS[layout](dy) for dy in call.output_gradients())
    assert_as_good_as_eager(call, impl, tolerances[torch.float32], gradients=dys)


# --- the same again, autograd, torch.library, torch.compile, torch.vmap ----------------------------------------------


@pytest.mark.parametrize("impl", COMPILED)
def test_reproducible_and_of_its_image_alone(impl, device):
    call = make(3, 5, 7, 18, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl, shared=("phrases",))


@pytest.mark.parametrize("case", ["C 21", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, device):
    checks.gradcheck(make(2, 3, 4, 3, dtype=torch.float64, device=device), impl)


@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, device):
    checks.assert_slope(make(2, 5, 7, 18, device=device), impl)


@pytest.mark.parametrize("needs", ["cls", "phrases"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_gradient(impl, needs, device):
    call = make(2, 5, 7, 18, device=device)
    leaf = call.tensors[needs].clone().requires_grad_()
    (pooled,) = call.having(**{needs: leaf})(impl)
    (dy,) = call.output_gradients()
    want = call.leaves().results("reference", (dy,))[f"d{needs}"]
    torch.testing.assert_close(torch.autograd.grad(pooled, leaf, dy)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(2, 3, 4, 5, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_rounds_no_cosine(impl, device):
    """Tensors of two dtypes are taken in the wider one."""
    call = make(2, 5, 7, 18, device=device)
    want = call.outputs(impl)
    half = call.tensors["phrases"].bfloat16()
    wide = call.having(phrases=half.float()).outputs(impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        checks.assert_bitwise(call.outputs(impl), want)
        checks.assert_bitwise(call.having(phrases=half).outputs(impl), wide)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 5, 7, 9, device=device), impl)


@pytest.mark.parametrize("mapped", [("cls", "phrases"), ("cls",), ("phrases",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, device):
    checks.assert_maps(make(2, 3, 4, 5, device=device), impl, mapped)


@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, device):
    for shape in ((2, 5, 7, 9), (0, 2, 3, 4)):
        cls, phrases = make(*shape, device=device).tensors.values()
        pooled = checks.opcheck("phrase_pool", impl, cls, phrases)
        checks.opcheck("phrase_pool_backward", impl, torch.ones_like(pooled), cls, phrases)
