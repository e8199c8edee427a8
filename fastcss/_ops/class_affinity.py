"""Class-aware affinity: every pixel attends to the class centres by what alike and unlike pixels show."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, once_differentiable
from ..composed import class_affinity as composed
from ..reference import class_affinity as reference
from ._arguments import autocast, check_alike, check_flag, check_number, check_shapes
from .affinity_attention import affinity_attention


def class_affinity(
    q: Tensor,
    k: Tensor,
    feats: Tensor,
    centers: Tensor,
    *,
    scale: float = 1.0,
    mean: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend to class centres from ``M F`` and ``(1 − M) F``: ``softmax(M F Cᵀ) C``, ``M = sigmoid(scale · Q Kᵀ)``.

    Args:
        q: ``[B, N, K]``, a query for each of N pixels; float32, bfloat16 or float16 (float64 runs composed).
        k: ``[B, N, K]``, a key for each pixel, dtype of ``q``.
        feats: ``[B, N, D]``, the pixels' features, dtype of ``q``.
        centers: ``[B, C, D]``, the class centres, dtype of ``q``; C ≥ 1.
        scale: factor of the products ``q_i · k_j``.
        mean: divide ``M F`` and ``(1 − M) F`` by N, as the author's code does.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``(intra, inter)``, each ``[B, N, D]``: means of the centres, weighted by a softmax over the classes.
        Differentiable once in ``q``, ``k``, ``feats`` and ``centers``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: CAA (thesis chapter 3) eq. 3.2 to 3.7.

    Example:
        >>> q, k = torch.randn(2, 1, 4096, 64)
        >>> intra, inter = class_affinity(q, k, torch.randn(1, 4096, 512), torch.randn(1, 150, 512), mean=True)
    """
    op = "class_affinity"
    sizes = check_shapes(op, q=(q, "B N K"), k=(k, "B N K"), feats=(feats, "B N D"), centers=(centers, "B C D"))
    if sizes["C"] == 0:
        raise ValueError(f"{op}: centers must have at least one class, got {list(centers.shape)}")
    check_alike(op, q=q, k=k, feats=feats, centers=centers)
    scale = check_number(op, "scale", scale)
    check_flag(op, "mean", mean)
    q, k, feats, centers = autocast(q, k, feats, centers)
    impl = backends.choose(op, impl, q)
    if impl == "reference":
        return reference.class_affinity(q, k, feats, centers, scale, mean)
    if impl == "composed":
        return composed.class_affinity(q, k, feats, centers, scale, mean)
    if not composed.centers_first(feats, centers):
        gathered = affinity_attention(q, k, feats, scale=scale, mean=mean, impl=impl)
        intra, inter = (torch.bmm(torch.bmm(x, centers.transpose(1, 2)).softmax(dim=2), centers) for x in gathered)
        return intra, inter
    return FORWARD[impl](q, k, feats, centers, scale, mean, False)[:2]


class ClassAffinity(torch.autograd.Function):
    """The compiled implementations with their gradients, in the order M (F Cᵀ)."""

    @staticmethod
    def forward(ctx, q, k, feats, centers, scale, mean, _, impl):
        intra, inter, tp = FORWARD.beneath[impl](q, k, feats, centers, scale, mean, True)
        ctx.scale, ctx.mean, ctx.impl = scale, mean, impl
        ctx.mark_non_differentiable(tp)
        ctx.save_for_backward(q, k, feats, centers, tp)
        return intra, inter, tp

    @staticmethod
    def backward(ctx, dintra, dinter, _):
        grads = BACKWARD[ctx.impl](dintra, dinter, *ctx.saved_tensors, ctx.scale, ctx.mean)
        return *grads, None, None, None, None


FORWARD = Kernels("class_affinity", ClassAffinity, vmap=fold_vmap)
BACKWARD = once_differentiable("class_affinity_backward", vmap=fold_vmap)
