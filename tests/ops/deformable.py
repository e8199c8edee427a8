"""Makes inputs of deformable attention whose points keep away from where their gradient jumps."""

from __future__ import annotations

import torch
from calls import Call, normal
from torch import Tensor

from fastcss.ops import deformable_attention
from fastcss.reference.deformable_attention import locations

# A point keeps at least this distance from its cell's border, in cells: rounding and finite differences move it by
# less.
CLEAR = 1e-2

Shapes = tuple[tuple[int, int], ...]

CASES = {  # B, (height, width) of each level, Q, heads, D, points
    "one of everything": (1, ((1, 1),), 1, 1, 1, 1),
    "no images": (0, ((2, 3),), 3, 2, 4, 2),
    "no queries": (2, ((2, 3), (1, 1)), 0, 2, 4, 2),
    "one level": (2, ((5, 7),), 9, 2, 16, 4),
    "one point": (2, ((5, 1), (1, 4)), 9, 3, 5, 1),
    "D 1": (3, ((4, 3), (1, 1)), 10, 2, 1, 3),
    "D 5": (2, ((5, 7), (3, 4)), 9, 3, 5, 4),
    "D 33": (1, ((5, 7), (3, 4), (1, 2)), 5, 2, 33, 5),
    "4 levels": (1, ((9, 13), (5, 7), (3, 4), (2, 2)), 17, 2, 32, 4),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {
    "Q 300": (1, ((20, 27), (10, 14), (5, 7), (3, 4)), 300, 8, 32, 4),
    "D 64": (1, ((13, 9), (7, 5)), 150, 4, 64, 3),
    "D 130": (1, ((6, 6), (3, 3)), 70, 2, 130, 8),
}


def make(
    batch, shapes, queries, heads, width, points, *, box=False, xy=None, dtype=torch.float32, device="cpu", seed=0
) -> Call:
    """Make a call whose offsets are some two cells, or so many halves of a ``box`` ÷ points; ``xy`` is the dtype of the
    reference points."""
    value = normal(batch, sum(h * w for h, w in shapes), heads, width, seed=seed, dtype=dtype)
    logits = normal(batch, queries, heads, len(shapes), points, seed=seed + 1, dtype=dtype)
    reference_points = _references(shapes, batch, queries, box, seed).to(xy or dtype)
    offsets = 2 * normal(*logits.shape, 2, seed=seed + 2)
    for again in range(3, 300):
        near = ~clear(shapes, reference_points, offsets.to(dtype), CLEAR)
        if not near.any():
            break
        offsets = torch.where(near[..., None], 2 * normal(*offsets.shape, seed=seed + again), offsets)
    else:
        raise AssertionError("no such offsets")
    tensors = {"value": value, "reference_points": reference_points, "offsets": offsets.to(dtype), "logits": logits}
    call = Call(deformable_attention, tensors, {"spatial_shapes": [*shapes]})
    return call.map(lambda tensor: tensor.to(device))


def _references(shapes: Shapes, batch: int, queries: int, box: bool, seed: int) -> Tensor:
    """Draw reference points in and around each level, in the middle part of a cell."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([(w, h) for h, w in shapes])  # [levels, 2]
    random = torch.rand(batch, queries, len(shapes), 6, generator=generator)
    cell = (random[..., :2] * (size + 1)).floor() - 1
    centers = (cell + 0.3 + 0.4 * random[..., 2:4] + 0.5) / size
    return torch.cat([centers, 0.2 + 0.6 * random[..., 4:]], dim=3) if box else centers


def clear(shapes: Shapes, reference_points: Tensor, offsets: Tensor, margin: float) -> Tensor:
    """Tell which points [B, Q, heads, levels, points] keep the margin."""
    size = torch.tensor([(w, h) for h, w in shapes])[:, None]
    cells = locations(shapes, reference_points.double(), offsets.double()) * size - 0.5
    return ((cells - cells.round()).abs() >= margin).all(dim=5)


def rounded_once(value, spatial_shapes, reference_points, offsets, logits, *, impl):
    """Run the literal code in float32 and round to the dtype of ``value``: as good as 16 bits can be."""
    tensors = (value, reference_points, offsets, logits)
    if impl == "reference":
        value, reference_points, offsets, logits = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    out = deformable_attention(value, spatial_shapes, reference_points, offsets, logits, impl=impl)
    return out.to(tensors[0].dtype)
