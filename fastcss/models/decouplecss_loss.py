"""What DecoupleCSS learns from: the masks of the classes that an image shows, and which classes those are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import SelectedTokens

#: The label of pixels that do not count.
IGNORE_INDEX = 255
#: Probabilities stay this far from 0 and 1, where a logarithm would be infinite.
_SMALLEST = 1e-6
#: Share of a token's cell from which on a class is there.
_THERE = 1 / 8


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice and cross-entropy of each mask, one as heavy as the other; the mean over the masks.

    Args:
        logits: ``[R, h, w]``, floating point; computed in float32 at least.
        target: integer ``[R, h, w]``, 1 on the object, 0 off it, 255 where nothing counts. A mask of nothing else
            does not count.

    Returns:
        ``[]``; 0 where no mask counts.

    Source: DecoupleCSS eq. A.1.
    """
    counts = (target != IGNORE_INDEX).flatten(1).any(1)
    loss = dice_loss(logits, target) + cross_entropy(logits, target)
    return (loss * counts).sum() / counts.sum().clamp(min=1)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """``1 - 2 Σ p g / Σ (p² + g²)`` of each mask: ``[R, h, w]`` and targets as for ``mask_loss`` → ``[R]``.

    Source: DecoupleCSS eq. A.1; V-Net (Milletari et al., 2016).
    """
    valid = target != IGNORE_INDEX
    probability = (_wide(logits).sigmoid() * valid).flatten(1)
    truth = (target == 1).to(probability).flatten(1)
    overlap = (probability * truth).sum(1)
    return 1 - 2 * overlap / (probability.square() + truth).sum(1).clamp(min=_SMALLEST)  # g² = g


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of the two classes {object, not}, the mean over each mask's pixels: as ``mask_loss`` takes → ``[R]``.

    Source: DecoupleCSS eq. A.1.
    """
    valid, logits = target != IGNORE_INDEX, _wide(logits)
    loss = F.binary_cross_entropy_with_logits(logits, (target == 1).to(logits), reduction="none") * valid
    return loss.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def presence_probability(found: SelectedTokens, largest: Tensor, threshold: float) -> Tensor:
    """How probable it is that an image shows each class: p of eq. A.3, from the cosines.

    The paper takes r of eq. A.2, the mean cosine of the tokens that reach τ with the class, for p, and so does this
    where there is any. Else r is 0 whatever the weights, and a class that is overlooked would never learn to be seen.
    Its largest cosine s takes the place of r there; and since that may be negative, below τ the line goes on as
    ``τ exp(s/τ - 1)``, which has its value and slope at τ and stays above 0: ``log p`` falls on as steeply as at τ.

    Args:
        found: ``presence`` ``[B, c]``, r, or 0 where no token reaches τ.
        largest: ``[B, c]``, the largest cosine of each class with any token.
        threshold: τ, above 0.

    Returns:
        ``[B, c]``, above 0, of float32 at least.

    Source: DecoupleCSS eq. A.2 and A.3; what is below τ is this project's.
    """
    cosine = torch.where(found.presence > 0, _wide(found.presence), _wide(largest))
    below = threshold * ((cosine - threshold).clamp(max=0) / threshold).exp()
    return torch.where(cosine >= threshold, cosine, below)


def asymmetric_loss(
    probability: Tensor,
    present: Tensor,
    gamma_positive: float = 0.0,
    gamma_negative: float = 4.0,
    clip: float = 0.0,
) -> Tensor:
    """Cross-entropy that makes little of the many classes that are rightly thought absent.

    ``-(1 - p)^γ₊ log p`` for a class that is there and ``-q^γ₋ log(1 - q)``, ``q = max(p - clip, 0)``, for one that is
    not. Eq. A.3 has no minus, but what it says is to be made large; with ``clip=0`` this is its negative.
    Classes whose p is at most ``clip`` then cost nothing where they are absent, which A.3 does not have.

    Args:
        probability: ``[B, c]``, p; computed in float32 at least.
        present: bool ``[B, c]``.
        gamma_positive, gamma_negative: the paper gives none; these are the defaults of Ridnik et al.
        clip: from 0 to below 1; Ridnik et al. shift by 0.05.

    Returns:
        ``[]``, the sum over the classes, the mean over the images.

    Source: DecoupleCSS eq. A.3; asymmetric loss (Ridnik et al., 2021), eq. 4 to 6.
    """
    p = _wide(probability).clamp(_SMALLEST, 1 - _SMALLEST)
    q = (p - clip).clamp(min=_SMALLEST)
    loss = torch.where(present, (1 - p) ** gamma_positive * p.log(), q**gamma_negative * (-q).log1p())
    return -loss.sum(1).mean()


def token_loss(cosine: Tensor, share: Tensor, threshold: float, scale: float = 12.0) -> Tensor:
    """Which tokens are on which class: focal loss on ``scale · (cosine - τ)``.

    It says where in a picture a class is *not*. Eq. A.3 only says which pictures show it; and since each picture of a
    task shows one of its classes, all do where it has a single one.

    Args:
        cosine: ``[n, c]``, of each token of all pictures with each class; computed in float32 at least.
        share: ``[n, c]``, how much of the token's cell shows the class: from an eighth on the class is there, at 0 it
            is not, and nothing is said between the two and where it is NaN.
        threshold: τ.
        scale: of the cosines, which by themselves make no logits: they are in -1…1.

    Returns:
        ``[]``, the sum over tokens and classes, divided by how many of the pairs have the class there, at least 1.

    Source: focal loss with γ = 2 (Lin et al., 2017), on the similarity of tokens and words as Grounding DINO has it
    (Liu et al., 2023); DecoupleCSS has no such term.
    """
    logits = scale * (_wide(cosine) - threshold)
    there, elsewhere = share >= _THERE, share == 0
    missed = there * (-logits).sigmoid().square() * F.softplus(-logits)
    raised = elsewhere * logits.sigmoid().square() * F.softplus(logits)
    return (missed + raised).sum() / there.sum().clamp(min=1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
