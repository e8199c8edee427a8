"""top_margin: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import calls
import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, LAYOUTS, Call, normal, runs
from left_out import light
from torch import Tensor

from fastcss.composed import top_margin as composed
from fastcss.ops import top_margin

IGNORED = 255
LABELLED = pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])


def make(
    batch, classes, pixels, *, labelled=True, ignored=0.2, dtype=torch.float32, device="cpu", seed=0, whole=False
) -> Call:
    """Logits of standard deviation 2, ``whole``: whole numbers, many of them equal; and a share of pixels ignored."""
    logits = 2 * normal(batch, classes, pixels, seed=seed)
    logits = (logits.round() if whole else logits).to(device, dtype)
    if not labelled:
        return Call(top_margin, {"logits": logits})
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(classes, (batch, pixels), generator=generator)
    labels[torch.rand(batch, pixels, generator=generator) < ignored] = IGNORED
    return Call(top_margin, {"logits": logits}, {"labels": labels.to(device)})


CASES = {
    "one pixel": (1, 2, 1),
    "no images": (0, 3, 5),
    "no pixels": (2, 3, 0),
    "two classes": (3, 2, 97),
    "N 2": (1, 65, 2),
    "C 21": (2, 21, 97),
    "C 150": (1, 150, 33),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"N 577": (2, 150, 577), "N 5000": (1, 3, 5000), "C 1030": (1, 1030, 66)}


@LABELLED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case == "C 21" or (dtype == torch.float32 and case not in LARGE))
def test_values_and_gradients(impl, case, dtype, labelled, device, tolerances):
    call = make(*(CASES | LARGE)[case], labelled=labelled, dtype=dtype, device=device)
    calls.assert_as_good_as_eager(call, impl, tolerances[dtype])


@LABELLED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_far_from_0(impl, labelled, device, tolerances):
    """Differences between these logits are exact, and the softmax must depend on nothing else."""
    call = make(2, 5, 70, labelled=labelled, device=device)
    call = call.having(logits=2**14 + (call.tensors["logits"] * 64).round() / 64)
    calls.assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_are_the_equations(impl, device):
    """One pixel by hand: softmax(log 4, log 3, log 2, log 1) = 0.4, 0.3, 0.2, 0.1."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=device).log()
    want = {
        None: (math.log(4 / 3), 1, 0.4, 0.3, 0.7 - 0.01),
        0: (math.log(4 / 3), 1, 0.4, 0.3, 0.7 - 0.01),
        2: (math.log(2 / 4), 0, 0.2, 0.4, 0.6 - 0.04),
    }
    for label, figures in want.items():
        labels = None if label is None else torch.tensor([label], device=device)
        found = top_margin(logits, labels, impl=impl)
        assert [x.item() for x in found] == pytest.approx(figures, abs=1e-6)


# --- equal logits, infinite ones, NaN --------------------------------------------------------------------------------


def rivals(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Find the rivals among logits that are whole numbers: the largest of the others, and the first of equal ones."""
    rank = 10_000 * logits.double() - torch.arange(logits.shape[1], device=logits.device)[:, None]
    true = rank.argmax(dim=1) if labels is None else labels
    rival = rank.scatter(1, true.where(true != IGNORED, 0)[:, None], -math.inf).argmax(dim=1)
    return rival.where(true != IGNORED, -1)


@LABELLED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda dtype: dtype == torch.bfloat16)
def test_of_equal_logits_the_lower_class_wins(impl, dtype, labelled, device):
    for shape in ((2, 2, 66), (2, 33, 70), (1, 150, 40)):
        call = make(*shape, labelled=labelled, dtype=dtype, device=device, whole=True)
        logits, labels = call.tensors["logits"], call.options.get("labels")
        assert torch.equal(call.outputs(impl)["rival"], rivals(logits, labels))
        flat = call.having(logits=torch.zeros_like(logits))
        assert torch.equal(flat.outputs(impl)["rival"], rivals(flat.tensors["logits"], labels))


@LABELLED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_is_above_all(impl, dtype, labelled, device):
    """The first of them; and its pixel is NaN, and no other, forward and backward."""
    call = make(2, 21, 70, labelled=labelled, ignored=0, dtype=dtype, device=device)
    for classes, pixel in (((3,), 5), ((4, 9), 6), ((20,), 7), (slice(None), 8)):
        call.tensors["logits"][1, classes, pixel] = math.nan
    want, got = (call.outputs(name) for name in ("reference", impl))
    assert torch.equal(got["rival"], want["rival"])
    for name in ("margin", "p_true", "p_rival", "curvature"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
    if not labelled:
        assert (got["rival"][1, 6], got["rival"][1, 8]) == (9, 1)
        assert got["margin"][1, 5:9].isnan().all()
    dlogits = call.leaves().results(impl, call.output_gradients())["dlogits"]
    assert set(dlogits.mT.isfinite().all(2).logical_not().nonzero()[:, 1].tolist()) == {5, 6, 7, 8}


@LABELLED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_minus_infinity_is_no_class(impl, labelled, device):
    """If all other logits are −∞, the first of them must be the rival, with probability 0."""
    call = make(2, 5, 70, labelled=labelled, ignored=0, device=device)
    logits = call.tensors["logits"]
    logits[0, 2] = -math.inf
    logits[1, :, 3] = -math.inf
    true = 4 if not labelled else call.options["labels"][1, 3]
    logits[1, true, 3] = 1.5
    want, got = (call.outputs(name) for name in ("reference", impl))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
    assert (got["margin"][1, 3], got["rival"][1, 3], got["p_rival"][1, 3]) == (math.inf, int(true == 0), 0)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_ignored_pixels_are_zero(impl, device):
    """Ignored pixels must be zero even if their logits are not finite."""
    call = make(2, 7, 70, device=device)
    ignored = call.options["labels"] == IGNORED
    assert ignored.any()
    call.tensors["logits"][1, 3, ignored[1].nonzero()[0]] = math.inf
    dys = call.output_gradients()
    got = call.leaves().results(impl, dys)
    for name in ("margin", "p_true", "p_rival", "curvature"):
        assert not got[name][ignored].count_nonzero(), name
    assert (got["rival"][ignored] == -1).all()
    if impl in COMPILED:
        assert not got["dlogits"].mT[ignored].count_nonzero()
    everything = call.having(labels=torch.full_like(call.options["labels"], IGNORED))
    assert (everything.outputs(impl)["rival"] == -1).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_maps_of_any_integers(impl, dtype, device):
    """[B, C, H, W] and [B, H, W] are the flat ones."""
    call = make(2, 7, 60, device=device)
    logits, labels = call.tensors["logits"].unflatten(2, (6, 10)), call.options["labels"].view(2, 6, 10)
    want = call.outputs(impl)
    strided = labels.to(dtype).mT.contiguous().mT
    found = [top_margin(logits, labels.to(dtype), impl=impl), top_margin(logits, strided, impl=impl)]
    found += [top_margin(logits, labels.where(labels != IGNORED, 9).to(dtype), ignore_index=9, impl=impl)]
    if dtype.is_signed:
        masked = labels.where(labels != IGNORED, -1).to(dtype)
        found += [top_margin(logits.contiguous(memory_format=torch.channels_last), masked, ignore_index=-1, impl=impl)]
    for one in found:
        for name, got in one._asdict().items():
            torch.testing.assert_close(got.flatten(1), want[name], msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_label_out_of_range_gives_nan(impl, dtype, device):
    """If the host cannot read the labels before, the rival must be -1 and the rest NaN; pixels beside it as ever."""
    call = make(2, 7, 70, ignored=0, dtype=dtype, device=device)
    logits, labels = call.tensors["logits"], call.options["labels"].clone()
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    for pixel, label in ((0, 7), (9, -1), (33, 2**40), (69, -(2**40))):
        labels[1, pixel], wrong[1, pixel] = label, True
    raw = checks.raw("top_margin", impl) if impl != "composed" else composed.top_margin
    found = raw(logits, labels, IGNORED)
    want = call.outputs(impl)
    assert (found[1][wrong] == -1).all()
    for name, got in zip(want, found, strict=False):
        assert name == "rival" or got[wrong].isnan().all(), name
        assert torch.equal(got[~wrong], want[name][~wrong]), name
    if impl != "composed":
        ones = [torch.ones_like(found[0])] * 4
        dlogits = checks.raw("top_margin_backward", impl)(*ones, logits, found[5], found[1], found[6])
        want = call.leaves().results(impl, (ones[0],) * 5)["dlogits"]
        assert torch.equal(dlogits.mT[~wrong], want.mT[~wrong])


# --- strides ---------------------------------------------------------------------------------------------------------


@LABELLED
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout in ("NCHW", "a slice", "expanded batch"))
def test_any_strides(impl, layout, labelled, device, tolerances):
    call = make(2, 21, 66, labelled=labelled, device=device)
    call = call.having(logits=LAYOUTS[layout](call.tensors["logits"]))
    if labelled:
        labels = call.options["labels"]
        call.options["labels"] = labels[:1].expand(labels.shape) if layout == "expanded batch" else labels.T.clone().T
    calls.assert_as_good_as_eager(call, impl, tolerances[torch.float32])


# --- the same again, autograd, torch.library, torch.compile, torch.vmap -----------------------------------------------


@LABELLED
@pytest.mark.parametrize("impl", COMPILED)
def test_reproducible_and_of_its_image_alone(impl, labelled, device):
    call = make(3, 21, 70, labelled=labelled, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl)


@pytest.mark.parametrize("shape", [(1, 21, 70), (2, 150, 577)])
def test_threads_do_not_change_results(shape):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*shape, dtype=dtype))


@LABELLED
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, labelled, device):
    checks.gradcheck(make(2, 4, 5, labelled=labelled, dtype=torch.float64, device=device), impl)


@LABELLED
@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, labelled, device):
    checks.assert_slope(make(2, 7, 40, labelled=labelled, device=device), impl)


@pytest.mark.parametrize("output", ["margin", "p_true", "p_rival", "curvature"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradient_of_one_output(impl, output, device):
    call = make(2, 7, 40, device=device).leaves()
    (logits,) = call.tensors.values()
    want, got = (torch.autograd.grad(call.outputs(name)[output].sum(), logits)[0] for name in ("reference", impl))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(1, 4, 6, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 7, 20, device=device), impl)


@pytest.mark.parametrize("mapped", [("logits", "labels"), ("logits",), ("labels",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_vmap(impl, mapped, device):
    labelled = mapped != ("logits",)
    checks.assert_maps(make(2, 5, 6, labelled=labelled, device=device), impl, mapped)


@LABELLED
@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, labelled, device):
    """And what is saved for the backward pass is what the schema says."""
    for shape in ((2, 7, 20), (0, 2, 4), (1, 2, 0)):
        call = make(*shape, ignored=0, device=device)
        (logits,), labels = call.tensors.values(), call.options["labels"]
        given = labels if labelled else labels.new_empty(0)
        margin, rival, *_, true, p_first = checks.opcheck("top_margin", impl, logits, given, IGNORED)
        assert torch.equal(true, labels if labelled else logits.argmax(1))
        torch.testing.assert_close(p_first, logits.softmax(1).amax(1))
        ones = [torch.ones_like(margin)] * 4
        checks.opcheck("top_margin_backward", impl, *ones, logits, true, rival, p_first)
