"""Cases of ``merge_masks``: SAM's low-resolution masks as one label map, and other ways to merge them.

A step is right where the share of pixels with another label is at most 1e-4: rounding decides where a resized logit is
next to the threshold.
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

#: Share of pixels.
TOLERANCE = 1e-4
SOURCES = ("fastcss/_ops/merge_masks.py", "fastcss/composed/merge_masks.py")
#: Masks at a time that the chunked form tries; one is painting them over each other.
CHUNKS = (1, 4, 16)


def cases(device: str, quick: bool) -> list[Case]:
    """The points of the specification, and one where nothing can be skipped. SAM resizes its masks in float32."""
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
    """Logits such as SAM's: about 10 inside of an ellipse of 2–15% of the picture, -10 outside, soft edges, noise."""
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
    """Bytes of the masks in and of the labels out of memory."""
    return 4 * shape["K"] * shape["h"] * shape["w"] + 8 * shape["H"] * shape["W"]


def differing(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The share of pixels with another label; inf where the map has another shape or kind."""
    (labels,), (wanted,) = got, expected
    if labels.shape != wanted.shape or labels.dtype != wanted.dtype:
        return float("inf")
    return (labels != wanted).double().mean().item()


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """SAM's post-processing: to the resolution of its padded picture, and from there to the picture's."""
    padded = (4 * masks.shape[1], 4 * masks.shape[2])
    whole = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)
    return F.interpolate(whole, size, mode="bilinear", align_corners=False)[0]


def _literal(masks: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
    """All masks whole, and the argmax of their confidences."""
    above = _resized(masks, size) > 0
    best, label = torch.where(above, scores[:, None, None], -1).max(dim=0)
    return torch.where(best >= 0, label + 1, 0)


def _chunked(masks: Tensor, scores: Tensor, size: tuple[int, int], masks_at_a_time: int) -> Tensor:
    """The worst masks first, some at a time, painted over by the better ones."""
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
