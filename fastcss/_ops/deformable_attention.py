"""Multi-scale deformable attention: each query reads a few points of each level, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, once_differentiable
from .._dispatch.torch_function import one_call
from ..composed import deformable_attention as composed
from ..reference import deformable_attention as reference
from ._arguments import autocast, check_alike, check_device, check_floating, check_shapes, no_autocast


@one_call
def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Softmax, locations, bilinear reads and the weighted sum in one step; no sampled values are stored.

    Args:
        value: ``[B, S, heads, D]``, the tokens of all levels, one level after the other; float32, bfloat16 or float16
            (float64 runs composed).
        spatial_shapes: (height, width) of each level as Python integers, with Σ height · width = S; transformers'
            ``spatial_shapes_list``.
        reference_points: ``[B, Q, levels, 2]``, (x, y) of each query in [0, 1] of each level, or ``[B, Q, levels, 4]``,
            (x, y, width, height) of its box; any floating-point dtype.
        offsets: ``[B, Q, heads, levels, points, 2]``, (x, y) of each point from its reference, in pixels of the level,
            or in halves of the box ÷ points; dtype of ``value``.
        logits: ``[B, Q, heads, levels, points]``, of the attention, whose softmax is over levels and points.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``[B, Q, heads · D]``, in the dtype of ``value``. What lies outside of a level is 0. Differentiable once in all
        tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: Deformable DETR eq. 2 and 3; transformers' ``GroundingDinoMultiscaleDeformableAttention`` between its
    linear layers.

    Example:
        >>> value, points = torch.randn(1, 100 + 25, 8, 32), torch.rand(1, 900, 2, 2)
        >>> offsets, logits = torch.randn(1, 900, 8, 2, 4, 2), torch.randn(1, 900, 8, 2, 4)
        >>> deformable_attention(value, [(10, 10), (5, 5)], points, offsets, logits).shape
        torch.Size([1, 900, 256])
    """
    op = "deformable_attention"
    named = {"value": (value, "B S heads D"), "offsets": (offsets, "B Q heads levels points 2")}
    sizes = check_shapes(op, **named, logits=(logits, "B Q heads levels points"))
    check_shapes(
        op, offsets=(offsets, "B Q heads levels points 2"), reference_points=(reference_points, "B Q levels xy")
    )
    if offsets.shape[5] != 2:
        raise ValueError(f"{op}: offsets must be [B, Q, heads, levels, points, 2], got {list(offsets.shape)}")
    if reference_points.shape[3] not in (2, 4):
        raise ValueError(f"{op}: reference_points must be [B, Q, levels, 2 or 4], got {list(reference_points.shape)}")
    shapes = _shapes(op, spatial_shapes, sizes)
    check_alike(op, value=value, offsets=offsets, logits=logits)
    check_device(op, "value", value, "reference_points", reference_points)
    check_floating(op, "reference_points", reference_points)
    value, offsets, logits = autocast(value, offsets, logits)
    impl = backends.choose(op, impl, value)
    if impl in ("reference", "composed"):
        form = composed if impl == "composed" else reference
        points = reference_points if impl == "composed" else reference_points.to(value.dtype)
        try:
            with no_autocast(value):
                return form.deformable_attention(value, shapes, points, offsets, logits)
        except NotImplementedError as error:  # of a tangent
            raise NotImplementedError(
                f"{op}: torch has a forward-mode derivative of grid_sample from 2.15 on, and this is "
                f"{torch.__version__}; take reverse mode (torch.func.vjp, jacrev)"
            ) from error
    flat = [size for shape in shapes for size in shape]
    return FORWARD[impl](value, flat, reference_points.to(torch.float32), offsets, logits)


class DeformableAttention(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, value, shapes, reference_points, offsets, logits, impl):
        ctx.shapes, ctx.impl = shapes, impl
        ctx.save_for_backward(value, reference_points, offsets, logits)
        return FORWARD.beneath[impl](value, shapes, reference_points, offsets, logits)

    @staticmethod
    def backward(ctx, dout):
        value, reference_points, offsets, logits = ctx.saved_tensors
        need_reference = ctx.needs_input_grad[2]
        grads = BACKWARD[ctx.impl](dout, value, ctx.shapes, reference_points, offsets, logits, need_reference)
        dvalue, dreference, doffsets, dlogits = grads
        return dvalue, None, dreference if need_reference else None, doffsets, dlogits, None


def _fold(op, batch, in_dims, arguments):
    # vmap gives a list's dimensions as a list; here only tensors have one.
    dims = [dim if isinstance(value, Tensor) else None for dim, value in zip(in_dims, arguments, strict=True)]
    return fold_vmap(op, batch, dims, arguments)


FORWARD = Kernels("deformable_attention", DeformableAttention, vmap=_fold)
BACKWARD = once_differentiable("deformable_attention_backward", vmap=_fold)


def _shapes(op: str, spatial_shapes: Sequence[tuple[int, int]], sizes: dict[str, int]) -> list[tuple[int, int]]:
    if isinstance(spatial_shapes, Tensor) or not isinstance(spatial_shapes, Sequence):
        raise TypeError(
            f"{op}: spatial_shapes must be a list of (height, width), got {type(spatial_shapes).__name__}; a tensor on "
            "a GPU would have to be waited for"
        )
    shapes = [tuple(shape) if isinstance(shape, Sequence) else shape for shape in spatial_shapes]
    if len(shapes) != sizes["levels"] or any(not isinstance(shape, tuple) or len(shape) != 2 for shape in shapes):
        raise ValueError(f"{op}: spatial_shapes must be {sizes['levels']} pairs (height, width), got {shapes}")
    if any(not isinstance(size, int | torch.SymInt) or size < 1 for shape in shapes for size in shape):
        raise ValueError(f"{op}: spatial_shapes must be whole numbers of at least 1, got {shapes}")
    if sum(height * width for height, width in shapes) != sizes["S"]:
        total = sum(height * width for height, width in shapes)
        raise ValueError(f"{op}: spatial_shapes must add up to the S = {sizes['S']} tokens of value, got {total}")
    return shapes  # type: ignore[return-value]  # pairs, as was checked
