"""Masks of several classes as one label map, at the picture's size, without any full-size mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import kernels, loop_vmap, register_vmap
from ..composed import merge_masks as composed
from ..reference import merge_masks as reference
from ._arguments import check_count, check_device, check_flag, check_floating, check_shapes

FORWARD = kernels("merge_masks")
#: SAM's mask decoder gives a quarter of the resolution that its picture was padded to.
UPSCALE = 4


def merge_masks(
    masks: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    *,
    crop: tuple[int, int] | None = None,
    threshold: float = 0.0,
    return_score: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Resize SAM's mask logits as SAM does, threshold them, and give each pixel to its mask of highest confidence.

    The two bilinear steps are SAM's: from ``[h, w]`` to ``[4h, 4w]``, the resolution of the padded picture, of which
    ``crop`` is the picture itself, and from there to ``size``. They run as one, pixel by pixel.

    Args:
        masks: ``[K, h, w]``, low-resolution mask logits of K classes (SAM: 256 × 256); float32, bfloat16 or float16
            (float64 runs composed).
        scores: ``[K]``, floating point, the confidence of each mask.
        size: (H, W) of the label map, the picture as it was.
        crop: (rows, columns), the picture's size within the padded ``[4h, 4w]``; all of it by default.
        threshold: logits above it are mask.
        return_score: return the score of the winning mask, too.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        int64 ``[H, W]``: 0 for background, 1 + k where mask k wins; of equal scores the lower k does, and a NaN score
        is above all. A NaN logit is no mask. With ``return_score`` also ``[H, W]`` in the dtype of ``scores``, 0 in the
        background. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or range, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: DecoupleCSS section 3.4; the post-processing of segment-anything.

    Example:
        >>> merge_masks(torch.randn(20, 256, 256), torch.rand(20), (375, 500), crop=(768, 1024)).shape
        torch.Size([375, 500])
    """
    op = "merge_masks"
    sizes = check_shapes(op, masks=(masks, "K h w"), scores=(scores, "K"))
    for name, tensor in (("masks", masks), ("scores", scores)):
        check_floating(op, name, tensor)
    check_device(op, "masks", masks, "scores", scores)
    if sizes["h"] == 0 or sizes["w"] == 0:
        raise ValueError(f"{op}: masks must have at least one pixel, got {list(masks.shape)}")
    size = _pair(op, "size", size)
    padded = (UPSCALE * sizes["h"], UPSCALE * sizes["w"])
    crop = padded if crop is None else _pair(op, "crop", crop)
    if crop[0] > padded[0] or crop[1] > padded[1]:
        raise ValueError(f"{op}: crop must be within {UPSCALE} times masks, {list(padded)}, got {list(crop)}")
    if not isinstance(threshold, float | int) or math.isnan(threshold):
        raise ValueError(f"{op}: threshold must be a number, got {threshold!r}")
    check_flag(op, "return_score", return_score)
    masks, scores = masks.detach(), scores.detach()
    order = scores.argsort(descending=True, stable=True)
    impl = backends.choose(op, impl, masks)
    if impl in ("reference", "composed"):
        form = reference if impl == "reference" else composed
        labels, score = form.merge_masks(masks, scores, order, size, crop, float(threshold))
    else:
        wide = scores.dtype not in backends.KERNEL_DTYPES
        given = (masks, scores.float() if wide else scores, order)
        labels, score = FORWARD[impl](*given, *size, *crop, float(threshold), return_score and not wide)
        if return_score and wide:
            score = torch.cat([scores.new_zeros(1), scores])[labels]
    return (labels, score) if return_score else labels


register_vmap("merge_masks", loop_vmap)


def _pair(op: str, name: str, value: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, tuple | list | torch.Size) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be (height, width), got {value!r}")
    height, width = (int(check_count(op, f"{name}[{i}]", v)) for i, v in enumerate(value))
    return height, width
