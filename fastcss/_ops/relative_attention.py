"""Attention with decomposed relative positions, of a whole map or within windows, without its map of bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, loop_vmap, once_differentiable
from .._dispatch.torch_function import one_call
from ..composed import relative_attention as composed
from ..reference import relative_attention as reference
from ._arguments import autocast, check_alike, check_count, check_number, check_shapes, no_autocast


@one_call
def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    window: int | None = None,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each token i attends to the tokens j of its map, or of its window: softmax over j of ``scale`` · qᵢ·kⱼ +
    qᵢ·``rel_h``[hᵢ − hⱼ + Sh − 1] + qᵢ·``rel_w``[wᵢ − wⱼ + Sw − 1], times v.

    (h, w) is a token's place, in row and column, and Sh, Sw are the height and width of the map or of the window. The
    windows tile the map from its upper left corner. A map that is no multiple of the window is filled up below and on
    the right with tokens that are read like any other.

    Args:
        q: ``[B, H, W, heads, D]``, float32, bfloat16 or float16 (float64 runs composed).
        k: ``[B, H, W, heads, D]``.
        v: ``[B, H, W, heads, D]``.
        rel_h: ``[2 Sh − 1, D]``, for each distance in rows, query less key, from 1 − Sh on.
        rel_w: ``[2 Sw − 1, D]``, for each distance in columns.
        window: height and width of a window; larger than the map, it is filled up. By default the whole map is one.
        pad_key: ``[heads, D]``, key of the tokens that fill up: what the layer makes of a row of zeros, its bias; zeros
            by default.
        pad_value: ``[heads, D]``, their value.
        scale: of the products of q and k, by default 1 / √D. Those with the tables are not scaled.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``[B, H, W, heads · D]``, in the dtype of ``q``. Differentiable once in all tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message; tables of
            another size than the map or the window, which the models resize first.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: MViTv2 eq. 4; the image encoder of Segment Anything; transformers' ``SamVisionLayer`` around its linear
        layers, without dropout.

    Example:
        >>> q, k, v = torch.randn(3, 1, 16, 20, 2, 32)
        >>> relative_attention(q, k, v, torch.zeros(31, 32), torch.zeros(39, 32)).shape
        torch.Size([1, 16, 20, 64])
    """
    op = "relative_attention"
    if window is not None:
        check_count(op, "window", window)
    named = {name: (x, "B H W heads D") for name, x in (("q", q), ("k", k), ("v", v))}
    pads = {n: (x, "heads D") for n, x in (("pad_key", pad_key), ("pad_value", pad_value)) if x is not None}
    check_shapes(op, **named, rel_h=(rel_h, "2·Sh−1 D"), rel_w=(rel_w, "2·Sw−1 D"), **pads)
    for name, table, letter, size in (("rel_h", rel_h, "H", q.shape[1]), ("rel_w", rel_w, "W", q.shape[2])):
        rows = max(1, 2 * (size if window is None else window) - 1)  # a map of no tokens has tables of one row
        if table.shape[0] != rows:
            formula = f"2·{letter}−1" if window is None else "2·window−1"
            raise ValueError(
                f"{op}: {name} must be [{formula}, D] = {[rows, q.shape[4]]}, got {list(table.shape)}; "
                "a table of another size must be resized first"
            )
    check_alike(op, q=q, k=k, v=v, rel_h=rel_h, rel_w=rel_w, **{name: x for name, (x, _) in pads.items()})
    scale = max(1, q.shape[4]) ** -0.5 if scale is None else check_number(op, "scale", scale)
    pad_key, pad_value = (
        (k.new_zeros(k.shape[3:]) if x is None else x).expand(k.shape[0], -1, -1) for x in (pad_key, pad_value)
    )
    q, k, v, rel_h, rel_w, pad_key, pad_value = autocast(q, k, v, rel_h, rel_w, pad_key, pad_value)
    impl = backends.choose(op, impl, q)
    arguments = (q, k, v, rel_h, rel_w, pad_key, pad_value, window or 0, scale)
    if impl in ("reference", "composed"):
        form = composed.relative_attention if impl == "composed" else reference.relative_attention
        with no_autocast(q):
            return form(*arguments)
    return FORWARD[impl](*arguments)[0]


class RelativeAttention(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, q, k, v, rel_h, rel_w, pad_key, pad_value, window, scale, impl):
        tensors = (q, k, v, rel_h, rel_w, pad_key, pad_value)
        out, stats = FORWARD.beneath[impl](*tensors, window, scale)
        ctx.window, ctx.scale, ctx.impl = window, scale, impl
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(*tensors, out, stats)
        return out, stats

    @staticmethod
    def backward(ctx, dout, _):
        need_tables = any(ctx.needs_input_grad[3:5])
        grads = BACKWARD[ctx.impl](dout, *ctx.saved_tensors, ctx.window, ctx.scale, need_tables)
        dq, dk, dv, *dtables, dpad_key, dpad_value = grads
        return dq, dk, dv, *(dtables if need_tables else (None, None)), dpad_key, dpad_value, None, None, None


def _fold(first: int) -> Callable:
    """Make the rule of a raw op whose tables, which have no batch, are the arguments ``first`` and ``first`` + 1: the
    mapped axis is a larger batch where all of it has the same tables, and no gradient of them is asked for."""

    def rule(op: Callable, batch: int, in_dims: Sequence[int | None], arguments: Sequence) -> tuple:
        tables = slice(first, first + 2)
        if any(dim is not None for dim in in_dims[tables]) or arguments[-1] is True:
            return loop_vmap(op, batch, in_dims, arguments)

        def with_tables(*others):
            return op(*others[:first], *arguments[tables], *others[first:])

        def others(of: Sequence) -> list:
            return [*of[:first], *of[first + 2 :]]

        return fold_vmap(with_tables, batch, others(in_dims), others(arguments))

    return rule


FORWARD = Kernels("relative_attention", RelativeAttention, vmap=_fold(3))
BACKWARD = once_differentiable("relative_attention_backward", vmap=_fold(4))
