"""cost_filter's results among each other; what goes into it, pack_text; what takes them, scatter_cost and
filtered_argmax."""

from __future__ import annotations

import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, normal, runs
from left_out import light
from torch import Tensor

from fastcss.ops import FilteredCost, cost_filter, filtered_argmax, pack_text, scatter_cost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda dtype: dtype != torch.float16)
def test_the_score_is_the_largest_cost(impl, dtype, device):
    """Bitwise, of random rows too; and text of the batch gives what the same text of each image gives."""
    image, text = (normal(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(((3, 5, 7, 40), (50, 2, 40))))
    found = cost_filter(image, text, 9, impl=impl)
    assert torch.equal(found.score, found.cost.amax(dim=(2, 3, 4)))
    assert (found.score.diff(dim=1) <= 0).all()
    for one, other in zip(cost_filter(image, text.expand(3, -1, -1, -1), 9, impl=impl), found, strict=True):
        assert torch.equal(one, other)


# --- pack_text -------------------------------------------------------------------------------------------------------


def embeddings(dtype: torch.dtype, device: str, shared: bool = True) -> tuple[Tensor, Tensor]:
    image = normal(2, 5, 7, 33, dtype=dtype, device=device)
    return image, normal(*(() if shared else (2,)), 29, 3, 33, seed=1, dtype=dtype, device=device)


@pytest.mark.parametrize("shared", [True, False], ids=["text", "text of each image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda dtype: dtype == torch.bfloat16)
def test_packed_text_gives_the_same_bits(impl, dtype, shared, device):
    """The gradient of the image, too; the text has none."""
    image, text = embeddings(dtype, device, shared)
    image, text = image.requires_grad_(), text.requires_grad_()
    strided = text.transpose(-1, -2).contiguous().transpose(-1, -2) if impl in COMPILED else text
    want = cost_filter(image, text.detach(), 6, impl=impl)
    (slope,) = torch.autograd.grad(want.cost.sum(), image)
    for packed in (pack_text(text, impl=impl), pack_text(strided, impl=impl)):
        found = cost_filter(image, packed, 6, impl=impl)
        for one, other in zip(found, want, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(torch.autograd.grad(found.cost.sum(), image)[0], slope)


@pytest.mark.parametrize("impl", COMPILED)
def test_packed_text_of_any_strides(impl, device):
    """torch.vmap hands on such strides if it maps another dimension than the first."""
    image, text = embeddings(torch.float32, device)
    packed = pack_text(text, impl=impl)
    strided = packed._replace(
        **{
            name: getattr(packed, name).mT.contiguous().mT
            for name in ("scale", "panels")
            if getattr(packed, name).dim() > 1
        }
    )
    for one, other in zip(
        cost_filter(image, strided, 6, impl=impl), cost_filter(image, packed, 6, impl=impl), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("packed_for", IMPLEMENTATIONS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_text_packed_for_another_implementation(impl, packed_for, device):
    image, text = embeddings(torch.float32, device)
    runs(packed_for, device)
    want = cost_filter(image, text, 6, impl=impl)
    found = cost_filter(image, pack_text(text, impl=packed_for), 6, impl=impl)
    assert torch.equal(found.index, want.index)
    torch.testing.assert_close(found.cost, want.cost)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_packed_text_under_autocast(impl, device):
    image, text = embeddings(torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        want = cost_filter(image, text, 6, impl=impl)
        found = cost_filter(image, pack_text(text, impl=impl), 6, impl=impl)
    assert found.cost.dtype == torch.bfloat16
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_packed_text_in_one_graph(impl, device):
    image, text = embeddings(torch.float32, device)
    packed = pack_text(text, impl=impl)
    torch.compiler.reset()
    run = torch.compile(lambda i, t: cost_filter(i, t, 6, impl=impl), fullgraph=True, backend="aot_eager")
    for one, other in zip(run(image, packed), cost_filter(image, packed, 6, impl=impl), strict=True):
        torch.testing.assert_close(one, other)


# --- scatter_cost, filtered_argmax -----------------------------------------------------------------------------------

CLASSES = 40


def kept(*shape: int, k: int = 7, dtype: torch.dtype = torch.float32, device: str = "cpu") -> FilteredCost:
    """Logits in whole numbers, many of them equal, of classes in any order."""
    logits = (2 * normal(shape[0], k, *shape[1:])).round().to(device, dtype)
    rows = [torch.randperm(CLASSES, generator=torch.Generator().manual_seed(b))[:k] for b in range(shape[0])]
    index = torch.stack(rows).to(device) if rows else torch.zeros(0, k, dtype=torch.int64, device=device)
    return FilteredCost(logits, index, logits.new_zeros(index.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 6, 5), (1, 9), (2,), (0, 4, 5), (2, 0, 5)], ids=str)
def test_scatter(shape, dtype, device):
    filtered = kept(*shape, dtype=dtype, device=device)
    whole = scatter_cost(filtered, CLASSES, fill=-7.5)
    assert whole.shape == (shape[0], CLASSES, *shape[1:])
    assert whole.dtype == dtype
    for b in range(shape[0]):
        for c in range(CLASSES):
            at = (filtered.index[b] == c).nonzero().flatten().tolist()
            want = filtered.cost[b, at[0]] if at else torch.full_like(whole[b, c], -7.5)
            assert torch.equal(whole[b, c], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 66, 5), (1, 9), (2,), (0, 4, 5), (2, 0, 5)], ids=str)
def test_argmax_is_that_of_all_classes(shape, dtype, device):
    """If logits are equal, the lower class must win, not the one with the better score."""
    filtered = kept(*shape, dtype=dtype, device=device)
    found = filtered_argmax(filtered)
    assert found.dtype == torch.int64
    assert torch.equal(found, scatter_cost(filtered, CLASSES).argmax(dim=1))


def test_classes_that_were_not_kept_never_win(device):
    filtered = kept(2, 4, 5, device=device)
    low = filtered._replace(cost=filtered.cost - 1000)
    assert torch.equal(filtered_argmax(low), filtered_argmax(filtered))
    assert (scatter_cost(low, CLASSES).amax(dim=1) == -100).all()


def test_of_a_filter(device):
    """No filter, k = T: the argmax of the whole map."""
    image, text = embeddings(torch.float32, device)
    filtered = cost_filter(image, text, 29)
    mean = filtered._replace(cost=filtered.cost.mean(2))
    unit = torch.nn.functional.normalize
    want = torch.einsum("bhwd,tpd->bthw", unit(image, dim=-1), unit(text, dim=-1)) / 3
    torch.testing.assert_close(scatter_cost(mean, 29), want)
    assert torch.equal(filtered_argmax(mean), want.argmax(1))


def test_gradients_of_scatter(device):
    filtered = kept(2, 3, 4, k=3, dtype=torch.float64, device=device)
    cost = filtered.cost.requires_grad_()
    torch.autograd.gradcheck(lambda cost: scatter_cost(filtered._replace(cost=cost), CLASSES), cost)


@pytest.mark.parametrize("function", [lambda f: scatter_cost(f, CLASSES), filtered_argmax], ids=["scatter", "argmax"])
def test_in_one_graph_and_mapped(function, device):
    filtered = kept(3, 4, 5, device=device)
    torch.compiler.reset()
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(filtered), function(filtered))
    stacked = FilteredCost(*(torch.stack([t, t.flip(0)]) for t in filtered))
    want = torch.stack([function(FilteredCost(*(t[i] for t in stacked))) for i in (0, 1)])
    assert torch.equal(torch.vmap(function)(stacked), want)
