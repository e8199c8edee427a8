"""Affinity loss: binary cross-entropy of all pairs of pixels, without any N×N map, forward or backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, loop_vmap, once_differentiable
from ..composed import affinity_loss as composed
from ..reference import affinity_loss as reference
from ._arguments import autocast, check_alike, check_count, check_integer, check_labels, check_number, check_shapes

LARGEST_LABEL = 2**31 - 1


def affinity_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    ignore_index: int = 255,
    num_classes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Train an affinity map: ``BCE(sigmoid(scale · q_i · k_j), [label_i == label_j])``, the mean over all pairs.

    Args:
        q: ``[B, N, K]``, a query for each of N pixels; float32, bfloat16 or float16 (float64 runs composed).
        k: ``[B, N, K]``, a key for each pixel, dtype of ``q``.
        labels: integer ``[B, N]``, or ``[B, h, w]`` with h·w = N; the class of each pixel, on the device of ``q``.
        scale: factor of the products ``q_i · k_j``.
        ignore_index: pixels of this label are in no pair; any number of 32 bits.
        num_classes: where given, labels are checked against it (on CPU; on CUDA reading them would stall).
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        A scalar, float32 (float64 for float64 input): the mean over the pairs within each image whose two pixels
        count. Without such a pair it is 0, with gradients 0. Differentiable once in ``q`` and ``k``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        IndexError: a label that is negative or not below ``num_classes``, and not ``ignore_index`` (CPU).
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: CAA (thesis chapter 3) eq. 3.9.

    Example:
        >>> q, k = torch.randn(2, 1, 4096, 64).requires_grad_()
        >>> affinity_loss(q, k, torch.randint(21, (1, 64, 64)), num_classes=21).backward()
    """
    op = "affinity_loss"
    sizes = check_shapes(op, q=(q, "B N K"), k=(k, "B N K"))
    check_alike(op, q=q, k=k)
    scale = check_number(op, "scale", scale)
    check_integer(op, "ignore_index", ignore_index, least=-LARGEST_LABEL - 1, most=LARGEST_LABEL)
    labels = _labels(q, labels, sizes["B"], sizes["N"], ignore_index, num_classes)
    q, k = autocast(q, k)
    impl = backends.choose(op, impl, q)
    if impl == "reference":
        return reference.affinity_loss(q, k, labels, scale, ignore_index)
    if impl == "composed":
        return composed.affinity_loss(q, k, labels, scale, ignore_index)
    return FORWARD[impl](q, k, labels, scale, ignore_index)


class AffinityLoss(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, q, k, labels, scale, ignore_index, impl):
        ctx.scale, ctx.ignore_index, ctx.impl = scale, ignore_index, impl
        ctx.save_for_backward(q, k, labels)
        return FORWARD.beneath[impl](q, k, labels, scale, ignore_index)

    @staticmethod
    def backward(ctx, dloss):
        grads = BACKWARD[ctx.impl](dloss, *ctx.saved_tensors, ctx.scale, ctx.ignore_index)
        return *grads, None, None, None, None


FORWARD = Kernels("affinity_loss", AffinityLoss, vmap=loop_vmap)
BACKWARD = once_differentiable("affinity_loss_backward", vmap=loop_vmap)


def _labels(q: Tensor, labels: Tensor, batch: int, pixels: int, ignore_index: int, num_classes: int | None) -> Tensor:
    """Check the labels and flatten them to int32 [B, N]."""
    most = LARGEST_LABEL + 1
    if num_classes is not None:
        most = min(most, check_count("affinity_loss", "num_classes", num_classes))
    check_labels("affinity_loss", "q", q, labels, ignore_index, most)
    flat = labels.flatten(1) if labels.dim() == 3 else labels
    if flat.shape != (batch, pixels):
        raise ValueError(
            f"affinity_loss: labels must be [B, N] = [{batch}, {pixels}], or [B, h, w] with h·w = {pixels} pixels, "
            f"got {list(labels.shape)}"
        )
    return flat.to(torch.int32)
