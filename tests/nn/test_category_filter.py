"""Tests CategoryFilter: which classes it keeps, in what order, and that both sides learn through it."""

import pytest
import torch
from torch.nn import functional as F

from fastcss.nn import CategoryFilter
from fastcss.ops import filtered_argmax, pack_text, scatter_cost


def inputs(device, batch=2, classes=9, prompts=3, channels=8, h=4, w=5):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, channels, h, w, generator=generator)
    return image.to(device), torch.randn(classes, prompts, channels, generator=generator).to(device)


def cost_map(image, text):
    """Compute (5.2), [B, T, P, H, W]."""
    return torch.einsum("bdhw,tpd->btphw", F.normalize(image, dim=1), F.normalize(text, dim=2))


@pytest.mark.parametrize("k", [1, 4, 9, 50])
def test_it_keeps_the_classes_of_the_largest_cosines(k, device):
    image, text = inputs(device)
    cost, index, score = CategoryFilter(k)(image, text)
    whole = cost_map(image, text)
    assert cost.shape == (2, min(k, 9), 3, 4, 5)
    for b in range(2):
        best = sorted(range(9), key=lambda t, b=b: -whole[b, t].max().item())[:k]
        assert index[b].tolist() == best
        torch.testing.assert_close(cost[b], whole[b, best])
        torch.testing.assert_close(score[b], whole[b, best].amax((1, 2, 3)))


def test_no_filter_is_all_classes_in_class_order(device):
    image, text = inputs(device)
    whole = cost_map(image, text)
    cost, index, score = CategoryFilter(None)(image, text)
    assert index.tolist() == [list(range(9))] * 2
    torch.testing.assert_close(cost, whole)
    torch.testing.assert_close(score, whole.amax((2, 3, 4)))


@pytest.mark.parametrize("k", [4, None])
def test_both_sides_learn_through_the_kept_costs(k, device):
    image, text = (x.double().requires_grad_() for x in inputs(device))
    filtered = CategoryFilter(k)(image, text)
    weights = torch.randn(filtered.cost.shape, dtype=torch.double, device=device)
    kept = torch.stack([maps[index] for maps, index in zip(cost_map(image, text), filtered.index, strict=True)])
    got, want = (torch.autograd.grad((cost * weights).sum(), (image, text)) for cost in (filtered.cost, kept))
    torch.testing.assert_close(got, want)
    assert not filtered.score.requires_grad


def test_the_number_of_classes_and_pixels_may_change_between_calls(device):
    module = CategoryFilter(4)
    for classes, h, w in ((9, 4, 5), (2, 1, 1), (30, 7, 2)):
        image, text = inputs(device, classes=classes, h=h, w=w)
        filtered = module(image, text)
        labels = filtered_argmax(filtered._replace(cost=filtered.cost.amax(2)))
        assert torch.equal(labels, scatter_cost(filtered, classes).amax(2).argmax(1))


def test_text_of_each_image_and_packed_text(device):
    module, (image, text) = CategoryFilter(4), inputs(device)
    other = text.flip(0)
    by_image = module(image, torch.stack([text, other]))
    for b, own in enumerate((text, other)):
        torch.testing.assert_close(by_image.cost[b : b + 1], module(image[b : b + 1], own).cost)
    packed = module(image, pack_text(text))
    torch.testing.assert_close(packed, module(image, text))


@pytest.mark.parametrize("k", [4, None])
def test_compiled(k, device):
    module, (image, text) = CategoryFilter(k), inputs(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, text), module(image, text))


def test_it_has_no_weights_and_says_what_it_is():
    module = CategoryFilter(4, impl="composed")
    assert not module.state_dict()
    assert repr(module) == "CategoryFilter(k=4, impl='composed')"


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        CategoryFilter(0)
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        CategoryFilter(4.0)
    with pytest.raises(ValueError, match=r"impl must be 'auto' or one of reference, .*, got 'fast'"):
        CategoryFilter(4, impl="fast")
    module, (image, text) = CategoryFilter(4), inputs("cpu")
    with pytest.raises(ValueError, match=r"CategoryFilter: image must be \[B, D, H, W\], got \[8, 4, 5\]"):
        module(image[0], text)
    with pytest.raises(TypeError, match="image must be a tensor"):
        module(image.tolist(), text)
    with pytest.raises(ValueError, match=r"text must be \[T, P, D\] with D = 8, got \[9, 3, 7\]"):
        module(image, text[:, :, :7])
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run"):
        CategoryFilter(4, impl="cpu")(image.double(), text.double())
