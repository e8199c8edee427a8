"""class_affinity: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import affinity
import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, LAYOUTS, Call, normal, runs
from left_out import light

from fastcss.composed.class_affinity import centers_first
from fastcss.ops import class_affinity


def make(batch, pixels, keys, width, classes, *, dtype=torch.float32, device="cpu", seed=0, **options) -> Call:
    """Logits of the affinities of standard deviation 2, and of the classes about 1: no softmax is a mere choice."""
    q, k = (normal(batch, pixels, keys, seed=seed + i, device=device) for i in (0, 1))
    feats = normal(batch, pixels, width, seed=seed + 2, device=device) * (2 / math.sqrt(max(pixels * width, 1)))
    centers = normal(batch, classes, width, seed=seed + 3, dtype=dtype, device=device)
    q = (q * (2 / math.sqrt(max(keys, 1)))).to(dtype)
    tensors = {"q": q, "k": k.to(dtype), "feats": feats.to(dtype), "centers": centers}
    return Call(class_affinity, tensors, options)


CASES = {
    "one element": (1, 1, 1, 1, 1),
    "no images": (0, 5, 3, 4, 2),
    "no pixels": (2, 0, 3, 4, 2),
    "no keys": (2, 5, 0, 3, 2),
    "no features": (2, 5, 3, 0, 2),
    "two pixels": (3, 2, 3, 21, 2),
    "one class": (1, 31, 64, 33, 1),
    "two classes": (3, 33, 65, 33, 2),
    "C 21": (1, 97, 3, 150, 21),
    "C 150": (2, 31, 64, 150, 150),
    # Here feats are gathered first, and the centres come after: C (N − D) > N D.
    "centers last": (2, 150, 3, 33, 150),
    "centers last, one feature": (1, 97, 64, 1, 21),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"N 577": (2, 577, 64, 150, 21), "N 1030": (1, 1030, 64, 180, 150)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case == "C 21" or (dtype == torch.float32 and case not in LARGE))
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    if max(call.tensors["feats"].shape) > 5:
        assert centers_first(call.tensors["feats"], call.tensors["centers"]) != case.startswith("centers last")
    affinity.assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize("classes", [7, 150])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scale_and_mean(impl, classes, device, tolerances):
    call = make(2, 70, 5, 9, classes, device=device, scale=-0.37, mean=True)
    call = call.having(feats=40 * call.tensors["feats"])
    affinity.assert_as_good_as_eager(call, impl, tolerances[torch.float32])
    for got, want in zip(call.having(mean=False)(impl), call(impl), strict=True):
        assert (got - want).abs().max() > 0.1


def test_the_reference_is_the_equation(device):
    """Each pixel by itself, from eq. 3.2 to 3.7."""
    call = make(2, 5, 3, 4, 3, dtype=torch.float64, device=device, scale=0.5, mean=True)
    q, k, feats, centers = call.tensors.values()
    intra, inter = call("reference")
    for b in range(2):
        for i in range(5):
            alike = torch.stack([torch.sigmoid(0.5 * q[b, i].dot(k[b, j])) for j in range(5)])
            for got, share in ((intra, alike), (inter, 1 - alike)):
                gathered = sum(share[j] * feats[b, j] for j in range(5)) / 5
                weights = torch.exp(torch.stack([gathered.dot(center) for center in centers[b]]))
                want = sum(w * center for w, center in zip(weights, centers[b], strict=True)) / weights.sum()
                torch.testing.assert_close(got[b, i], want, rtol=1e-12, atol=1e-12)


# --- the ends of the sigmoid and of the softmax ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", affinity.ENDS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda logit, dtype: logit in (-30, 10**4) and dtype != torch.float16)
def test_the_ends_of_the_sigmoid(impl, logit, dtype, device, tolerances):
    call = affinity.ENDS[logit](make(2, 70, 16, 64, 21, dtype=dtype, device=device))
    logits = (call.tensors["q"] @ call.tensors["k"].mT).abs() * call.options.get("scale", 1)
    assert (logits > abs(logit) / 2).float().mean() > 0.1
    affinity.assert_as_good_as_eager(call, impl, tolerances[dtype], flat=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_class_far_above_the_others(impl, dtype, device):
    """Class logits of thousands: the centre of that class, with gradients that are finite."""
    call = make(1, 70, 5, 8, 4, dtype=dtype, device=device)
    feats = torch.ones_like(call.tensors["feats"])
    centers = torch.arange(4, device=device, dtype=dtype)[None, :, None].expand(1, 4, 8).clone()
    call = call.having(feats=feats, centers=centers).leaves()
    got = call.results(impl, call.output_gradients())
    for name in ("intra", "inter"):
        assert torch.equal(got[name], torch.full_like(got[name], 3))
    assert all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize(
    ("name", "value"),
    # An infinite centre is not the same in both orders of the products: M F may cancel to a sign, F Cᵀ to NaN.
    [(name, value) for name in ("q", "k", "feats") for value in (math.nan, math.inf, -math.inf)]
    + [("centers", math.nan)],
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda name, value: math.isnan(value) or name == "k")
def test_nan_and_inf_propagate(impl, name, value, device):
    for pixels, classes in ((3, 2), (70, 9)):
        call = make(2, pixels, 5, 15, classes, device=device)
        call.tensors[name][1, 1, 3] = value
        checks.assert_not_finite_as_reference(call, impl)


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout in ("NCHW", "a slice", "expanded batch"))
def test_any_strides(impl, layout, device, tolerances):
    call = make(2, 66, 21, 18, 13, device=device)
    # dq is zero if all classes are equal, and one error of tanh counts 66 times if all features are.
    kept = {n: call.tensors[n] for n in ("feats", "centers") if layout == "expanded rows"}
    call = call.map(LAYOUTS[layout]).having(**kept)
    dys = tuple(LAYOUTS[layout](dy) for dy in call.output_gradients())
    affinity.assert_as_good_as_eager(call, impl, tolerances[torch.float32], gradients=dys)


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", COMPILED)
def test_results_are_bitwise_reproducible(impl, device):
    call = make(2, 70, 21, 38, 18, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)


@pytest.mark.parametrize("shape", [(1, 70, 21, 40, 18), (2, 577, 64, 150, 21), (3, 40, 5, 70, 150)])
def test_threads_do_not_change_results(shape):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*shape, dtype=dtype))


@pytest.mark.parametrize("pixels", [3, 70])
@pytest.mark.parametrize("impl", COMPILED)
def test_an_image_does_not_depend_on_its_batch(impl, pixels, device):
    call = make(3, pixels, 21, 38, 18, dtype=torch.bfloat16, device=device)
    checks.assert_batch_invariant(call, impl)


# --- autograd, torch.library, torch.compile, torch.vmap --------------------------------------------------------------

ORDERS = pytest.mark.parametrize("classes", [2, 40], ids=["centers first", "centers last"])


@ORDERS
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, classes, device):
    checks.gradcheck(make(2, 4, 3, 2, classes, dtype=torch.float64, device=device, scale=0.7, mean=True), impl)


@ORDERS
@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, classes, device):
    checks.assert_slope(make(2, 40, 21, 18, classes, device=device, scale=0.7), impl)


@pytest.mark.parametrize("needs", ["q", "k", "feats", "centers"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_gradient_and_one_output(impl, needs, device):
    """Asked for alone, a gradient is the same; and so where only one of the outputs goes on."""
    call = make(1, 40, 21, 18, 7, device=device)
    leaf = call.tensors[needs].clone().requires_grad_()
    _, inter = call.having(**{needs: leaf})(impl)
    dy, _ = call.output_gradients()
    want = call.leaves().results("reference", (torch.zeros_like(dy), dy))[f"d{needs}"]
    torch.testing.assert_close(torch.autograd.grad(inter, leaf, dy)[0], want, rtol=1e-4, atol=1e-5)


@ORDERS
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, classes, device):
    checks.assert_once_differentiable(make(1, 6, 3, 4, classes, device=device), impl)


@ORDERS
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, classes, device):
    checks.assert_autocasts(make(2, 20, 21, 8, classes, device=device), impl, device)


@ORDERS
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, classes, device):
    checks.assert_compiles(make(2, 20, 5, 7, classes, device=device), impl)


@ORDERS
@pytest.mark.parametrize("mapped", [("q", "k", "feats", "centers"), ("q",), ("feats",), ("centers",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, classes, device):
    checks.assert_maps(make(2, 6, 3, 4, classes, device=device), impl, mapped)


@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, device):
    """And what is saved for the backward pass is T P, in float32."""
    for shape in ((2, 20, 5, 7, 3), (1, 0, 3, 4, 2)):
        tensors = q, k, feats, centers = tuple(make(*shape, device=device).tensors.values())
        *_, nothing = checks.opcheck("class_affinity", impl, *tensors, 0.5, True, False)
        assert nothing.shape == (0,)
        intra, inter, tp = checks.opcheck("class_affinity", impl, *tensors, 0.5, True, True)
        torch.testing.assert_close(tp, torch.tanh(0.25 * q @ k.mT) @ (feats @ centers.mT))
        checks.opcheck("class_affinity_backward", impl, intra, inter, *tensors, tp, 0.5, True)
