"""Cases of ``deformable_attention``: an encoder layer's reads of all levels at all of their tokens, and other ways to
sample them.

Mode "bwd" is a training step's share: forward, then the gradients of values, offsets and logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastcss.ops import deformable_attention

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 adds up some 1,300 rounded terms for each token of the
# smallest level. bfloat16 has 8 bits for each of those terms where they are in memory, and for the sampled values and
# the attention.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
SOURCES = ("fastcss/_ops/deformable_attention.py", "fastcss/composed/deformable_attention.py")


def cases(device: str, quick: bool) -> list[Case]:
    """List the point of the specification: Grounding DINO's encoder on a picture of 800 × 1066 pixels, whose levels
    have 13,400 + 3,350 + 850 + 221 = 17,821 tokens."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name, levels = "deformable_attention/n17821", [(100, 134), (50, 67), (25, 34), (13, 17)]
    if quick:
        name, levels = f"{name}-quick", [(10, 13), (5, 7), (3, 4), (2, 2)]
    shape = {"B": 1, "levels": levels, "heads": 8, "D": 32, "points": 4}
    return [Case("deformable_attention", name, shape, dtype, functools.partial(_problem, shape, dtype, quick), SOURCES)]


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    heads, width, levels = shape["heads"], shape["D"], shape["levels"]
    points, offsets = (tensor.to(dtype) for tensor in points_and_offsets(shape, device))
    batch, queries = offsets.shape[:2]
    value = _steps.normal(batch, queries, heads, width, dtype=dtype, device=device)
    logits = _steps.normal(*offsets.shape[:-1], dtype=dtype, device=device)
    gradients = (_steps.normal(batch, queries, heads * width, dtype=dtype, device=device),)
    tensors = (value, offsets, logits)

    def step(forward: Callable[..., Tensor]) -> Step:
        return _steps.step_of(lambda v, o, z: (forward(v, levels, points, o, z),), tensors, gradients, mode)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(deformable_attention),
        "literal": lambda: step(_literal(levels, device)),
        "by level": lambda: step(functools.partial(deformable_attention, impl="composed")),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_literal(levels, device)))
    if device == "cuda":
        providers["triton"] = lambda: step(functools.partial(deformable_attention, impl="triton"))

    def expected():
        exact = "reference" if quick else "composed"  # all levels at once, float64 takes gigabytes
        return _steps.expected(
            lambda v, o, z: (deformable_attention(v, levels, points, o, z, impl=exact),), tensors, gradients, mode
        )

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def points_and_offsets(shape: dict, device: str) -> tuple[Tensor, Tensor]:
    """Make each token's centre, and the offsets that the model's layer starts with: 1, 2, … cells in the direction of
    the head, plus noise of one cell.

    All locations are odd multiples of 1/256. bfloat16 holds these exactly, and no level has a border between cells
    there; otherwise providers would differ by how a location is rounded. So an offset is a cell × n/128 with n = 1, 2,
    3, 4, 6, 8, 12, …, which bfloat16 holds too, for levels whose sizes are a power of two times at most 85.
    """
    heads, count, levels = shape["heads"], shape["points"], shape["levels"]
    centers = []
    for size in levels:
        y, x = (2 * (128 * (torch.arange(n, device=device) + 0.5) / n).floor() + 1 for n in size)
        centers.append(torch.cartesian_prod(y, x).flip(1) / 256)
    points = torch.cat(centers)[None, :, None].expand(shape["B"], -1, len(levels), 2)
    angle = torch.arange(heads, device=device) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=1)
    direction = direction / direction.abs().amax(dim=1, keepdim=True)
    cells = direction[:, None, None] * torch.arange(1, count + 1, device=device)[:, None]  # [heads, 1, points, 2]
    cells = cells + torch.randn(*points.shape[:2], heads, len(levels), count, 2, device=device)
    pixels = torch.tensor([(w, h) for h, w in levels], device=device)[:, None]
    mantissa, exponent = torch.frexp((cells * 128 / pixels).round())
    return points, torch.ldexp((4 * mantissa).round() / 4, exponent) * pixels / 128


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, and bytes in and out of memory.

    The forward pass multiplies the four corners of each point by its attention and share, and adds them up. The
    backward pass does as much for the gradient of the values, and as much again for the products of values and the
    output's gradient, from which the gradients of offsets and logits follow.
    """
    batch, heads, width, levels = (shape[name] for name in ("B", "heads", "D", "levels"))
    queries = sum(h * w for h, w in levels)
    reads = heads * len(levels) * shape["points"]  # of a query
    flops = 2 * 4 * batch * queries * reads * width
    tensors = batch * queries * (heads * width + 3 * reads)  # values, offsets and logits
    others = batch * queries * (heads * width + 2 * len(levels))  # output and reference points
    if mode == "fwd":
        return flops, (tensors + others) * itemsize
    return 3 * flops, (3 * tensors + 2 * others) * itemsize


def _literal(levels: list[tuple[int, int]], device: str) -> Callable[..., Tensor]:
    """Follow transformers' GroundingDinoMultiscaleDeformableAttention between its linear layers."""
    from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention

    core, spatial_shapes = MultiScaleDeformableAttention(), torch.tensor(levels, device=device)
    normalizer = spatial_shapes.flip(1)[:, None]

    def forward(value: Tensor, _, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(3).softmax(dim=3).view(logits.shape)
        locations = points[:, :, None, :, None] + offsets / normalizer
        return core(value, spatial_shapes, levels, None, locations, weights, 64)

    return forward
