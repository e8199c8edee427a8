"""Tests ops of the incremental methods in float64 against the equations as their texts print them, class by class."""

from __future__ import annotations

import pytest
import torch
from calls import normal
from torch import Tensor
from torch.nn import functional as F

from fastcss.ops import top_margin, topk_queries

FLOAT64 = pytest.mark.parametrize("impl", ["reference", "composed", "auto"])
EXACT = {"rtol": 1e-14, "atol": 1e-14}


def pixels() -> tuple[Tensor, Tensor]:
    """Draw 80 pixels' logits of 21 classes, and their labels."""
    labels = torch.randint(21, (80,), generator=torch.Generator().manual_seed(1))
    return 3 * normal(80, 21).double(), labels


@FLOAT64
def test_the_margin_is_ldkas(impl):
    """Eq. 2: c* = argmax over j ≠ y of s_j. Eq. 3: m = s_y − s_c*."""
    logits, labels = pixels()
    found = top_margin(logits.T[None], labels[None], impl=impl)
    for i, (s, y) in enumerate(zip(logits, labels.tolist(), strict=True)):
        rival = max((j for j in range(21) if j != y), key=lambda j: s[j])
        assert found.rival[0, i] == rival
        assert found.margin[0, i] == s[y] - s[rival]


@FLOAT64
def test_the_curvature_is_the_second_derivative_of_the_loss_along_the_margin(impl):
    """∂²L/∂m² = (p_y + p_c*) − (p_y − p_c*)², of the cross-entropy by autograd; and eq. 4: at most 1."""
    logits, labels = pixels()
    _, rival, p_true, p_rival, curvature = (x[0] for x in top_margin(logits.T[None], labels[None], impl=impl))

    def loss(t: Tensor, s: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """Compute the loss along the margin: s_y + t, s_c − t."""
        along = F.one_hot(y, 21) - F.one_hot(c, 21)
        return F.cross_entropy(s + t * along, y)

    second = torch.func.grad(torch.func.grad(loss))
    got = [second(torch.zeros((), dtype=torch.float64), *each) for each in zip(logits, labels, rival, strict=True)]
    torch.testing.assert_close(curvature, torch.stack(got), rtol=1e-12, atol=1e-12)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(p_true, p[torch.arange(80), labels], **EXACT)
    torch.testing.assert_close(p_rival, p[torch.arange(80), rival], **EXACT)
    torch.testing.assert_close(curvature, (p_true + p_rival) - (p_true - p_rival).square(), **EXACT)
    assert curvature.max() <= 1


@FLOAT64
def test_the_queries_are_those_of_query_pre_alignment(impl):
    """The queries must be the N features most similar to any prototype, of the old stages or the new one, detached."""
    features, old, new = normal(2, 50, 16).double(), normal(5, 16, seed=1).double(), normal(3, 16, seed=2).double()
    features.requires_grad_()
    found = topk_queries(features, torch.cat([old, new]), 12, impl=impl)
    for b in range(2):
        similarity = [max(sum(x * p).item() for p in (*old, *new)) for x in features[b].detach()]
        order = sorted(range(50), key=lambda i: -similarity[i])[:12]
        assert found.index[b].tolist() == order
        assert torch.equal(found.queries[b], features[b, order].detach())
        torch.testing.assert_close(
            found.score[b], torch.tensor([similarity[i] for i in order], dtype=torch.float64), **EXACT
        )
    assert not found.queries.requires_grad
