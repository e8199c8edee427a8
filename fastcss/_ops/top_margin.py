"""Logit margins: each pixel's true class against its strongest rival, in one read of the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, once_differentiable
from ..composed import top_margin as composed
from ..reference import top_margin as reference
from ._arguments import check_alike, check_integer, check_labels, check_tensor


class TopMargin(NamedTuple):
    """Holds what ``top_margin`` finds for each pixel.

    Attributes:
        margin: logit of the true class minus the best other one; negative where another class wins.
        rival: int64, the class of the best other logit.
        p_true: softmax probability of the true class.
        p_rival: of the rival.
        curvature: ``(p_true + p_rival) − (p_true − p_rival)²``, the loss's second derivative along the margin.
    """

    margin: Tensor
    rival: Tensor
    p_true: Tensor
    p_rival: Tensor
    curvature: Tensor


def top_margin(
    logits: Tensor, labels: Tensor | None = None, *, ignore_index: int = 255, impl: str = "auto"
) -> TopMargin:
    """Margin, rival and their probabilities of every pixel; nothing of the size of ``logits`` is made.

    Args:
        logits: ``[B, C, …]``, usually ``[B, C, H, W]``, with C ≥ 2; float32, bfloat16 or float16 (float64 runs
            composed).
        labels: integer ``[B, …]``, the true class of each pixel; without it the class of the largest logit is taken,
            and the margin is top-1 minus top-2.
        ignore_index: pixels of this label get 0 everywhere and rival -1.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``TopMargin(margin, rival, p_true, p_rival, curvature)``, each ``[B, …]``. Equal logits go to the lower class,
        NaN is above all. Differentiable once in ``logits``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        IndexError: a label that is no class and not ``ignore_index`` (on CPU; on CUDA its pixel is NaN, rival -1).
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: LDKA eq. 2–4.

    Example:
        >>> found = top_margin(torch.randn(1, 150, 64, 64), torch.randint(150, (1, 64, 64)))
        >>> found.margin.shape
        torch.Size([1, 64, 64])
    """
    op = "top_margin"
    check_tensor(op, "logits", logits, "[B, C, …]")
    check_alike(op, logits=logits)
    check_integer(op, "ignore_index", ignore_index)
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(f"{op}: logits must be [B, C, …] with at least two classes, got {list(logits.shape)}")
    pixels = (logits.shape[0], *logits.shape[2:])
    if labels is not None:
        check_labels(op, "logits", logits, labels, ignore_index, logits.shape[1])
        if tuple(labels.shape) != pixels:
            raise ValueError(f"{op}: labels must be [B, …] = {list(pixels)}, got {list(labels.shape)}")
        labels = (labels.flatten(1) if labels.dim() > 1 else labels[:, None]).to(torch.int64)
    flat = logits.flatten(2) if logits.dim() > 2 else logits[:, :, None]
    impl = backends.choose(op, impl, logits)
    if impl in ("reference", "composed"):
        found = (reference if impl == "reference" else composed).top_margin(flat, labels, ignore_index)
    else:
        nothing = torch.empty(0, dtype=torch.int64, device=flat.device)  # new_empty would be mapped by torch.vmap
        found = FORWARD[impl](flat, nothing if labels is None else labels, ignore_index)
    return TopMargin(*(x.view(pixels) for x in found[:5]))


class TopMarginFunction(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index, impl):
        margin, rival, *probabilities, true, p_first = FORWARD.beneath[impl](logits, labels, ignore_index)
        ctx.impl = impl
        ctx.mark_non_differentiable(rival, true, p_first)
        ctx.save_for_backward(logits, true, rival, p_first)
        return margin, rival, *probabilities, true, p_first

    @staticmethod
    def backward(ctx, dmargin, _rival, dp_true, dp_rival, dcurvature, *_):
        dlogits = BACKWARD[ctx.impl](dmargin, dp_true, dp_rival, dcurvature, *ctx.saved_tensors)
        return dlogits, None, None, None


FORWARD = Kernels("top_margin", TopMarginFunction, vmap=fold_vmap)
BACKWARD = once_differentiable("top_margin_backward", vmap=fold_vmap)
