"""Attention within windows of a map, shifted or not, without rolled, padded or partitioned copies of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, loop_vmap, once_differentiable
from .._dispatch.torch_function import one_call
from ..composed import window_attention as composed
from ..reference import window_attention as reference
from ._arguments import autocast, check_alike, check_count, check_number, check_shapes, no_autocast


@one_call
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    window: int,
    *,
    shift: int = 0,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each token attends to the tokens of its window: softmax(``scale`` · q kᵀ + ``bias``) v.

    The windows tile the map from its upper left corner, or with ``shift`` that many rows and columns further down and
    right, where the last ones wrap around: between tokens that are no neighbours, -100 is added to the score. A map
    that is no multiple of the window is filled up below and on the right with tokens that are read like any other.

    Args:
        q: ``[B, H, W, heads, D]``, float32, bfloat16 or float16 (float64 runs composed).
        k: ``[B, H, W, heads, D]``.
        v: ``[B, H, W, heads, D]``.
        bias: ``[heads, window², window²]``, of the relative positions, (query, key), each counted row by row.
        window: height and width of a window; larger than the map, it is filled up.
        shift: at least 0 and below ``window``.
        pad_key: ``[heads, D]``, key of the tokens that fill up: what the layer makes of a row of zeros, its bias; zeros
            by default.
        pad_value: ``[heads, D]``, their value.
        scale: of the products, by default 1 / √D.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``[B, H, W, heads · D]``, in the dtype of ``q``. Differentiable once in all tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: Swin Transformer §3.2 and eq. 4; transformers' ``SwinLayer`` around its linear layers, without dropout.

    Example:
        >>> q, k, v = torch.randn(3, 1, 30, 40, 3, 32)
        >>> window_attention(q, k, v, torch.zeros(3, 49, 49), window=7, shift=3).shape
        torch.Size([1, 30, 40, 96])
    """
    op = "window_attention"
    check_count(op, "window", window)
    if isinstance(shift, bool) or not isinstance(shift, int) or not 0 <= shift < window:
        raise ValueError(f"{op}: shift must be a whole number of at least 0 and below window = {window}, got {shift!r}")
    named = {name: (x, "B H W heads D") for name, x in (("q", q), ("k", k), ("v", v))}
    pads = {n: (x, "heads D") for n, x in (("pad_key", pad_key), ("pad_value", pad_value)) if x is not None}
    check_shapes(op, **named, bias=(bias, "heads window² window²"), **pads)
    if bias.shape[1:] != (window**2, window**2):
        wanted = [q.shape[3], window**2, window**2]
        raise ValueError(f"{op}: bias must be [heads, window², window²] = {wanted}, got {list(bias.shape)}")
    check_alike(op, q=q, k=k, v=v, bias=bias, **{name: x for name, (x, _) in pads.items()})
    scale = max(1, q.shape[4]) ** -0.5 if scale is None else check_number(op, "scale", scale)
    pad_key, pad_value = (
        (k.new_zeros(k.shape[3:]) if x is None else x).expand(k.shape[0], -1, -1) for x in (pad_key, pad_value)
    )
    q, k, v, bias, pad_key, pad_value = autocast(q, k, v, bias, pad_key, pad_value)
    impl = backends.choose(op, impl, q)
    if impl in ("reference", "composed"):
        form = composed.window_attention if impl == "composed" else reference.window_attention
        with no_autocast(q):
            return form(q, k, v, bias, pad_key, pad_value, window, shift, scale)
    return FORWARD[impl](q, k, v, bias, pad_key, pad_value, window, shift, scale)


class WindowAttention(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, q, k, v, bias, pad_key, pad_value, window, shift, scale, impl):
        tensors = (q, k, v, bias, pad_key, pad_value)
        ctx.window, ctx.shift, ctx.scale, ctx.impl = window, shift, scale, impl
        ctx.save_for_backward(*tensors)
        return FORWARD.beneath[impl](*tensors, window, shift, scale)

    @staticmethod
    def backward(ctx, dout):
        need_bias = ctx.needs_input_grad[3]
        settings = (ctx.window, ctx.shift, ctx.scale)
        dq, dk, dv, dbias, *dpads = BACKWARD[ctx.impl](dout, *ctx.saved_tensors, *settings, need_bias)
        return dq, dk, dv, dbias if need_bias else None, *dpads, None, None, None, None


def _fold(op: Callable, batch: int, in_dims: Sequence[int | None], arguments: Sequence) -> tuple:
    """The mapped axis as a larger batch where all of it has one ``bias``, which has no batch."""
    if in_dims[3] is not None:
        return loop_vmap(op, batch, in_dims, arguments)
    q, k, v, bias, *rest = arguments

    def with_bias(q, k, v, *rest):
        return op(q, k, v, bias, *rest)

    return fold_vmap(with_bias, batch, [*in_dims[:3], *in_dims[4:]], [q, k, v, *rest])


FORWARD = Kernels("window_attention", WindowAttention, vmap=_fold)
# Each sample has its own gradient of the bias.
BACKWARD = once_differentiable("window_attention_backward", vmap=loop_vmap)
