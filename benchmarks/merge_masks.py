"""Cases of ``merge_masks``: SAM's low-resolution masks as one label map, and other ways to merge them.

A step is right if at most a share of 1e-4 of the pixels has another label: rounding decides the label of a pixel whose
resized logit is next to the threshold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcss.ops import merge_masks

from . import _steps
from .cases import Case, Problem, Step

#: The largest share of the pixels that may have another label.
TOLERANCE = 1e-4
SOURCES = ("fastcss/_ops/merge_masks.py", "fastcss/composed/merge_masks.py")
#: The chunked form tries this many masks at a time; with one it paints the masks over each other.
CHUNKS = (1, 4, 16)


def cases(device: str, quick: bool) -> list[Case]:
    """List the points of the specification, and one in which nothing can be skipped; float32, as SAM resizes masks."""
    points = [(20, ""), (150, ""), (20, "-noise")]
    return [_case(count, ending, quick) for count, ending in points]


def _case(count: int, ending: str, quick: bool) -> Case:
    name, shape = f"merge_masks/k{count}-1024{ending}", {"K": count, "h": 256, "w": 256, "H": 1024, "W": 1024}
    if quick:
        name, shape = f"{name}-quick", {"K": count // 2, "h": 24, "w": 24, "H": 96, "W": 96}
    build = functools.partial(_problem, shape, bool(ending), quick)
    return Case("merge_masks", name, shape, torch.float32, build, SOURCES, modes=("fwd",))


def _problem(shape: dict, noise: bool, quick: bool, device: str, mode: str) -> Problem:
    count, size = shape["K"], (shape["H"], shape["W"])
    masks = torch.randn(count, shape["h"], shape["w"], device=device) if noise else _blobs(shape, device)
    scores = torch.rand(count, device=device)

    def step(forward: Callable[..., Tensor]) -> Step:
        return torch.no_grad()(lambda: (forward(masks, scores, size),))

    def chunked(masks_at_a_time: int) -> Step:
        return step(functools.partial(_chunked, masks_at_a_time=masks_at_a_time))

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(merge_masks),
        "literal": lambda: step(_literal),
        "chunked": lambda: _steps.fastest(chunked, CHUNKS),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_literal))
    if device == "cuda":
        for impl in ("composed", "triton", "cuda"):
            providers[impl] = lambda impl=impl: step(functools.partial(merge_masks, impl=impl))

    def expected():
        return (merge_masks(masks.double(), scores, size, impl="reference"),)

    return Problem(providers, expected, TOLERANCE, 0.0, moved(shape), differing)


def _blobs(shape: dict, device: str) -> Tensor:
    """Draw logits like SAM's: about 10 inside an ellipse of 2–15% of the picture, -10 outside, soft edges, noise."""
    count, height, width = (shape[n] for n in "Khw")

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, device=device)

    y = (torch.arange(height, device=device)[:, None] + 0.5) / height - uniform(0.15, 0.85)
    x = (torch.arange(width, device=device) + 0.5) / width - uniform(0.15, 0.85)
    turn, ratio, radius = uniform(0, math.pi), uniform(0.5, 2).sqrt(), (uniform(0.02, 0.15) / math.pi).sqrt()
    across, along = (x * turn.cos() + y * turn.sin()) * ratio, (y * turn.cos() - x * turn.sin()) / ratio
    distance = radius - (across.square() + along.square()).sqrt()
    edge = 3 / height
    return 10 * (distance / edge).tanh() + 0.5 * torch.randn(distance.shape, device=device)


def moved(shape: dict) -> float:
    """Count the bytes of the masks in and of the labels out of memory."""
    return 4 * shape["K"] * shape["h"] * shape["w"] + 8 * shape["H"] * shape["W"]


def differing(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compute the share of pixels with another label; inf if the map has another shape or dtype."""
    (labels,), (wanted,) = got, expected
    if labels.shape != wanted.shape or labels.dtype != wanted.dtype:
        return float("inf")
    return (labels != wanted).double().mean().item()


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as SAM's post-processing does: to the resolution of its padded picture, then to the picture's."""
    padded = (4 * masks.shape[1], 4 * masks.shape[2])
    whole = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)
    return F.interpolate(whole, size, mode="bilinear", align_corners=False)[0]


def _literal(masks: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize all masks whole, and take the argmax of their confidences."""
    above = _resized(masks, size) > 0
    best, label = torch.where(above, scores[:, None, None], -1).max(dim=0)
    return torch.where(best >= 0, label + 1, 0)


def _chunked(masks: Tensor, scores: Tensor, size: tuple[int, int], masks_at_a_time: int) -> Tensor:
    """Paint the worst masks first, some at a time, and the better ones over them."""
    order = scores.argsort()
    labels = torch.zeros(size, dtype=torch.int64, device=masks.device)
    for part in order.split(masks_at_a_time):
        above = _resized(masks[part], size) > 0
        if len(part) == 1:
            labels = torch.where(above[0], part + 1, labels)
        else:
            rank = torch.arange(1, len(part) + 1, dtype=torch.uint8, device=masks.device)[:, None, None]
            best = (above * rank).amax(dim=0).long()
            labels = torch.where(best > 0, (part + 1)[best - 1], labels)
    return labels
