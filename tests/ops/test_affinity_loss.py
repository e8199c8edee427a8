"""affinity_loss: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import affinity
import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, LAYOUTS, Call, normal, runs
from left_out import light
from torch.nn import functional as F

from fastcss.ops import affinity_loss

IGNORED = 255


def make(batch, pixels, keys, classes, *, ignored=0.2, dtype=torch.float32, device="cpu", seed=0, **options) -> Call:
    """Logits of standard deviation 2, and a share of the pixels ignored, another one in each image."""
    q, k = (normal(batch, pixels, keys, seed=seed + i, device=device) for i in (0, 1))
    q = (q * (2 / math.sqrt(max(keys, 1)))).to(dtype)
    generator = torch.Generator().manual_seed(seed + 2)
    labels = torch.randint(classes, (batch, pixels), generator=generator)
    labels[torch.rand(batch, pixels, generator=generator) < ignored] = IGNORED
    return Call(affinity_loss, {"q": q, "k": k.to(dtype)}, {"labels": labels.to(device), **options})


CASES = {
    "one element": (1, 1, 1, 1),
    "no images": (0, 5, 3, 2),
    "no pixels": (2, 0, 3, 2),
    "no keys": (2, 5, 0, 2),
    "two pixels": (3, 2, 3, 2),
    "one key": (1, 97, 1, 21),
    "N 31": (1, 31, 64, 150),
    "N 33": (3, 33, 65, 2),
    "N 97": (2, 97, 3, 21),
    "N 150": (1, 150, 64, 1),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"N 577": (2, 577, 64, 150), "N 1030": (1, 1030, 64, 21), "wide": (1, 390, 260, 5)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case == "N 97" or (dtype == torch.float32 and case not in LARGE))
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    affinity.assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scale(impl, device, tolerances):
    call = make(2, 70, 5, 9, device=device, scale=-0.37)
    affinity.assert_as_good_as_eager(call, impl, tolerances[torch.float32])
    (loss,) = call.having(scale=0.0)(impl)
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_is_cross_entropy_of_the_full_map(impl, device):
    call = make(2, 60, 16, 4, ignored=0, device=device).leaves()
    q, k = call.tensors.values()
    labels = call.options["labels"]
    same = (labels[:, :, None] == labels[:, None, :]).float()
    want = F.binary_cross_entropy_with_logits(q @ k.mT, same)
    (loss,) = call(impl)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(want, (q, k)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-8)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_ignored_pixels_take_no_part(impl, device):
    """Ignored pixels must count as if they were not there: cut out, or with other values."""
    call = make(1, 70, 5, 4, device=device)
    kept = call.options["labels"][0] != IGNORED
    assert 0 < kept.sum() < 70
    cut = call.map(lambda tensor: tensor[:, kept])
    dys = call.output_gradients()
    want = cut.leaves().results(impl, dys)
    other = call.having(q=call.tensors["q"].clone(), k=call.tensors["k"].clone())
    for tensor in other.tensors.values():
        tensor[:, ~kept] = 30.0
    for these in (call, other):
        got = these.leaves().results(impl, dys)
        torch.testing.assert_close(got["affinity_loss"], want["affinity_loss"])
        for name in ("dq", "dk"):
            torch.testing.assert_close(got[name][:, kept], want[name], rtol=1e-4, atol=1e-8)
            assert not got[name][:, ~kept].count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_all_ignored_is_zero(impl, dtype, device):
    call = make(2, 40, 5, 4, dtype=dtype, device=device)
    call = call.having(labels=torch.full_like(call.options["labels"], IGNORED)).leaves()
    got = call.results(impl, call.output_gradients())
    assert not any(tensor.count_nonzero() for tensor in got.values())  # NaN is not zero


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_label_maps_of_any_integers(impl, dtype, device):
    call = make(2, 60, 5, 4, device=device)
    labels = call.options["labels"]
    (want,) = call(impl)
    maps = {
        "flat": labels,
        "of h rows": labels.view(2, 6, 10),
        "transposed": labels.t().contiguous().t(),
        "every second": torch.stack([labels, labels], -1)[..., 0],
        "a map of columns": labels.view(2, 6, 10).mT.contiguous().mT,
    }
    found = [call.having(labels=changed.to(dtype), num_classes=4)(impl)[0] for changed in maps.values()]
    ignored = labels.where(labels != IGNORED, 77).to(dtype)
    found += call.having(labels=ignored, ignore_index=77, num_classes=4)(impl)
    if dtype.is_signed:
        ignored = labels.where(labels != IGNORED, -1).to(dtype)
        found += call.having(labels=ignored, ignore_index=-1, num_classes=4)(impl)
    for loss in found:
        torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_labels_may_be_any_numbers(impl, device):
    """A label is a name without num_classes, not a place in a table."""
    call = make(2, 60, 5, 4, device=device)
    labels = call.options["labels"]
    names = torch.tensor([2**31 - 1, 0, 254, 1_000_000], device=device)
    named = torch.where(labels == IGNORED, IGNORED, names[labels.clamp(max=3)])
    dys = call.output_gradients()
    want = call.leaves().results(impl, dys)
    got = call.having(labels=named).leaves().results(impl, dys)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-8)


# --- the ends of the sigmoid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", affinity.ENDS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda logit, dtype: logit in (-30, 10**4) and dtype != torch.float16)
def test_the_ends_of_the_sigmoid(impl, logit, dtype, device, tolerances):
    call = affinity.ENDS[logit](make(2, 70, 16, 4, dtype=dtype, device=device))
    logits = (call.tensors["q"] @ call.tensors["k"].mT).abs() * call.options.get("scale", 1)
    assert (logits > abs(logit) / 2).float().mean() > 0.1
    affinity.assert_as_good_as_eager(call, impl, tolerances[dtype], flat=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [20.0, 10.0, -20.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda logit, dtype: logit == 20 and dtype != torch.float16)
def test_perfect_and_worst_predictions(impl, logit, dtype, device, tolerances):
    """Every pair at ±20, on its side: the loss is 2e-9 a pair, which Σ max(s, 0) − Σ L s would lose in 20 − 20."""
    call = make(2, 97, 5, 4, dtype=dtype, device=device)
    ones = F.one_hot(call.options["labels"].clamp(max=3), 5).to(device, dtype)  # [B, N, 5], the last column 0
    q, k = ones.clone(), 2 * logit * ones
    q[..., 4], k[..., 4] = 1, -logit
    call = call.having(q=q, k=k)
    (loss,) = call("composed")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-2)
    affinity.assert_as_good_as_eager(call, impl, tolerances[dtype], flat=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda name, value: math.isnan(value) or name == "k")
def test_nan_and_inf_propagate(impl, name, value, device):
    for pixels in (20, 70):
        call = make(2, pixels, 5, 4, ignored=0, device=device)
        call.tensors[name][1, 2, 3] = value
        # The literal form of the loss is NaN at any infinite logit, ours where a pair is on the wrong side.
        nan_stays = math.isnan(value)
        checks.assert_not_finite_as_reference(call, impl, nan_stays)
        call.options["labels"][1, 2] = IGNORED
        assert call(impl)[0].isfinite()


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout in ("NCHW", "a slice", "expanded batch"))
def test_any_strides(impl, layout, device, tolerances):
    call = make(2, 66, 21, 5, device=device)
    call = call.having(**{name: LAYOUTS[layout](tensor) for name, tensor in call.tensors.items()})
    affinity.assert_as_good_as_eager(call, impl, tolerances[torch.float32])


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", COMPILED)
def test_results_are_bitwise_reproducible(impl, device):
    call = make(2, 70, 21, 18, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)


@pytest.mark.parametrize("shape", [(1, 70, 21, 18), (2, 577, 64, 150), (3, 40, 5, 2)])
def test_threads_do_not_change_results(shape):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*shape, dtype=dtype))


@pytest.mark.parametrize("pixels", [3, 70])
@pytest.mark.parametrize("impl", COMPILED)
def test_an_image_does_not_depend_on_ignored_ones(impl, pixels, device):
    """Bitwise; the loss is a mean over the batch, so the others must have no part in it."""
    call = make(3, pixels, 21, 18, ignored=0, dtype=torch.bfloat16, device=device)
    call.options["labels"][[0, 2]] = IGNORED
    dys = call.output_gradients()
    together = call.leaves().results(impl, dys)
    alone = {name: tensor[1:2] for name, tensor in call.tensors.items()}
    alone = call.having(**alone, labels=call.options["labels"][1:2]).leaves().results(impl, dys)
    assert torch.equal(together["affinity_loss"], alone["affinity_loss"])
    for name in ("dq", "dk"):
        assert torch.equal(together[name][1:2], alone[name])
        assert not together[name][[0, 2]].count_nonzero()


# --- autograd, torch.library, torch.compile, torch.vmap --------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, device):
    checks.gradcheck(make(2, 6, 3, 2, dtype=torch.float64, device=device, scale=0.7), impl)


@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, device):
    checks.assert_slope(make(2, 40, 21, 5, device=device, scale=0.7), impl)


@pytest.mark.parametrize("needs", ["q", "k"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_gradient(impl, needs, device):
    call = make(2, 40, 21, 5, device=device)
    leaf = call.tensors[needs].clone().requires_grad_()
    (loss,) = call.having(**{needs: leaf})(impl)
    (dy,) = call.output_gradients()
    want = call.leaves().results("reference", (dy,))[f"d{needs}"]
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, dy)[0], want, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(1, 6, 3, 2, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, device):
    checks.assert_autocasts(make(2, 20, 21, 4, device=device), impl, device)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 20, 5, 4, device=device), impl)


@pytest.mark.parametrize("mapped", [("q", "k"), ("q", "k", "labels"), ("k",), ("labels",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, device):
    checks.assert_maps(make(2, 6, 3, 2, device=device), impl, mapped)


@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, device):
    for shape in ((2, 20, 5, 3), (1, 0, 3, 2)):
        call = make(*shape, device=device)
        arguments = (*call.tensors.values(), call.options["labels"].int(), 0.5, IGNORED)
        loss = checks.opcheck("affinity_loss", impl, *arguments)
        checks.opcheck("affinity_loss_backward", impl, torch.ones_like(loss), *arguments)
