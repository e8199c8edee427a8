"""Defines the losses of DecoupleCSS: on the masks of the classes that an image shows, and on which classes they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import SelectedTokens

#: Pixels with this label do not count.
IGNORE_INDEX = 255
#: Probabilities stay this far from 0 and 1, where a logarithm would be infinite.
_SMALLEST = 1e-6
#: A class that fills at least this share of a token's cell is there.
_THERE = 1 / 8


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Add dice loss and cross-entropy of each mask with equal weights, and take the mean over the masks.

    Args:
        logits: ``[R, h, w]``, floating point; computed in float32 at least.
        target: integer ``[R, h, w]``: 1 on the object, 0 off it, 255 on pixels that do not count. A mask of 255 alone
            does not count.

    Returns:
        A scalar, ``[]``; 0 if no mask counts.

    Source: DecoupleCSS eq. A.1.
    """
    counts = (target != IGNORE_INDEX).flatten(1).any(1)
    loss = dice_loss(logits, target) + cross_entropy(logits, target)
    return (loss * counts).sum() / counts.sum().clamp(min=1)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return ``1 - 2 Σ p g / Σ (p² + g²)`` of each mask: ``[R, h, w]`` and targets as for ``mask_loss`` → ``[R]``.

    Source: DecoupleCSS eq. A.1; V-Net (Milletari et al., 2016).
    """
    valid = target != IGNORE_INDEX
    probability = (_wide(logits).sigmoid() * valid).flatten(1)
    truth = (target == 1).to(probability).flatten(1)
    overlap = (probability * truth).sum(1)
    return 1 - 2 * overlap / (probability.square() + truth).sum(1).clamp(min=_SMALLEST)  # g² = g


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of {object, not}, the mean over each mask's pixels: inputs of ``mask_loss`` → ``[R]``.

    Source: DecoupleCSS eq. A.1.
    """
    valid, logits = target != IGNORE_INDEX, _wide(logits)
    loss = F.binary_cross_entropy_with_logits(logits, (target == 1).to(logits), reduction="none") * valid
    return loss.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def presence_probability(found: SelectedTokens, largest: Tensor, threshold: float) -> Tensor:
    """Return the probability that an image shows each class: p of eq. A.3, from the cosines.

    The paper takes r of eq. A.2 for p, the mean cosine of the tokens that reach τ with the class. So does this function
    if any token does. Otherwise r would be 0 whatever the weights, and a class that is overlooked would never learn to
    be seen. Its largest cosine s then takes the place of r. Since s may be negative, below τ the line goes on as
    ``τ exp(s/τ - 1)``, which has the same value and slope at τ and stays above 0: ``log p`` keeps the slope that it has
    at τ.

    Args:
        found: its ``presence`` ``[B, c]`` is r, or 0 if no token reaches τ.
        largest: ``[B, c]``, the largest cosine of each class with any token.
        threshold: τ, above 0.

    Returns:
        p, ``[B, c]``, above 0, in float32 at least.

    Source: DecoupleCSS eq. A.2 and A.3; the part below τ is this project's.
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
    """Return a cross-entropy that gives little weight to the many classes that are rightly thought absent.

    It is ``-(1 - p)^γ₊ log p`` for a class that is there, and ``-q^γ₋ log(1 - q)``, ``q = max(p - clip, 0)``, for one
    that is not. Eq. A.3 has no minus sign, but its value is to be maximised; with ``clip=0`` this is its negative.
    With a larger ``clip``, which A.3 does not have, absent classes whose p is at most ``clip`` cost nothing.

    Args:
        probability: ``[B, c]``, p; computed in float32 at least.
        present: bool ``[B, c]``.
        gamma_positive, gamma_negative: exponents; the paper gives none, these are the defaults of Ridnik et al.
        clip: shift of p, from 0 to below 1; Ridnik et al. shift by 0.05.

    Returns:
        A scalar, ``[]``: the sum over the classes, the mean over the images.

    Source: DecoupleCSS eq. A.3; asymmetric loss (Ridnik et al., 2021), eq. 4 to 6.
    """
    p = _wide(probability).clamp(_SMALLEST, 1 - _SMALLEST)
    q = (p - clip).clamp(min=_SMALLEST)
    loss = torch.where(present, (1 - p) ** gamma_positive * p.log(), q**gamma_negative * (-q).log1p())
    return -loss.sum(1).mean()


def token_loss(cosine: Tensor, share: Tensor, threshold: float, scale: float = 12.0) -> Tensor:
    """Return the focal loss on ``scale · (cosine - τ)``, which teaches which tokens are on which class.

    It says where in a picture a class is *not*. Eq. A.3 only says which pictures show the class; and if a task has a
    single class, all its pictures show it, since each shows one of the task's classes.

    Args:
        cosine: ``[n, c]``, cosine of each token of all pictures with each class; computed in float32 at least.
        share: ``[n, c]``, the share of the token's cell that shows the class. From an eighth on the class is there, at
            0 it is not; shares between the two, and NaN, are left out.
        threshold: τ.
        scale: factor that turns the cosines, which are in -1…1, into logits.

    Returns:
        A scalar, ``[]``: the sum over tokens and classes, divided by the number of pairs with the class there, at least
        1.

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
