"""Affinity attention: features gathered from alike and from unlike pixels, without the N×N affinity map."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, once_differentiable
from ..composed import affinity_attention as composed
from ..reference import affinity_attention as reference
from ._arguments import autocast, check_alike, check_flag, check_number, check_shapes


def affinity_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, mean: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Weigh ``v`` by an affinity map and by its complement: ``M V`` and ``(1 − M) V``, ``M = sigmoid(scale · Q Kᵀ)``.

    Args:
        q: ``[B, N, K]``, a query for each of N pixels; float32, bfloat16 or float16 (float64 runs composed).
        k: ``[B, N, K]``, a key for each pixel, dtype of ``q``.
        v: ``[B, N, D]``, a value for each pixel, dtype of ``q``; D is free of K.
        scale: factor of the products ``q_i · k_j``.
        mean: divide both results by N.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``(intra, inter)``, each ``[B, N, D]``. Differentiable once in ``q``, ``k`` and ``v``. Each element is as exact
        as its rounding allows at the size of ``Σ_j |v_j|``, of which intra and inter are complementary shares.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: CAA (thesis chapter 3) eq. 3.2 and 3.3; the author's code divides both by N.

    Example:
        >>> q, k = torch.randn(2, 1, 4096, 64)
        >>> intra, inter = affinity_attention(q, k, torch.randn(1, 4096, 512), mean=True)
    """
    op = "affinity_attention"
    check_shapes(op, q=(q, "B N K"), k=(k, "B N K"), v=(v, "B N D"))
    check_alike(op, q=q, k=k, v=v)
    scale = check_number(op, "scale", scale)
    check_flag(op, "mean", mean)
    q, k, v = autocast(q, k, v)
    impl = backends.choose(op, impl, q)
    if impl == "reference":
        return reference.affinity_attention(q, k, v, scale, mean)
    if impl == "composed":
        return composed.affinity_attention(q, k, v, scale, mean)
    return FORWARD[impl](q, k, v, scale, mean)


class AffinityAttention(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, q, k, v, scale, mean, impl):
        ctx.scale, ctx.mean, ctx.impl = scale, mean, impl
        ctx.save_for_backward(q, k, v)
        return FORWARD.beneath[impl](q, k, v, scale, mean)

    @staticmethod
    def backward(ctx, dintra, dinter):
        grads = BACKWARD[ctx.impl](dintra, dinter, *ctx.saved_tensors, ctx.scale, ctx.mean)
        return *grads, None, None, None


FORWARD = Kernels("affinity_attention", AffinityAttention, vmap=fold_vmap)
BACKWARD = once_differentiable("affinity_attention_backward", vmap=fold_vmap)
