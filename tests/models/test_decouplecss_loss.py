"""Tests the losses of DecoupleCSS against their equations, written out pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from fastcss.models.decouplecss_loss import (
    asymmetric_loss,
    cross_entropy,
    dice_loss,
    mask_loss,
    presence_probability,
)
from fastcss.ops import SelectedTokens

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of some hundred terms


def masks(count: int = 3, height: int = 7, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, height, width, generator=generator)
    target = torch.randint(0, 3, (count, height, width), generator=generator)
    return logits, target.masked_fill(target == 2, 255)


def by_hand(logits: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Compute Dice and cross-entropy of one mask, as eq. A.1 writes them."""
    pairs = list(zip(logits.double().flatten().tolist(), target.flatten().tolist(), strict=True))
    pairs = [(1 / (1 + math.exp(-x)), g) for x, g in pairs if g != 255]
    dice = 1 - 2 * sum(p * g for p, g in pairs) / sum(p * p + g * g for p, g in pairs)
    return dice, -sum(math.log(p if g else 1 - p) for p, g in pairs) / len(pairs)


def test_each_mask_has_the_loss_of_the_equation():
    logits, target = masks()
    expected = torch.tensor([by_hand(*mask) for mask in zip(logits, target, strict=True)])
    torch.testing.assert_close(dice_loss(logits, target), expected[:, 0], **CLOSE)
    torch.testing.assert_close(cross_entropy(logits, target), expected[:, 1], **CLOSE)
    torch.testing.assert_close(mask_loss(logits, target), expected.sum(1).mean(), **CLOSE)


def test_what_is_ignored_changes_nothing_and_gets_no_gradient():
    logits, target = masks()
    ignored = target == 255
    other = torch.where(ignored, torch.full_like(logits, 40.0), logits).requires_grad_()
    loss = mask_loss(other, target)
    assert torch.equal(loss, mask_loss(logits, target))
    loss.backward()
    assert (other.grad[ignored] == 0).all()
    assert (other.grad[~ignored] != 0).all()


def test_a_mask_of_nothing_but_ignored_pixels_does_not_count():
    logits, target = masks()
    more = torch.cat([logits, logits[:1]]), torch.cat([target, torch.full_like(target[:1], 255)])
    torch.testing.assert_close(mask_loss(*more), mask_loss(logits, target))


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_that_counts_is_a_loss_of_0_with_a_gradient_of_0(count):
    logits = torch.randn(count, 4, 4, requires_grad=True)
    loss = mask_loss(logits, torch.full((count, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_right_masks_cost_nothing_and_wrong_ones_stay_finite():
    target = masks()[1].clamp(max=1)
    logits = (target * 2.0 - 1) * 1000
    assert mask_loss(logits, target) < 1e-6
    wrong = (-logits).requires_grad_()
    loss = mask_loss(wrong, target)
    loss.backward()
    assert loss.isfinite()
    assert wrong.grad.isfinite().all()


def test_gradients_are_those_of_the_equations():
    logits, target = masks()
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, target), logits.double().requires_grad_())
    probability = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.1
    present = torch.tensor([[True, False, True, False]]).expand(3, -1)
    assert torch.autograd.gradcheck(lambda p: asymmetric_loss(p, present, 1.0), probability.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    logits, target = masks()
    logits = logits.to(dtype)
    p, present = torch.rand(2, 3).to(dtype), torch.tensor([[True, False, True]]).expand(2, -1)
    expected = mask_loss(logits.float(), target), asymmetric_loss(p.float(), present)
    assert torch.equal(mask_loss(logits, target), expected[0])
    assert torch.equal(asymmetric_loss(p, present), expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mask_loss(logits, target), expected[0])
        assert torch.equal(asymmetric_loss(p, present), expected[1])


@pytest.mark.parametrize(("gammas", "clip"), [((0.0, 4.0), 0.05), ((1.0, 2.0), 0.0), ((0.0, 0.0), 0.0)])
def test_asymmetric_loss_of_the_equation(gammas, clip):
    probability = torch.tensor([[0.9, 0.2, 0.03], [0.5, 0.7, 0.4]])
    present = torch.tensor([[True, False, False], [False, True, True]])
    expected = 0.0
    for p, y in zip(probability.flatten().tolist(), present.flatten().tolist(), strict=True):
        q = max(p - clip, 0)
        expected -= (1 - p) ** gammas[0] * math.log(p) if y else q ** gammas[1] * math.log(1 - q)
    got = asymmetric_loss(probability, present, *gammas, clip)
    torch.testing.assert_close(got, torch.tensor(expected / 2), **CLOSE)


@pytest.mark.parametrize("gammas", [(), (1.0, 2.0)])
def test_asymmetric_loss_is_a3_in_float64(gammas):
    """Σ (1-p)^γ₊ log p over the classes that are there, p^γ₋ log(1-p) over the others, and no shift of p."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(40, 20, generator=generator, dtype=torch.float64) * 0.998 + 0.001
    there = torch.rand(40, 20, generator=generator) < 0.3
    plus, minus = gammas or (0.0, 4.0)
    a3 = torch.where(there, (1 - p) ** plus * torch.log(p), p**minus * torch.log(1 - p))
    assert (asymmetric_loss(p, there, *gammas) + a3.sum(1).mean()).abs() < 2e-15 * a3.sum(1).mean().abs()
    small = torch.full((1, 1), 0.02, dtype=torch.float64)  # Ridnik's shift would make nothing of it
    torch.testing.assert_close(asymmetric_loss(small, there[:1, :1] & False).item(), -(0.02**4) * math.log(0.98))


def test_asymmetric_loss_falls_towards_the_truth():
    probability = torch.linspace(0.1, 0.95, 20)[:, None]
    for present, sign in ((True, -1), (False, 1)):
        losses = torch.stack([asymmetric_loss(p[None], torch.tensor([[present]])) for p in probability])
        assert (losses >= 0).all()
        assert (losses.diff() * sign > 0).all()


@pytest.mark.parametrize("certain", [0.0, 1.0])
@pytest.mark.parametrize("gammas", [(0.0, 4.0), (1.0, 0.5)])
def test_certainty_is_finite(certain, gammas):
    p = torch.full((1, 2), certain, requires_grad=True)
    loss = asymmetric_loss(p, torch.tensor([[True, False]]), *gammas)
    loss.backward()
    assert loss.isfinite()
    assert p.grad.isfinite().all()


def probability_of(presence: torch.Tensor, largest: torch.Tensor, threshold: float = 0.3):
    none = torch.zeros_like(presence).long()  # counts: a class may be the best one of no token
    return presence_probability(SelectedTokens(torch.empty(0), none, presence), largest, threshold)


def test_probability_is_r_where_tokens_reach_the_threshold():
    presence = torch.tensor([[0.31, 0.7, 0.999]])
    assert torch.equal(probability_of(presence, torch.full((1, 3), -1.0)), presence)


def test_a_class_without_tokens_is_pulled_up_by_its_largest_cosine():
    largest = torch.tensor(
        [[-1.0, -0.2, 0.0, 0.2, 0.299, 0.6]], requires_grad=True
    )  # 0.6: "best", and its token went elsewhere
    p = probability_of(torch.zeros(1, 6), largest)
    assert (p > 0).all()
    assert (p.diff() > 0).all()
    p.log().sum().backward()
    torch.testing.assert_close(largest.grad, torch.tensor([[1 / 0.3] * 5 + [1 / 0.6]]))


@pytest.mark.parametrize("threshold", [0.005, 0.3, 1.0])
def test_probability_has_no_step_at_the_threshold(threshold):
    near = torch.tensor([[threshold * 0.9999, threshold, threshold * 1.0001]], requires_grad=True)
    p = probability_of(torch.zeros(1, 3), near, threshold)
    p.sum().backward()
    torch.testing.assert_close(p, near, rtol=1e-6, atol=0)
    torch.testing.assert_close(near.grad, torch.ones(1, 3), rtol=2e-4, atol=0)


def test_gradients_stay_finite_far_from_a_small_threshold():
    far = torch.tensor([[1.0, -1.0]], requires_grad=True)
    probability_of(torch.zeros(1, 2), far, 0.005).sum().backward()
    assert far.grad.isfinite().all()
