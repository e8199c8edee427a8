"""bi_attention: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import dataclasses
import math

import calls
import checks
import pytest
import torch
from bi_inputs import ABOVE, CASES, FAR, LARGE, MASKS, TENSORS, make, make_far, rounded_once, some
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, LAYOUTS, assert_as_good_as_eager, normal, runs
from hypothesis import strategies as st
from torch import Tensor

from fastcss.ops import bi_attention

EACH_MASK = pytest.mark.parametrize("masks", [(), *((name,) for name in MASKS), MASKS], ids=" ".join)


@pytest.fixture(autouse=True)
def one_thread():
    """torch starts all threads for the smallest of tensors, and those of several processes wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    runs(bi_attention, impl, device, case in CASES and (dtype == torch.float32 or case == "D 5"))
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@EACH_MASK
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masks(impl, masks, device, tolerances):
    call = make(*CASES["D 5"], masks=masks, device=device)
    assert_as_good_as_eager(call, runs(bi_attention, impl, device, len(masks) == 1), tolerances[torch.float32])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_is_the_equation(impl, device):
    """By hand: logits that are logarithms, of which each side's share is a fraction."""
    runs(bi_attention, impl, device)
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
def test_scale(impl, scale, device, tolerances):
    """1 / √D unless told."""
    runs(bi_attention, impl, device, scale == -1.5)
    call = make(*CASES["D 5"], device=device)
    for one, other in zip(call(impl), call.having(scale=scale)(impl), strict=True):
        assert torch.equal(one, other) == (scale == 5**-0.5)
    assert_as_good_as_eager(call.having(scale=scale), impl, tolerances[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_logits(impl, dtype, device, tolerances):
    """The largest of a row or column is taken off before it is an exponent: all far below the batch's, or near it."""
    runs(bi_attention, impl, device, dtype == torch.float32)
    call = make(*CASES["D 5"], dtype=dtype, device=device)
    q = call.tensors["q"].clone()
    q[0] += 200
    q[:, 3] *= 50
    assert_as_good_as_eager(call.having(q=q), impl, tolerances[dtype])


# --- nothing to read -------------------------------------------------------------------------------------------------


@EACH_MASK
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masks_that_leave_nothing(impl, dtype, masks, device):
    """One sample's side is NaN, and nothing of the others."""
    runs(bi_attention, impl, device, dtype == torch.float32 and masks == MASKS)
    if not masks:
        pytest.skip("no mask, nothing masked")
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
    runs(bi_attention, impl, device)
    call = make(2, pixels, length, 2, 4, masks=MASKS if masked else (), device=device).leaves()
    got = call.results(impl, call.output_gradients())
    assert not any(tensor.count_nonzero() for tensor in got.values())
    lost = call.map(lambda tensor: tensor * math.nan if tensor.is_floating_point() else tensor)
    for got, want in zip(lost(impl), lost("reference"), strict=True):
        assert torch.equal(got, want)


# --- further apart than the model counts -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAR)
def test_what_the_floor_does_in_the_reference(case):
    """That these inputs floor what they say, and that it shows in the sides that they say."""
    call = make_far(case, masks=(), dtype=torch.float64)
    q, k, v_image, v_text = (tensor.transpose(1, 2) for tensor in call.tensors.values())
    logits = q @ k.mT / 4
    below = logits - logits.max()
    assert (below == below.float()).all()
    assert ((below + 50000).abs() > 0.4).all()
    assert (below < -50000).any() == (case != "nothing")
    assert (below < -ABOVE + 2).any()
    without = (logits.softmax(3) @ v_text, logits.mT.softmax(3) @ v_image)
    image, text = (
        (got.unflatten(2, (2, 16)) - want.transpose(1, 2)).abs().amax(dim=(2, 3)) > 1e-2
        for got, want in zip(call("reference"), without, strict=True)
    )  # [B, N], [B, L]: where the floor has changed anything
    rows = [i % 3 == 1 for i in range(11)]
    wanted = {
        "nothing": ([[False] * 11] * 2, [[False] * 6] * 2),
        "some entries of a row": ([rows] * 2, [[False] * 6] * 2),
        "a whole row": ([rows] * 2, [[False] * 6] * 2),
        "some entries of a column": ([[False] * 11] * 2, [[j == 2 for j in range(6)]] * 2),
        "a whole column": ([[False] * 11] * 2, [[j == 2 for j in range(6)]] * 2),
        "some of another sample": ([[False] * 11, [True] * 11], [[False] * 6, [True] * 6]),
        "all of another sample": ([[False] * 11, [True] * 11], [[False] * 6, [True] * 6]),
        "all but one": ([[i != 4 for i in range(11)], [True] * 11], [[j != 1 for j in range(6)], [True] * 6]),
    }
    assert (image.tolist(), text.tolist()) == wanted[case]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", [(), MASKS], ids=["all read", "masks"])
@pytest.mark.parametrize("case", FAR)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_further_apart_than_the_model_counts(impl, case, masks, dtype, device, tolerances):
    """Exact in 32 bits, so compared with that also in 16."""
    runs(bi_attention, impl, device, dtype == torch.float32 and masks == MASKS)
    call = dataclasses.replace(make_far(case, masks=masks, dtype=dtype, device=device), op=rounded_once)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_logits_are_a_peak_too(impl, device, tolerances):
    """As in the model, whose masks come after its floor."""
    runs(bi_attention, impl, device)
    for name, token in (("text_mask", 1), ("image_mask", 4)):
        call = make_far("all but one", masks=(name,), device=device)
        call.options[name][:] = False
        call.options[name][0, token] = True
        assert_as_good_as_eager(dataclasses.replace(call, op=rounded_once), impl, tolerances[torch.float32])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_gradient_through_the_floor(impl, device):
    runs(bi_attention, impl, device)
    call = make_far("all of another sample", device=device)
    got = call.leaves().results(impl, call.output_gradients())
    assert not got["dq"][1].count_nonzero()
    assert not got["dk"][1].count_nonzero()
    for name in ("dq", "dk"):
        assert got[name][0].count_nonzero()
    for name in ("dv_image", "dv_text"):
        assert got[name].count_nonzero(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_floored_text_is_read_alike(impl, device):
    """The mean of what is not masked."""
    runs(bi_attention, impl, device)
    call = make_far("all of another sample", device=device)
    image, text = call(impl)
    for side, value, mask in ((image, "v_text", "text_mask"), (text, "v_image", "image_mask")):
        mean = call.tensors[value][1][~call.options[mask][1]].mean(dim=0).flatten()
        torch.testing.assert_close(side[1], mean.expand_as(side[1]))


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_not_finite(impl, name, bad, device):
    """A logit of NaN is the peak of all samples; one of +∞ is NaN, and all others are below the floor.

    Gradients of such logits are clamp's, and not compared. Two things reach less far than in the literal code: an
    infinite logit of an image token that is masked, whose text is NaN there, and a value that is masked.
    """
    runs(bi_attention, impl, device, (name, bad) in (("k", math.inf), ("v_image", -math.inf)))
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
    runs(bi_attention, impl, device)
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
def test_any_strides(impl, layout, device, tolerances):
    runs(bi_attention, impl, device, layout == "NCHW")
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
def test_parts_of_one_projection(impl, device, tolerances):
    """q and v_image as the halves of one tensor, k and v_text of another: not contiguous, and no copies."""
    runs(bi_attention, impl, device, False)
    call = make(2, 37, 20, 2, 8, device=device)
    for pair in (("q", "v_image"), ("k", "v_text")):
        halves = torch.cat([call.tensors[name].flatten(2) for name in pair], dim=2).chunk(2, dim=2)
        call = call.having(**{n: half.unflatten(2, (2, 8)) for n, half in zip(pair, halves, strict=True)})
    assert not any(tensor.is_contiguous() for tensor in call.tensors.values())
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@EACH_MASK
@pytest.mark.parametrize(("impl", "examples"), [("composed", 8), ("cpu", 25), ("triton", 1)])
def test_any_shape_and_stride(impl, examples, masks, device, tolerances):
    runs(bi_attention, impl, device)
    most = (80, 40, 40) if impl != "triton" else (20, 20, 12)
    pixels, length, width = (st.integers(least, size) for least, size in zip((0, 0, 1), most, strict=True))
    shapes = st.tuples(st.integers(0, 3), pixels, length, st.integers(1, 4), width)

    def masked(*shape, seed):
        return make(*shape, masks=masks, device=device, seed=seed)

    calls.check_any_shape_and_stride(masked, shapes, impl, tolerances[torch.float32], examples)


# --- what others compute ---------------------------------------------------------------------------------------------


def in_its_module(features: dict[str, Tensor], masks: dict[str, Tensor], heads: int, width: int):
    """transformers' own module; its output, and that with ``bi_attention`` between its linear layers, by impl."""
    grounding_dino = pytest.importorskip("transformers.models.grounding_dino.modeling_grounding_dino")
    torch.manual_seed(0)
    image = features["image"]
    config = grounding_dino.GroundingDinoConfig(
        d_model=image.shape[2], encoder_ffn_dim=2 * heads * width, encoder_attention_heads=2 * heads
    )
    module = grounding_dino.GroundingDinoBiMultiHeadAttention(config).to(image.device, image.dtype).eval()

    def theirs() -> tuple[Tensor, Tensor]:
        found = module(features["image"], features["text"], masks.get("image_mask"), masks.get("text_mask"))
        return found[0][0], found[1][0]

    def ours(impl: str) -> tuple[Tensor, Tensor]:
        q, v_image = (f(features["image"]) for f in (module.vision_proj, module.values_vision_proj))
        k, v_text = (f(features["text"]) for f in (module.text_proj, module.values_text_proj))
        split = (tensor.unflatten(2, (heads, width)) for tensor in (q, k, v_image, v_text))
        image, text = bi_attention(*split, **masks, impl=impl)
        return module.out_vision_proj(image), module.out_text_proj(text)

    return module, theirs, ours


@EACH_MASK
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_in_place_of_transformers_own(impl, dtype, masks, device):
    """In its module, between its linear layers: both outputs and the gradients of all that goes in."""
    if dtype == torch.float64 and impl in COMPILED:
        pytest.skip(f"{impl}: no kernel of float64")
    runs(bi_attention, impl, device, masks == MASKS)
    features = {n: 3 * normal(2, t, 24, seed=t, dtype=dtype, device=device) for n, t in (("image", 19), ("text", 9))}
    features = {name: tensor.requires_grad_() for name, tensor in features.items()}
    unread = {n: some(2, 9 if n == "text_mask" else 19).to(device) for n in masks}
    module, theirs, ours = in_its_module(features, unread, 3, 8)
    douts = [normal(2, tokens, 24, seed=1, dtype=dtype, device=device) for tokens in (19, 9)]
    leaves = [*features.values(), *module.parameters()]
    found = [[*map(Tensor.detach, y), *torch.autograd.grad(y, leaves, douts)] for y in (ours(impl), theirs())]
    for got, want in zip(*found, strict=True):
        size = max(torch.linalg.vector_norm(want), 1e-3)  # a bias that shifts all logits alike has no gradient
        assert torch.linalg.vector_norm(got - want) <= (1e-5 if dtype == torch.float32 else 1e-13) * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masks", [(), MASKS], ids=["all read", "masks"])
@pytest.mark.parametrize("case", FAR)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_its_clamps_are_transformers_own(impl, case, masks, dtype, device):
    """Half of the features' channels are projected as they are to queries and keys, the others at random to values."""
    if dtype == torch.float64 and impl in COMPILED:
        pytest.skip(f"{impl}: no kernel of float64")
    runs(bi_attention, impl, device, masks == MASKS)
    call = make_far(case, masks=masks, dtype=dtype, device=device)
    sides = {"image": ("q", "v_image"), "text": ("k", "v_text")}
    features = {n: torch.cat([call.tensors[name].flatten(2) for name in side], 2) for n, side in sides.items()}
    module, theirs, ours = in_its_module(features, call.options, 2, 16)
    with torch.no_grad():
        eye = torch.eye(32, dtype=dtype, device=device)
        for linear in (module.vision_proj, module.text_proj):
            linear.weight.copy_(torch.cat([eye, 0 * eye], dim=1))
            linear.bias.zero_()
        for linear in (module.values_vision_proj, module.values_text_proj):
            linear.weight[:, :32] = 0
        for got, want in zip(ours(impl), theirs(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_its_clamps_at_random_weights(impl, device):
    """In float64, whose rounding decides nothing: weights 1,000 times their usual size."""
    features = {
        n: normal(2, t, 24, seed=t, dtype=torch.float64, device=device) for n, t in (("image", 37), ("text", 9))
    }
    module, theirs, ours = in_its_module(features, {}, 3, 8)
    with torch.no_grad():
        for linear in (module.vision_proj, module.text_proj):
            linear.weight.mul_(1000)
        q, k = module.vision_proj(features["image"]), module.text_proj(features["text"])
        logits = torch.einsum("bnhd,blhd->bhnl", q.unflatten(2, (3, 8)), k.unflatten(2, (3, 8))) / 8**0.5
        floored = logits - logits.max() < -50000
        assert floored.any()
        assert floored.all(dim=3).any()
        for got, want in zip(ours(impl), theirs(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
