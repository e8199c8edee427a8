"""deformable_attention: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import dataclasses
import math

import calls
import checks
import pytest
import torch
from calls import DTYPES, IMPLEMENTATIONS, LAYOUTS, NOT_OF_64_BITS, Call, normal
from deformable import CASES, LARGE, make, rounded_once
from left_out import light, points
from torch import Tensor

from fastcss.ops import deformable_attention

BOXES = pytest.mark.parametrize("box", [False, True], ids=["points", "boxes"])


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, **options) -> None:
    """Better: in 16 bits that code reads its values from other places. No location is rounded here, results are."""
    calls.assert_as_good_as_eager(dataclasses.replace(call, op=rounded_once), impl, tolerance, **options)


@BOXES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype, box: (case in CASES, case == "D 33", False)[box + (dtype != torch.float32)])
def test_values_and_gradients(impl, case, dtype, box, device, tolerances):
    call = make(*(CASES | LARGE)[case], box=box, dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@BOXES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda box: not box)
def test_reference_points_of_32_bits(impl, dtype, box, device, tolerances):
    """Are not rounded to the 16 of the rest, and neither is their gradient."""
    call = make(*CASES["D 5"], box=box, dtype=dtype, xy=torch.float32, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


def one_image(rows: list[list[float]], points: list[tuple[float, float]], logits: list[float], device: str) -> dict:
    """One head, one channel, one query at the image's centre; points in cells from the middle of the first."""
    value = torch.tensor(rows, device=device)
    height, width = value.shape
    at = torch.tensor(points, device=device) - torch.tensor([width / 2 - 0.5, height / 2 - 0.5], device=device)
    arguments = {"value": value.view(1, -1, 1, 1), "spatial_shapes": [(height, width)]}
    arguments |= {
        "reference_points": torch.full((1, 1, 1, 2), 0.5, device=device),
        "offsets": at.view(1, 1, 1, 1, -1, 2),
    }
    return arguments | {"logits": torch.tensor(logits, device=device).view(1, 1, 1, 1, -1)}


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_is_the_equation(impl, device):
    """The values are worked out by hand for the mean of four cells, a cell's middle, points with a half and three
    quarters outside, and one beyond."""
    points = [(0.5, 0.5), (1.0, 0.0), (-0.5, 0.0), (2.5, 1.5), (5.0, 0.0), (0.25, 0.0)]
    want = [(1 + 2 + 4 + 5) / 4, 2.0, 1 / 2, 6 / 4, 0.0, 1.25]
    for point, figure in zip(points, want, strict=True):
        alone = one_image([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [point], [7.0], device)
        assert deformable_attention(**alone, impl=impl).item() == pytest.approx(figure, abs=1e-6), point
    shares = [math.log(n) for n in (1, 2, 3, 4, 5, 6)]
    together = one_image([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], points, shares, device)
    figure = sum(n * y for n, y in enumerate(want, 1)) / 21
    assert deformable_attention(**together, impl=impl).item() == pytest.approx(figure, abs=1e-6)
    # Six points, six halves of a box a sixth as large: half the box's width and height from the centre.
    box = torch.tensor([0.5, 0.5, 1.0, 0.5], device=device).view(1, 1, 1, 4)
    moved = together | {"reference_points": box, "offsets": torch.full_like(together["offsets"], 6.0)}
    assert deformable_attention(**moved, impl=impl).item() == pytest.approx(6 / 2, abs=1e-6)


@BOXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda box: not box)
def test_outside_of_the_picture_all_is_zero(impl, dtype, box, device):
    """And every gradient."""
    call = make(*CASES["D 5"], box=box, dtype=dtype, device=device)
    offsets = call.tensors["offsets"]
    call = call.having(offsets=torch.where(offsets > 0, 200.0, -200.0).to(dtype)).leaves()
    got = call.results(impl, call.output_gradients())
    assert not any(tensor.count_nonzero() for tensor in got.values())


# --- locations, values and logits that are not finite ----------------------------------------------------------------


@BOXES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["reference_points", "offsets"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda name, bad, box: not box and math.isnan(bad) == (name == "offsets") and bad != math.inf)
@points(lambda impl, device: impl != "composed" or device != "cuda", "grid_sample reads nothing there on CUDA")
def test_a_location_that_is_not_finite(impl, name, bad, box, device):
    """Is NaN where it is read, and nothing elsewhere."""
    call = make(*CASES["D 5"], box=box, device=device)
    call.tensors[name][1, 3, 0, 0, ...] = bad
    call.tensors[name][0, 5, 1, ..., 1] = bad
    dys = call.output_gradients()
    want = call.map(Tensor.cpu).leaves().results("reference", tuple(dy.cpu() for dy in dys))
    got = call.leaves().results(impl, dys)
    assert want["deformable_attention"].isnan().any()
    assert want["dvalue"].isfinite().all()
    for result in ("deformable_attention", "dvalue", "dlogits"):
        torch.testing.assert_close(got[result].cpu(), want[result], equal_nan=True, rtol=1e-4, atol=1e-5)


@BOXES
@pytest.mark.parametrize("far", [1e5, 1e10, 1e30])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda far, box: far == 1e30 and not box)
def test_far_away_nothing_is_read(impl, far, box, device):
    """Further than integers count."""
    call = make(*CASES["D 5"], box=box, device=device)
    call.tensors["reference_points"][0, 3, 0, 0] = far
    call.tensors["offsets"][1, 4, 1, 1, 2, 1] = -far
    dys = call.output_gradients()
    want, got = (call.leaves().results(name, dys) for name in ("reference", impl))
    for result in want:
        assert want[result].isfinite().all(), result
        torch.testing.assert_close(got[result], want[result], rtol=1e-4, atol=1e-4, msg=result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype: dtype == torch.float32)
def test_what_no_point_reads_does_not_matter(impl, dtype, device):
    call = make(2, ((9, 13), (3, 4)), 5, 2, 16, 3, dtype=dtype, device=device)
    dys = call.output_gradients()
    want = call.leaves().results(impl, dys)
    read = want["dvalue"].count_nonzero(dim=3)[..., None] > 0
    assert read.any()
    assert not read.all()
    holes = call.having(value=call.tensors["value"].where(read, math.nan))
    got = holes.leaves().results(impl, dys)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
    read_too = holes.tensors["value"].clone()
    read_too.view(-1, 16)[read.flatten().nonzero()[0], 3] = math.nan
    checks.assert_not_finite_as_reference(holes.having(value=read_too), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype: dtype == torch.float32)
def test_logits_of_infinity(impl, dtype, device, tolerances):
    """A point of −∞ has no part; where all are, or one is +∞ or NaN, the query's head is NaN."""
    call = make(*CASES["D 5"], dtype=dtype, device=device)
    logits = call.tensors["logits"]
    logits[0, 3, 1, 0, 2] = logits[1, 4, 0, 1] = -math.inf
    assert_as_good_as_eager(call, impl, tolerances[dtype])
    logits[0, 1, 2] = -math.inf
    logits[1, 2, 1, 1, 3] = math.inf
    logits[1, 6, 0, 0, 0] = math.nan
    call.tensors["reference_points"][1, 6] = 9  # where nothing is read, too
    lost = call(impl)[0].unflatten(2, (3, 5)).isnan()
    assert lost.all(3).nonzero().tolist() == lost.any(3).nonzero().tolist() == [[0, 1, 2], [1, 2, 1], [1, 6, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype: dtype == torch.float32)
def test_large_logits(impl, dtype, device, tolerances):
    """The largest of a head is taken off before it is an exponent."""
    call = make(*CASES["D 5"], dtype=dtype, device=device)
    call = call.having(logits=30 * call.tensors["logits"] + 60000 - 60000 * (dtype != torch.float32))
    assert_as_good_as_eager(call, impl, tolerances[dtype])


# --- strides ---------------------------------------------------------------------------------------------------------


@BOXES
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded levels"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout, box: layout == "NCHW" and not box)
def test_any_strides(impl, layout, box, device, tolerances):
    """One reference point for all levels, as the model has them, if no level is larger than another."""
    call = make(
        2, ((5, 4),) * 3 if layout == "expanded levels" else ((5, 7), (3, 4)), 9, 2, 18, 3, box=box, device=device
    )
    points = call.tensors["reference_points"]
    if layout == "expanded levels":
        offsets = call.tensors["offsets"]
        call = call.having(reference_points=points[:, :, :1].expand(points.shape))
        call = call.having(offsets=offsets[:, :, :, :1].expand(offsets.shape))
    else:
        change = LAYOUTS[layout]
        kept = {"reference_points": points} if layout == "expanded rows" else {}
        call = call.having(**{name: change(tensor) for name, tensor in call.tensors.items()} | kept)
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


# --- what others compute ---------------------------------------------------------------------------------------------


@BOXES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@NOT_OF_64_BITS
def test_in_place_of_transformers_own(impl, dtype, box, device):
    """The output and all inputs' gradients must be those of transformers' module, between its linear layers, with
    padding."""
    grounding_dino = pytest.importorskip("transformers.models.grounding_dino.modeling_grounding_dino")
    torch.manual_seed(0)
    config = grounding_dino.GroundingDinoConfig(d_model=24, num_feature_levels=3)
    module = grounding_dino.GroundingDinoMultiscaleDeformableAttention(config, num_heads=3, n_points=4).to(
        device, dtype
    )
    shapes = [(6, 9), (3, 5), (2, 3)]
    tokens = sum(h * w for h, w in shapes)
    kept = torch.ones(2, tokens, dtype=torch.bool, device=device)
    kept[1, ::3] = False
    hidden, image = (normal(2, n, 24, seed=n, dtype=dtype, device=device) for n in (11, tokens))
    points = make(2, shapes, 11, 1, 1, 1, box=box, device=device).tensors["reference_points"].to(dtype)
    inputs = [tensor.requires_grad_() for tensor in (3 * hidden, image, points)]

    def theirs() -> Tensor:
        return module(
            inputs[0], kept, inputs[1], reference_points=inputs[2], spatial_shapes=torch.tensor(shapes, device=device),
            spatial_shapes_list=shapes,
        )[0]  # fmt: skip

    def ours() -> Tensor:
        value = module.value_proj(inputs[1]).masked_fill(~kept[..., None], 0).unflatten(2, (3, 8))
        offsets = module.sampling_offsets(inputs[0]).unflatten(2, (3, 3, 4, 2))
        logits = module.attention_weights(inputs[0]).unflatten(2, (3, 3, 4))
        return module.output_proj(deformable_attention(value, shapes, inputs[2], offsets, logits, impl=impl))

    dout = normal(2, 11, 24, seed=1, dtype=dtype, device=device)
    leaves = [*inputs, *module.parameters()]
    found = [[y.detach(), *torch.autograd.grad(y, leaves, dout)] for y in (ours(), theirs())]
    for got, want in zip(*found, strict=True):
        error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
        assert error <= (1e-5 if dtype == torch.float32 else 1e-13)
