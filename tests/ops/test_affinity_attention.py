"""affinity_attention: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import affinity
import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, LAYOUTS, Call, normal, runs
from left_out import light

from fastcss.ops import affinity_attention


def make(batch, pixels, keys, width, *, dtype=torch.float32, device="cpu", seed=0, **options) -> Call:
    """Logits of standard deviation 2: the sigmoid is steep for some pairs and flat for others."""
    q, k = (normal(batch, pixels, keys, seed=seed + i, device=device) for i in (0, 1))
    v = normal(batch, pixels, width, seed=seed + 2, dtype=dtype, device=device)
    q = (q * (2 / math.sqrt(max(keys, 1)))).to(dtype)
    return Call(affinity_attention, {"q": q, "k": k.to(dtype), "v": v}, options)


CASES = {
    "one element": (1, 1, 1, 1),
    "no images": (0, 5, 3, 4),
    "no pixels": (2, 0, 3, 4),
    "no keys": (2, 5, 0, 3),
    "no values": (2, 5, 3, 0),
    "two pixels": (3, 2, 3, 21),
    "one key, one value": (1, 97, 1, 1),
    "N 31": (1, 31, 64, 150),
    "N 33": (3, 33, 65, 33),
    "N 97": (1, 97, 3, 21),
    "N 150": (1, 150, 64, 150),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"N 577": (2, 577, 64, 150), "N 1030": (1, 1030, 64, 21), "wide": (1, 390, 130, 530)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case == "N 97" or (dtype == torch.float32 and case not in LARGE))
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device, seed=7)  # one element, and yet no cancellation
    affinity.assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scale_and_mean(impl, device, tolerances):
    call = make(2, 70, 5, 9, device=device, scale=-0.37, mean=True)
    affinity.assert_as_good_as_eager(call, impl, tolerances[torch.float32])
    intra, inter = call.having(scale=0.0)(impl)
    want = call.tensors["v"].mean(1, keepdim=True).expand(intra.shape) / 2
    torch.testing.assert_close(intra, want)
    torch.testing.assert_close(inter, want)


def test_the_reference_is_the_equation(device):
    call = make(1, 5, 3, 2, dtype=torch.float64, device=device, scale=0.5, mean=True)
    q, k, v = (tensor[0].tolist() for tensor in call.tensors.values())
    affinity = [[1 / (1 + math.exp(-0.5 * sum(map(float.__mul__, qi, kj)))) for kj in k] for qi in q]
    intra, inter = call("reference")
    for i in range(5):
        for d in range(2):
            assert intra[0, i, d].item() == pytest.approx(sum(affinity[i][j] * v[j][d] for j in range(5)) / 5)
            assert inter[0, i, d].item() == pytest.approx(sum((1 - affinity[i][j]) * v[j][d] for j in range(5)) / 5)


# --- the ends of the sigmoid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", affinity.ENDS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda logit, dtype: logit in (-30, 10**4) and dtype != torch.float16)
def test_the_ends_of_the_sigmoid(impl, logit, dtype, device, tolerances):
    call = affinity.ENDS[logit](make(2, 70, 16, 21, dtype=dtype, device=device))
    logits = (call.tensors["q"] @ call.tensors["k"].mT).abs() * call.options.get("scale", 1)
    assert (logits > abs(logit) / 2).float().mean() > 0.1
    affinity.assert_as_good_as_eager(call, impl, tolerances[dtype], flat=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bfloat16_does_not_lose_a_small_inter(impl, device):
    """M rounds to 1 in bfloat16 at s = 6.25, and Σ V − M V would be 0; rounding tanh(s/2) costs inter only 1.4%."""
    q = torch.full((1, 64, 1), 6.25, device=device, dtype=torch.bfloat16)
    call = Call(affinity_attention, {"q": q, "k": torch.ones_like(q), "v": torch.ones_like(q)})
    for sign, small in ((1, 1), (-1, 0)):
        got = call.having(k=sign * call.tensors["k"])(impl)
        want = torch.full_like(q, 64 / (1 + math.exp(6.25)))
        torch.testing.assert_close(got[small], want, rtol=0.03, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda name, value: math.isnan(value) or name == "k")
def test_nan_and_inf_propagate(impl, name, value, device):
    for pixels in (3, 70):
        call = make(2, pixels, 5, 9, device=device)
        call.tensors[name][1, 2, 3] = value
        checks.assert_not_finite_as_reference(call, impl)


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout in ("NCHW", "a slice", "expanded batch"))
def test_any_strides(impl, layout, device, tolerances):
    call = make(2, 66, 21, 18, device=device).map(LAYOUTS[layout])
    dys = tuple(LAYOUTS[layout](dy) for dy in call.output_gradients())
    affinity.assert_as_good_as_eager(call, impl, tolerances[torch.float32], gradients=dys)


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", COMPILED)
def test_results_are_bitwise_reproducible(impl, device):
    call = make(2, 70, 21, 18, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)


@pytest.mark.parametrize("shape", [(1, 70, 21, 18), (2, 577, 64, 150), (3, 40, 5, 70)])
def test_threads_do_not_change_results(shape):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*shape, dtype=dtype))


@pytest.mark.parametrize("pixels", [3, 70])
@pytest.mark.parametrize("impl", COMPILED)
def test_an_image_does_not_depend_on_its_batch(impl, pixels, device):
    call = make(3, pixels, 21, 18, dtype=torch.bfloat16, device=device)
    checks.assert_batch_invariant(call, impl)


# --- autograd, torch.library, torch.compile, torch.vmap --------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, device):
    checks.gradcheck(make(2, 4, 3, 2, dtype=torch.float64, device=device, scale=0.7, mean=True), impl)


@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, device):
    checks.assert_slope(make(2, 40, 21, 18, device=device, scale=0.7), impl)


@pytest.mark.parametrize("needs", ["q", "k", "v"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_gradient_and_one_output(impl, needs, device):
    """Asked for alone, a gradient is the same; and so where only one of the outputs goes on."""
    call = make(1, 40, 21, 18, device=device)
    leaf = call.tensors[needs].clone().requires_grad_()
    intra, _ = call.having(**{needs: leaf})(impl)
    dy, _ = call.output_gradients()
    want = call.leaves().results("reference", (dy, torch.zeros_like(dy)))[f"d{needs}"]
    torch.testing.assert_close(torch.autograd.grad(intra, leaf, dy)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(1, 6, 3, 4, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, device):
    checks.assert_autocasts(make(2, 20, 21, 18, device=device), impl, device)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 20, 5, 7, device=device), impl)


@pytest.mark.parametrize("mapped", [("q", "k", "v"), ("q",), ("v",), ("k", "v")], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, device):
    checks.assert_maps(make(2, 6, 3, 4, device=device), impl, mapped)


@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, device):
    for shape in ((2, 20, 5, 7), (1, 0, 3, 4)):
        call = make(*shape, device=device)
        tensors = tuple(call.tensors.values())
        checks.opcheck("affinity_attention", impl, *tensors, 0.5, True)
        checks.opcheck("affinity_attention_backward", impl, *call.output_gradients(), *tensors, 0.5, True)
