"""Takes two reductions over the classes and the softmax at two of them, some pixels at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# So many elements of the logits are copied at a time.
ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


def top_margin(
    logits: Tensor, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``logits`` [B, C, N], ``labels`` [B, N] → margin, rival, p_true, p_rival, curvature, all [B, N]."""
    batch, classes, _ = logits.shape
    size = max(1, ELEMENTS.get(logits.device.type, 1 << 24) // max(1, batch * classes))
    pieces = logits.split(size, dim=2)  # the gradient of a slice would be as large as all logits
    ids = [None] * len(pieces) if labels is None else labels.split(size, dim=1)
    parts = [_pixels(piece, labels, ignore_index) for piece, labels in zip(pieces, ids, strict=True)]
    return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))


def _pixels(logits: Tensor, labels: Tensor | None, ignore_index: int) -> tuple[Tensor, ...]:
    classes = logits.shape[1]
    true = logits.argmax(dim=1) if labels is None else labels
    known = (true >= 0) & (true < classes)
    true = torch.where(known, true, 0)[:, None]
    others = logits.detach().scatter(1, true, float("-inf"))
    rival = others.argmax(dim=1, keepdim=True)
    rival = torch.where(rival == true, (true == 0).long(), rival)  # all others are −∞: takes the first of them
    pair = torch.cat([true, rival], dim=1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    z, p = logits.gather(1, pair).to(wide), logits.softmax(dim=1, dtype=wide).gather(1, pair)
    margin, total, difference = z[:, 0] - z[:, 1], p.sum(1), p[:, 0] - p[:, 1]
    floats = torch.stack([margin, p[:, 0], p[:, 1], total - difference.square()]).to(logits.dtype)
    floats = torch.where(known, floats, float("nan"))
    if labels is not None:
        floats = torch.where(labels == ignore_index, 0, floats)
        known = known & (labels != ignore_index)
    return floats[0], torch.where(known, rival[:, 0], -1), *floats[1:]
