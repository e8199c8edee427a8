"""cost_filter: every implementation × dtype × shape, forward and backward, against the float64 reference."""

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
from fastcss.ops import cost_filter

SHARED = pytest.mark.parametrize("shared", [True, False], ids=["text", "text of each image"])


def make(
    batch, height, width, channels, classes, prompts, k, *, shared=True, dtype=torch.float32, device="cpu", seed=0
) -> Call:
    """Rows of any length, and scores of the kept classes that no dtype's rounding brings into another order.

    One pixel is the first axis, with which the first prompt of k + 1 classes has a cosine between 0.98 and 0.5; the
    second axis keeps the other pixels away from all text.
    """
    image = unit(normal(batch, height, width, channels, seed=seed))
    text = normal(1 if shared else batch, classes, prompts, channels, seed=seed + 1)
    if channels > 2:
        text[..., :2], image[..., 0], image[..., 1] = 0, 0, 2
    image[:, -1, :1] = torch.eye(channels)[0]
    best = min(k + 1, classes)
    cosine = torch.zeros(text.shape[:2])
    for i in range(len(text)):
        kept = torch.randperm(classes, generator=torch.Generator().manual_seed(seed + i))[:best]
        cosine[i, kept] = torch.linspace(0.98, 0.5, best)
    text = unit(text)
    text[..., 0, :] *= (1 - cosine.square()).sqrt()[..., None]
    text[..., 0, 0] += cosine
    image, text = (t * (1 + 2 * normal(*t.shape[:-1], 1, seed=seed + 2).abs()) for t in (image, text))
    image, text = (t.to(device, dtype) for t in (image, text))
    return Call(cost_filter, {"image": image, "text": text[0] if shared else text}, {"k": k})


def peers(call: Call, name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradient of a cosine is what is left of that of a product: nothing, where the two rows are parallel."""
    image, text = (tensor.double() for tensor in call.tensors.values())
    text = text.expand(len(image), *text.shape[-3:]).take_along_dim(exact["index"][:, :, None, None], dim=1)
    dcost = dys[0].double()
    products = {
        "dimage": torch.einsum("bkphw,bkpd->bhwd", dcost, unit(text)) / image.norm(dim=-1, keepdim=True),
        "dtext": torch.einsum("bkphw,bhwd->bkpd", dcost, unit(image)) / text.norm(dim=-1, keepdim=True),
    }
    return [exact[name], *(products[n] for n in (name,) if n in products)]


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, **options) -> None:
    calls.assert_as_good_as_eager(call, impl, tolerance, peers=functools.partial(peers, call), **options)


CASES = {
    "one element": (1, 1, 1, 1, 1, 1, 1),
    "no images": (0, 3, 4, 5, 6, 2, 3),
    "one class": (2, 3, 5, 33, 1, 3, 2),
    "one pixel": (2, 1, 1, 33, 20, 2, 5),
    "k 1": (2, 5, 7, 33, 20, 1, 1),
    "k = T": (3, 4, 5, 21, 12, 2, 12),
    "k > T": (1, 4, 5, 21, 12, 1, 100),
    "P 3": (2, 5, 9, 65, 21, 3, 7),
    "T 59": (1, 7, 11, 150, 59, 1, 16),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"HW 576": (2, 24, 24, 130, 59, 1, 9), "P 80": (1, 12, 13, 65, 20, 80, 5), "T 847": (1, 9, 9, 40, 847, 1, 9)}


@SHARED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype, shared: case not in (*LARGE, "T 59") if dtype == torch.float32 else case == "P 3" and shared)
def test_values_and_gradients(impl, case, dtype, shared, device, tolerances):
    call = make(*(CASES | LARGE)[case], shared=shared, dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


def test_the_reference_is_the_equations(device):
    """(5.2) to (5.6), one cosine at a time."""
    call = make(1, 2, 3, 4, 5, 2, 2, dtype=torch.float64, device=device)
    image, text = call.tensors["image"][0].flatten(0, 1), call.tensors["text"]
    found = call.outputs("reference")
    cosine = torch.tensor(
        [[[pixel.dot(prompt) / (pixel.norm() * prompt.norm()) for pixel in image] for prompt in c] for c in text]
    )
    order = sorted(range(5), key=lambda c: -cosine[c].max().item())[:2]
    assert found["index"].tolist() == [order]
    torch.testing.assert_close(found["cost"][0].flatten(2), cosine[order].double().to(device), rtol=1e-6, atol=1e-6)


# --- ties, rows of zeros, NaN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda dtype: dtype == torch.bfloat16)
def test_of_equal_scores_the_lower_class_is_first(impl, dtype, device):
    """Lengths are powers of two: the cosines are 1, 0.5 and 0 in any dtype."""
    axes = torch.eye(8)
    half = axes[0] + axes[5] + axes[6] + axes[7]
    rows = [half, axes[1], axes[6], 2 * axes[0], 4 * half, axes[5], axes[2] / 2, -axes[0], 2 * half, 8 * axes[3]]
    text = torch.stack(rows)[:, None].to(device, dtype)
    image = torch.stack([2 * axes[:4], axes[:4].flip(0) / 4]).view(2, 2, 2, 8).to(device, dtype)
    found = cost_filter(image, text, 10, impl=impl)
    assert found.score[0].tolist() == [1] * 4 + [0.5] * 3 + [0] * 3
    for row in found.index:
        assert row.tolist() == [1, 3, 6, 9, 0, 4, 8, 2, 5, 7]
    assert cost_filter(image, text, 5, impl=impl).index.tolist() == found.index[:, :5].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda dtype: dtype == torch.bfloat16)
def test_a_class_given_twice(impl, dtype, device):
    """The same cost to the bit, wherever it is among the classes: the lower one first."""
    image, text = (normal(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(((2, 5, 7, 40), (29, 1, 40))))
    found = cost_filter(image, torch.cat([text, text]), 58, impl=impl)
    assert torch.equal(found.index[:, 1::2], found.index[:, ::2] + 29)
    assert torch.equal(found.cost[:, 1::2], found.cost[:, ::2])


@SHARED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype: dtype == torch.float32)
def test_rows_of_zeros_have_cosine_0(impl, dtype, shared, device):
    call = make(2, 4, 5, 21, 12, 2, 12, shared=shared, dtype=dtype, device=device)
    call.tensors["image"][1, 2, 3] = 0
    call.tensors["text"][..., 7, :, :] = 0
    found = call.outputs(impl)
    assert not found["cost"][1, ..., 2, 3].count_nonzero()
    assert not found["cost"][found["index"] == 7].count_nonzero()
    assert found["cost"].isfinite().all()
    if dtype == torch.float32:
        checks.assert_gradients_as_reference(call, impl)
    call.tensors["text"][:] = 0
    assert call.outputs(impl)["index"].tolist() == [list(range(12))] * 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@SHARED
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_nan_makes_its_class_the_best(impl, value, shared, device):
    call = make(2, 4, 5, 21, 12, 2, 4, shared=shared, device=device)
    best = call.outputs(impl)["index"]
    call.tensors["text"][..., (9, 3), 1, 5] = value
    found = call.outputs(impl)
    others = [[c for c in row if c not in (3, 9)][:2] for row in best.tolist()]
    assert found["index"].tolist() == [[3, 9, *row] for row in others]
    assert found["score"].isnan().tolist() == [[True, True, False, False]] * 2
    second = torch.arange(2, device=device) == 1
    assert torch.equal(found["cost"].isnan().all(4).all(3), found["score"].isnan()[..., None] & second)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_a_pixel_that_is_nan(impl, device):
    """Every class of its image is a best one, and its cost is NaN there alone."""
    call = make(2, 4, 5, 21, 12, 2, 4, device=device)
    before = call.outputs(impl)
    call.tensors["image"][1, 2, 3, 4] = math.nan
    found = call.outputs(impl)
    assert found["index"].tolist() == [before["index"][0].tolist(), [0, 1, 2, 3]]
    assert found["cost"].isnan().nonzero()[:, [0, 3, 4]].unique(dim=0).tolist() == [[1, 2, 3]]


# --- strides ---------------------------------------------------------------------------------------------------------

IMAGES = LAYOUTS | {"[B, D, H, W]": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)}


@SHARED
@pytest.mark.parametrize("layout", IMAGES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout in ("[B, D, H, W]", "a slice", "expanded batch"))
def test_any_strides(impl, layout, shared, device, tolerances):
    call = make(2, 6, 7, 18, 21, 2, 6, shared=shared, device=device)
    image, text = call.tensors.values()
    changed = text if shared and layout == "expanded batch" else IMAGES[layout](text[None] if shared else text)
    changed = changed[0] if changed.dim() > text.dim() else changed
    dcost, *others = call.output_gradients()
    dys = (IMAGES[layout](dcost.flatten(1, 2)).unflatten(1, dcost.shape[1:3]), *others)
    assert_as_good_as_eager(
        call.having(image=IMAGES[layout](image), text=changed), impl, tolerances[torch.float32], gradients=dys
    )


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", COMPILED)
def test_reproducible_and_of_its_image_alone(impl, device):
    call = make(3, 5, 7, 33, 21, 2, 6, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl, shared=("text",))
    checks.assert_batch_invariant(make(3, 3, 5, 33, 21, 2, 6, shared=False, device=device), impl)


@pytest.mark.parametrize("case", ["P 3", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


# --- autograd, torch.library, torch.compile, torch.vmap --------------------------------------------------------------


@SHARED
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, shared, device):
    checks.gradcheck(make(2, 2, 2, 4, 3, 2, 2, shared=shared, dtype=torch.float64, device=device), impl)


@SHARED
@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, shared, device):
    checks.assert_slope(make(2, 4, 5, 18, 12, 2, 3, shared=shared, device=device), impl)


@pytest.mark.parametrize("needs", ["image", "text"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_gradient(impl, needs, device):
    call = make(2, 4, 5, 18, 12, 2, 3, device=device)
    dys = call.output_gradients()
    want = call.leaves().results("reference", dys)[f"d{needs}"]
    leaf = call.tensors[needs].clone().requires_grad_()
    cost, *_ = call.having(**{needs: leaf})(impl)
    torch.testing.assert_close(torch.autograd.grad(cost, leaf, dys[0])[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(1, 2, 3, 5, 4, 1, 2, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, device):
    checks.assert_autocasts(make(2, 3, 5, 9, 12, 2, 3, device=device), impl, device)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 3, 5, 9, 12, 2, 3, device=device), impl)


@pytest.mark.parametrize("mapped", [("image", "text"), ("image",), ("text",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, device):
    call = make(2, 2, 3, 5, 7, 2, 3, device=device)
    checks.assert_maps(call, impl, mapped)


@SHARED
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda shared: shared)
def test_opcheck(impl, shared, device):
    for shape in ((2, 3, 5, 9, 7, 2, 3), (0, 2, 3, 4, 5, 1, 2)):
        call = make(*shape, shared=shared, device=device)
        image, text = call.tensors.values()
        text, nothing = text[None] if shared else text, torch.empty(0, device=device)
        scale, panels = checks.opcheck("pack_text", impl, text, impl == "cpu")
        torch.testing.assert_close(scale, 1 / text.norm(dim=-1))
        for packed in ((nothing, nothing), (scale, panels), (scale, nothing)):
            cost, index, _ = checks.opcheck("cost_filter", impl, image, text, *packed, shape[-1])
        checks.opcheck("cost_filter_backward", impl, torch.ones_like(cost), image, text, cost, index)
