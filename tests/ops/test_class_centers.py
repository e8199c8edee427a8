"""class_centers: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import affinity
import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, LAYOUTS, Call, normal, runs
from left_out import light

from fastcss.ops import class_centers

OVER = pytest.mark.parametrize("over", ["pixels", "classes"])


def make(batch, classes, pixels, width, *, dtype=torch.float32, device="cpu", seed=0, over="pixels") -> Call:
    """Logits of standard deviation 2."""
    logits = (2 * normal(batch, classes, pixels, seed=seed)).to(device, dtype)
    feats = normal(batch, pixels, width, seed=seed + 1, dtype=dtype, device=device)
    return Call(class_centers, {"logits": logits, "feats": feats}, {"over": over})


CASES = {
    "one element": (1, 1, 1, 1),
    "no images": (0, 2, 5, 3),
    "no features": (2, 3, 5, 0),
    "one pixel": (2, 21, 1, 33),
    "two pixels": (3, 2, 2, 21),
    "one class": (1, 1, 97, 33),
    "one feature": (1, 21, 31, 1),
    "N 33": (3, 2, 33, 65),
    "C 21": (2, 21, 97, 150),
    "C 150": (1, 150, 150, 33),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"N 577": (2, 150, 577, 530), "N 1030": (1, 21, 1030, 150), "N 5000": (1, 3, 5000, 64)}


@OVER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case == "C 21" or (dtype == torch.float32 and case not in (*LARGE, "C 150")))
def test_values_and_gradients(impl, case, dtype, over, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device, over=over)
    affinity.assert_as_good_as_eager(call, impl, tolerances[dtype])


def test_the_reference_is_the_equation(device):
    """Σ_n w_cn f_n, the weights by hand."""
    call = make(1, 3, 4, 2, dtype=torch.float64, device=device)
    shares = call.tensors["logits"][0].exp()
    for over, mass in (("pixels", torch.ones_like(shares)), ("classes", shares.sum(0, keepdim=True))):
        (centers,) = call.having(over=over)("reference")
        for c in range(3):
            weights = [
                (shares[c, n] / mass[0, n]).item() if over == "classes" else shares[c, n].item() for n in range(4)
            ]
            for d in range(2):
                values = call.tensors["feats"][0, :, d].tolist()
                want = sum(map(float.__mul__, weights, values)) / sum(weights)
                assert centers[0, c, d].item() == pytest.approx(want)


# --- logits far apart, infinite, NaN ---------------------------------------------------------------------------------


@OVER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_class_that_hardly_is_there(impl, dtype, over, device, tolerances):
    """Its mass, e⁻²⁰⁰, is no float32, its centre is; the literal code gives 0 / 0."""
    call = make(2, 5, 70, 9, dtype=dtype, device=device, over=over)
    call.tensors["logits"][:, 2] -= 200
    call.tensors["logits"][:, 4] += 200
    dys = call.output_gradients()
    exact = call.leaves(torch.float64).results("reference", dys)
    got = call.leaves().results(impl, dys)
    # A difference of logits of 400 is rounded to 3e-5, and so is its exponential.
    tolerance = max(2 * tolerances[dtype], 3e-5)
    for name, want in exact.items():
        assert torch.linalg.vector_norm(got[name].double() - want) <= tolerance * torch.linalg.vector_norm(want), name
    centers, want = got["class_centers"][:, 2].double(), exact["class_centers"][:, 2]
    assert torch.linalg.vector_norm(centers - want) <= tolerance * torch.linalg.vector_norm(want)


@OVER
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_far_from_0(impl, over, device, tolerances):
    """Differences between these logits are exact, and the softmax must depend on nothing else."""
    call = make(2, 5, 70, 9, device=device, over=over)
    call = call.having(logits=2**14 + (call.tensors["logits"] * 64).round() / 64)
    affinity.assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@OVER
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_minus_infinity_takes_a_pixel_out(impl, over, device):
    call = make(2, 4, 70, 9, device=device, over=over)
    call.tensors["logits"][1, 2, 5] = -math.inf
    call.tensors["logits"][1, 3, 1:] = -math.inf  # the centre is that of one pixel
    dys = call.output_gradients()
    want, got = (call.leaves().results(name, dys) for name in ("reference", impl))
    torch.testing.assert_close(got["class_centers"][1, 3], call.tensors["feats"][1, 0])
    for name in want:
        assert want[name].isfinite().all()
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@OVER
@pytest.mark.parametrize("what", ["a class", "a pixel"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_minus_infinity_everywhere_is_nan(impl, what, over, device):
    """A class without pixels must be NaN, as in torch.softmax; so must a pixel without classes, but only if the softmax
    is over classes."""
    call = make(2, 4, 70, 9, device=device, over=over)
    call.tensors["logits"][(1, 2) if what == "a class" else (1, slice(None), 5)] = -math.inf
    want, got = call("reference")[0], call(impl)[0]
    torch.testing.assert_close(got, want, equal_nan=True)
    assert want[1].isnan().any() == (what == "a class" or over == "classes")
    assert want[0].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@OVER
@pytest.mark.parametrize(("name", "value"), [("logits", math.nan), ("feats", math.nan), ("feats", math.inf)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_and_inf_propagate(impl, name, value, over, device):
    for pixels in (4, 70):
        call = make(2, 4, pixels, 5, device=device, over=over)
        call.tensors[name][1, 2, 3] = value
        checks.assert_not_finite_as_reference(call, impl)


@OVER
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_infinity_is_nan(impl, over, device):
    call = make(2, 4, 70, 5, device=device, over=over)
    call.tensors["logits"][1, 2, 3] = math.inf
    want, got = call("reference")[0], call(impl)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert want[1, 2].isnan().all()


# --- strides ---------------------------------------------------------------------------------------------------------


@OVER
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout in ("NCHW", "a slice", "expanded batch"))
def test_any_strides(impl, layout, over, device, tolerances):
    call = make(2, 21, 66, 18, device=device, over=over).map(LAYOUTS[layout])
    dys = tuple(LAYOUTS[layout](dy) for dy in call.output_gradients())
    affinity.assert_as_good_as_eager(call, impl, tolerances[torch.float32], gradients=dys)


# --- the same again --------------------------------------------------------------------------------------------------


@OVER
@pytest.mark.parametrize("impl", COMPILED)
def test_results_are_bitwise_reproducible(impl, over, device):
    call = make(2, 21, 70, 18, dtype=torch.bfloat16, device=device, over=over)
    checks.assert_reproducible(call, impl)


@OVER
@pytest.mark.parametrize("shape", [(1, 21, 70, 18), (2, 150, 577, 150), (3, 5, 40, 70)])
def test_threads_do_not_change_results(shape, over):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*shape, dtype=dtype, over=over))


@OVER
@pytest.mark.parametrize("pixels", [3, 70])
@pytest.mark.parametrize("impl", COMPILED)
def test_an_image_does_not_depend_on_its_batch(impl, pixels, over, device):
    call = make(3, 21, pixels, 18, dtype=torch.bfloat16, device=device, over=over)
    checks.assert_batch_invariant(call, impl)


# --- autograd, torch.library, torch.compile, torch.vmap --------------------------------------------------------------


@OVER
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, over, device):
    checks.gradcheck(make(2, 3, 4, 2, dtype=torch.float64, device=device, over=over), impl)


@OVER
@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, over, device):
    checks.assert_slope(make(2, 7, 40, 18, device=device, over=over), impl)


@OVER
@pytest.mark.parametrize("needs", ["logits", "feats"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_gradient(impl, needs, over, device):
    call = make(2, 7, 40, 18, device=device, over=over)
    leaf = call.tensors[needs].clone().requires_grad_()
    (centers,) = call.having(**{needs: leaf})(impl)
    (dy,) = call.output_gradients()
    want = call.leaves().results("reference", (dy,))[f"d{needs}"]
    torch.testing.assert_close(torch.autograd.grad(centers, leaf, dy)[0], want, rtol=1e-4, atol=1e-5)


@OVER
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, over, device):
    checks.assert_once_differentiable(make(1, 3, 6, 4, device=device, over=over), impl)


@OVER
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, over, device):
    checks.assert_autocasts(make(2, 7, 20, 9, device=device, over=over), impl, device)


@OVER
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, over, device):
    checks.assert_compiles(make(2, 7, 20, 5, device=device, over=over), impl)


@OVER
@pytest.mark.parametrize("mapped", [("logits", "feats"), ("logits",), ("feats",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, over, device):
    checks.assert_maps(make(2, 3, 6, 4, device=device, over=over), impl, mapped)


@OVER
@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, over, device):
    """And what is saved for the backward pass is what the schema says."""
    for shape in ((2, 7, 20, 5), (0, 2, 3, 4)):
        logits, feats = make(*shape, device=device).tensors.values()
        saved = checks.opcheck("class_centers", impl, logits, feats, over == "classes")
        centers, class_lse, pixel_lse = saved
        if over == "classes":
            torch.testing.assert_close(pixel_lse.sum(1), logits.logsumexp(1))
            logits = logits - pixel_lse.sum(1, keepdim=True)
        else:
            assert pixel_lse.shape == (0,)
        torch.testing.assert_close(class_lse.sum(1), logits.logsumexp(2))
        logits, feats = make(*shape, device=device).tensors.values()
        checks.opcheck("class_centers_backward", impl, torch.ones_like(centers), logits, feats, *saved)
