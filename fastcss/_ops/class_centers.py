"""Class centres: the mean feature of each class, weighted by a coarse segmentation."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, once_differentiable
from ..composed import class_centers as composed
from ..reference import class_centers as reference
from ._arguments import autocast, check_alike, check_shapes


def class_centers(logits: Tensor, feats: Tensor, *, over: str = "pixels", impl: str = "auto") -> Tensor:
    """Average the pixels' features for each class: ``softmax(logits) F``, without the softmaxed map.

    Args:
        logits: ``[B, C, N]``, the coarse segmentation (``.flatten(2)`` of ``[B, C, h, w]``); float32, bfloat16 or
            float16 (float64 runs composed).
        feats: ``[B, N, D]``, the pixels' features, dtype of ``logits``; any strides, so that ``.flatten(2).mT`` of
            ``[B, D, h, w]`` costs no copy.
        over: "pixels", softmax over the N pixels (CAA); "classes", softmax over the C classes, divided by the mass of
            each class (ECAC).
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``[B, C, D]``. Differentiable once in ``logits`` and ``feats``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: CAA (thesis chapter 3) eq. 3.1; ECAC (chapter 4) eq. 4.6, as its code divides it.

    Example:
        >>> class_centers(torch.randn(1, 21, 4096), torch.randn(1, 4096, 512)).shape
        torch.Size([1, 21, 512])
    """
    op = "class_centers"
    if over not in ("pixels", "classes"):
        raise ValueError(f"{op}: over must be 'pixels' or 'classes', got {over!r}")
    sizes = check_shapes(op, logits=(logits, "B C N"), feats=(feats, "B N D"))
    if sizes["C"] == 0 or sizes["N"] == 0:
        raise ValueError(f"{op}: logits must have at least one class and one pixel, got {list(logits.shape)}")
    check_alike(op, logits=logits, feats=feats)
    logits, feats = autocast(logits, feats)
    impl = backends.choose(op, impl, logits)
    if impl == "reference":
        return reference.class_centers(logits, feats, over == "classes")
    if impl == "composed":
        return composed.class_centers(logits, feats, over == "classes")
    return FORWARD[impl](logits, feats, over == "classes")[0].to(feats.dtype)


class ClassCenters(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, logits, feats, over_classes, impl):
        centers, *sums = FORWARD.beneath[impl](logits, feats, over_classes)
        ctx.impl = impl
        ctx.mark_non_differentiable(*sums)
        ctx.save_for_backward(logits, feats, centers, *sums)
        return centers, *sums

    @staticmethod
    def backward(ctx, dcenters, *_):
        return *BACKWARD[ctx.impl](dcenters, *ctx.saved_tensors), None, None


FORWARD = Kernels("class_centers", ClassCenters, vmap=fold_vmap)
BACKWARD = once_differentiable("class_centers_backward", vmap=fold_vmap)
