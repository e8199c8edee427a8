"""Tests the loss of tokens against its formula, and what it does to a task that has no other negatives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from decouplecss_models import build
from training_scenes import pictures_for, single_class_trainer, trainer_for

from fastcss.models.continual_plan import DEFAULTS
from fastcss.models.decouplecss_loss import token_loss
from fastcss.models.decouplecss_training import TaskTrainer, activate, detect, embed_phrases, training_step
from fastcss.models.task_pictures import collate, token_shares

NAN = float("nan")


def tokens(count: int = 40, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw cosines, and shares that are 0, below an eighth, an eighth, above it or NaN."""
    generator = torch.Generator().manual_seed(0)
    cosine = 2 * torch.rand(count, classes, generator=generator) - 1
    shares = torch.tensor([0, 0, 0.001, 0.1249, 0.125, 0.5, 1, NAN])
    return cosine, shares[torch.randint(0, len(shares), (count, classes), generator=generator)]


def by_hand(cosine: torch.Tensor, share: torch.Tensor, threshold: float, scale: float) -> float:
    """Compute ``-(1 - p)² log p`` of the truth's probability p, pair by pair."""
    total, there = 0.0, 0
    for c, s in zip(cosine.double().flatten().tolist(), share.flatten().tolist(), strict=True):
        on_it = 1 / (1 + math.exp(-scale * (c - threshold)))
        if s >= 0.125:
            there += 1
            total -= (1 - on_it) ** 2 * math.log(on_it)
        elif s == 0:
            total -= on_it**2 * math.log(1 - on_it)
    return total / max(there, 1)


@pytest.mark.parametrize(("threshold", "scale"), [(0.3, 12.0), (0.05, 12.0), (0.2, 1.0)])
def test_the_loss_is_that_of_the_formula(threshold, scale):
    cosine, share = tokens()
    expected = by_hand(cosine, share, threshold, scale)
    got = token_loss(cosine.double(), share, threshold, scale)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(token_loss(cosine, share, threshold, scale).item(), expected, rtol=1e-5, atol=0)


def test_little_of_a_class_and_what_is_ignored_do_not_count():
    cosine, share = tokens()
    silent = share.isnan() | ((share > 0) & (share < 0.125))
    other = torch.where(silent, -cosine, cosine).requires_grad_()
    loss = token_loss(other, share, 0.3)
    assert torch.equal(loss, token_loss(cosine, share, 0.3))
    loss.backward()
    assert 0 < silent.sum() < silent.numel()
    assert (other.grad[silent] == 0).all()
    assert (other.grad[share >= 0.125] < 0).all()
    assert (other.grad[share == 0] > 0).all()


def test_where_no_class_is_every_token_counts_whole():
    cosine, none = tokens()[0], torch.zeros(40, 3)
    torch.testing.assert_close(token_loss(cosine, none, 0.3).item(), by_hand(cosine, none, 0.3, 12), rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [torch.zeros(0, 2), torch.full((5, 2), NAN), torch.full((5, 2), 0.1)])
def test_nothing_that_counts_is_a_loss_of_0_with_a_gradient_of_0(share):
    cosine = torch.rand(share.shape, requires_grad=True)
    loss = token_loss(cosine, share, 0.3)
    loss.backward()
    assert loss == 0
    assert (cosine.grad == 0).all()


@pytest.mark.parametrize("scale", [12.0, 1000.0])
def test_the_largest_and_the_smallest_cosines_are_finite(scale):
    cosine = torch.tensor([[1.0, -1.0], [1.0, -1.0]], requires_grad=True)
    loss = token_loss(cosine, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 0.3, scale)
    loss.backward()
    assert loss.isfinite()
    assert cosine.grad.isfinite().all()
    wrong = cosine.grad[[0, 1], [0, 1]]  # near each wrong one the loss is a line: there were two that a class is on
    torch.testing.assert_close(wrong, torch.tensor([scale, -scale]) / 2, rtol=1e-2, atol=0)


def test_the_gradient_is_that_of_the_formula():
    cosine, share = tokens(6)
    assert torch.autograd.gradcheck(lambda x: token_loss(x, share, 0.3), cosine.double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    cosine, share = tokens()
    cosine = cosine.to(dtype)
    expected = token_loss(cosine.float(), share, 0.3)
    assert expected.dtype == torch.float32
    assert torch.equal(token_loss(cosine, share, 0.3), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_loss(cosine, share, 0.3), expected)


def by_share(trainer: TaskTrainer) -> tuple[float, float]:
    """Compute the mean cosine of the tokens on the object and of those off it."""
    batch = collate([trainer.pictures[i] for i in range(len(trainer.pictures))])
    with torch.no_grad():
        detected = detect(trainer.model, embed_phrases(trainer.model, trainer.task), batch.pixel_values)[1]
    shares = token_shares(batch, [of.shapes.tolist() for of in detected])
    parts = [torch.cosine_similarity(of.tokens[:, None], of.classes[None], dim=-1) for of in detected]
    cosine = torch.cat(parts)
    return cosine[shares >= 0.125].mean().item(), cosine[shares == 0].mean().item()


@pytest.mark.parametrize("data", DEFAULTS)
def test_a_task_of_one_class_learns_where_it_is_not_in_every_data_set(data):
    recipe = dataclasses.replace(DEFAULTS[data].plan["recipe"], epochs=1, batch_size=3)
    single, several = single_class_trainer(), trainer_for((1, 2), count=3)
    for trainer in (single, several):
        trainer.recipe = recipe
    assert single.run_epoch().tokens > 0
    assert (several.run_epoch().tokens > 0) == (data == "digits")
    several.recipe, several.epoch = dataclasses.replace(recipe, token_weight=0.0, one_class_token_weight=3.0), 0
    assert several.run_epoch().tokens == 0


def test_a_class_that_all_pictures_show_is_learnt_to_be_where_it_is():
    trainer, without = (single_class_trainer(one_class_token_weight=weight) for weight in (2.0, 0.0))
    on_before, off_before = by_share(trainer)
    while trainer.epoch < 30:
        last = trainer.run_epoch()
        without.run_epoch()
    on, off = by_share(trainer)
    assert on > on_before + 0.2
    assert off < off_before - 0.05
    assert last.tokens < 1  # it was 11 before training, and its weight is 2
    on, off = by_share(without)
    assert off > off_before + 0.2
    assert off > on - 0.05


def test_the_step_adds_the_loss_of_all_pictures_tokens_times_its_weight():
    model = build((1, 2))
    task, examples = model.tasks[1], pictures_for(model, 3)
    batch = collate([examples[i] for i in range(3)])
    activate(model, task)
    phrases, cosine, shapes = embed_phrases(model, task), [], []
    for picture in batch.pixel_values:
        tokens, classes, levels = model.detector(picture[None], phrases=phrases)
        cosine.append(torch.cosine_similarity(tokens[0, :, None], classes[0, None], dim=-1))
        shapes.append(levels.tolist())
    expected = 1.5 * token_loss(torch.cat(cosine), token_shares(batch, shapes), 0.05)
    torch.testing.assert_close(training_step(model, task, phrases, batch, 1.5).tokens, expected, rtol=1e-5, atol=0)


def test_without_weight_the_step_is_that_of_the_other_two_losses_bit_for_bit():
    model = build((1, 2))
    task, examples = model.tasks[1], pictures_for(model, 3)
    batch = collate([examples[i] for i in range(3)])
    own, phrases = activate(model, task), embed_phrases(model, task)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(loss, list(own.values()))

    paper, none, some = (training_step(model, task, phrases, batch, weight) for weight in (0, 0, 2))
    assert none.tokens == 0 < some.tokens
    assert not none.tokens.requires_grad
    assert torch.equal(torch.stack(none), torch.stack(paper))
    assert (none.masks, none.presence) == (some.masks, some.presence)
    expected, got, other = gradients(paper.masks + paper.presence), gradients(sum(none)), gradients(sum(some))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(got, other, strict=True))
