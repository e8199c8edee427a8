"""bi_attention: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import checks
import pytest
import torch
from bi_inputs import CASES, EACH_MASK, LARGE, MASKS, TENSORS, make
from calls import DTYPES, IMPLEMENTATIONS, LAYOUTS, assert_as_good_as_eager
from left_out import light, points

from fastcss.ops import bi_attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case in CASES and (dtype == torch.float32 or case == "D 5"))
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@EACH_MASK
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda masks: len(masks) == 1)
def test_masks(impl, masks, device, tolerances):
    call = make(*CASES["D 5"], masks=masks, device=device)
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_is_the_equation(impl, device):
    """The results are worked out by hand: the logits are logarithms, so each side's weights are fractions."""
    weights = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 1.0]], device=device)  # [N, L]
    q, k = weights.log().view(1, 2, 1, 3), torch.eye(3, device=device).view(1, 3, 1, 3)
    v_text, v_image = (
        torch.tensor(rows, device=device).view(1, -1, 1, 1).expand(1, -1, 1, 3)
        for rows in ([10.0, 20.0, 40.0], [1.0, 2.0])
    )
    image, text = bi_attention(q, k, v_image, v_text, scale=1.0, impl=impl)
    assert image[0, :, 0].tolist() == pytest.approx([(10 + 40 + 200) / 8, (30 + 80 + 40) / 8])
    assert text[0, :, 0].tolist() == pytest.approx([7 / 4, 10 / 6, 7 / 6])
    unread = torch.tensor([[False, False, True]], device=device), torch.tensor([[True, False]], device=device)
    image, text = bi_attention(q, k, v_image, v_text, *unread, scale=1.0, impl=impl)
    assert image[0, :, 0].tolist() == pytest.approx([(10 + 40) / 3, (30 + 80) / 7])
    assert text[0, :, 0].tolist() == pytest.approx([2.0, 2.0, 2.0])


@pytest.mark.parametrize("scale", [5**-0.5, 0.0, -1.5, 3])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda scale: scale == -1.5)
def test_scale(impl, scale, device, tolerances):
    """1 / √D unless told."""
    call = make(*CASES["D 5"], device=device)
    for one, other in zip(call(impl), call.having(scale=scale)(impl), strict=True):
        assert torch.equal(one, other) == (scale == 5**-0.5)
    assert_as_good_as_eager(call.having(scale=scale), impl, tolerances[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype: dtype == torch.float32)
def test_large_logits(impl, dtype, device, tolerances):
    """The largest of a row or column is taken off before it is an exponent: all far below the batch's, or near it."""
    call = make(*CASES["D 5"], dtype=dtype, device=device)
    q = call.tensors["q"].clone()
    q[0] += 200
    q[:, 3] *= 50
    assert_as_good_as_eager(call.having(q=q), impl, tolerances[dtype])


# --- nothing to read -------------------------------------------------------------------------------------------------


@EACH_MASK
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype, masks: dtype == torch.float32 and masks == MASKS)
@points(lambda masks: bool(masks), "no mask, nothing masked")
def test_masks_that_leave_nothing(impl, dtype, masks, device):
    """One sample's side is NaN, and nothing of the others."""
    call = make(*CASES["D 5"], masks=masks, dtype=dtype, device=device)
    for name in masks:
        call.options[name][1] = True
    checks.assert_not_finite_as_reference(call, impl)
    image, text = call(impl)
    for side, lost in ((image, "text_mask" in masks), (text, "image_mask" in masks)):
        assert side[1].isnan().all() == lost
        assert side[[0, 2]].isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("pixels", "length"), [(0, 5), (37, 0), (0, 0)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tokens_to_read(impl, pixels, length, masked, device):
    """Are zeros, as a sum of nothing is, and so is every gradient; also of what is NaN."""
    call = make(2, pixels, length, 2, 4, masks=MASKS if masked else (), device=device).leaves()
    got = call.results(impl, call.output_gradients())
    assert not any(tensor.count_nonzero() for tensor in got.values())
    lost = call.map(lambda tensor: tensor * math.nan if tensor.is_floating_point() else tensor)
    for got, want in zip(lost(impl), lost("reference"), strict=True):
        assert torch.equal(got, want)


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda name, bad: (name, bad) in (("k", math.inf), ("v_image", -math.inf)))
def test_not_finite(impl, name, bad, device):
    """A logit of NaN is the peak of all samples; one of +∞ is NaN, and all others are below the floor.

    Gradients of such logits are clamp's, and not compared. Two things reach less far than in the literal code: an
    infinite logit of an image token that is masked, whose text is NaN there, and a value that is masked.
    """
    for sample, read in ((1, True), (2, False)):
        if name == "q" and math.isinf(bad) and not read:
            continue
        call = make(*CASES["D 5"], device=device)
        call.options["image_mask" if name in ("q", "v_image") else "text_mask"][sample, 3] = not read
        call.tensors[name][sample, 3, 1, 2] = bad
        dys = call.output_gradients()
        want, got = (call.leaves().results(form, dys) for form in ("reference", impl))
        assert not all(tensor.isfinite().all() for tensor in want.values())
        for side in ("image", "text"):
            torch.testing.assert_close(got[side], want[side], equal_nan=True, rtol=1e-4, atol=1e-5)
        for tensor in TENSORS if name in ("v_image", "v_text") else ():
            assert (got[f"d{tensor}"].isfinite() | ~want[f"d{tensor}"].isfinite()).all(), tensor


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_infinities_that_leave_something(impl, device):
    """Sample 0 has a logit of +∞: each other row of every sample reads all of the text alike."""
    call = make(*CASES["D 5"], masks=(), device=device)
    k, q = call.tensors["k"].clone(), call.tensors["q"].abs()
    q[0, 3, 1, 2] = math.inf
    k[..., 2] = torch.tensor([1.0, -1.0, 2.0, -2.0, -1.0], device=device)[:, None]
    call = call.having(q=q, k=k)
    want, got = (call(name) for name in ("reference", impl))
    assert want[0].isnan().any()
    assert want[1].isnan().any()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded tokens"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout == "NCHW")
def test_any_strides(impl, layout, device, tolerances):
    call = make(2, 37, 20, 2, 6, device=device)
    if layout == "expanded tokens":
        q, k = (call.tensors[name] for name in "qk")
        call = call.having(q=q[:, :1].expand(q.shape), k=k[:, :1].expand(k.shape))
    else:
        call = call.having(**{name: LAYOUTS[layout](tensor) for name, tensor in call.tensors.items()})
    call.options["text_mask"] = call.options["text_mask"][:1].expand(2, -1)
    call.options["image_mask"] = call.options["image_mask"].T.contiguous().T
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda: False)
def test_parts_of_one_projection(impl, device, tolerances):
    """q and v_image as the halves of one tensor, k and v_text of another: not contiguous, and no copies."""
    call = make(2, 37, 20, 2, 8, device=device)
    for pair in (("q", "v_image"), ("k", "v_text")):
        halves = torch.cat([call.tensors[name].flatten(2) for name in pair], dim=2).chunk(2, dim=2)
        call = call.having(**{n: half.unflatten(2, (2, 8)) for n, half in zip(pair, halves, strict=True)})
    assert not any(tensor.is_contiguous() for tensor in call.tensors.values())
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])
