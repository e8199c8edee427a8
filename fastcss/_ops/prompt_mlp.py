"""Prompt generators: a two-layer perceptron for each class, of which only those asked for are read."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, loop_vmap, once_differentiable
from .._dispatch.readable_values import readable
from ..composed import prompt_mlp as composed
from ..reference import prompt_mlp as reference
from ._arguments import autocast, check_alike, check_device, check_shapes


def prompt_mlp(
    z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, index: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Run each row through the perceptron of its own class: ``relu(z w1[i] + b1[i]) w2[i] + b2[i]``, i = index of row.

    Args:
        z: ``[R, L]``, one row a prompt to generate; float32, bfloat16 or float16 (float64 runs composed).
        w1: ``[K, L, H]``, the first layers of K classes, dtype of ``z``; no weight is copied, whatever the strides of
            the classes.
        b1: ``[K, H]``.
        w2: ``[K, H, O]``, the second layers; O = 6 × 256 for six prompt tokens of SAM.
        b2: ``[K, O]``.
        index: integer ``[R]``, the class of each row; -1 for none, which gives a row of zeros and reads no weights, so
            that a captured graph can serve a changing number of classes.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``[R, O]``. Differentiable once in all but ``index``; the gradients of the weights are whole tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        IndexError: a class that is below -1 or not below K (on CPU; on CUDA its row is NaN).
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: DecoupleCSS section 3.3.2 (pGen).

    Example:
        >>> w1, b1, w2, b2 = torch.randn(20, 64, 32), torch.randn(20, 32), torch.randn(20, 32, 48), torch.randn(20, 48)
        >>> prompt_mlp(torch.randn(3, 64), w1, b1, w2, b2, torch.tensor([4, 17, 4])).shape
        torch.Size([3, 48])
    """
    op = "prompt_mlp"
    weights = {"w1": (w1, "K L H"), "b1": (b1, "K H"), "w2": (w2, "K H O"), "b2": (b2, "K O")}
    sizes = check_shapes(op, z=(z, "R L"), **weights, index=(index, "R"))
    if sizes["K"] == 0:
        raise ValueError(f"{op}: w1 must have at least one class, got {list(w1.shape)}")
    check_alike(op, z=z, w1=w1, b1=b1, w2=w2, b2=b2)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{op}: index must be a tensor of integers, got {index.dtype}")
    check_device(op, "z", z, "index", index)
    if readable(index) and not (int(index.min()) >= -1 and int(index.max()) < sizes["K"]):
        raise IndexError(
            f"{op}: index must be at least -1 and below K = {sizes['K']}, "
            f"got values from {int(index.min())} to {int(index.max())}"
        )
    z, w1, b1, w2, b2 = autocast(z, w1, b1, w2, b2)
    arguments = (z, w1, b1, w2, b2, index.to(torch.int64))
    impl = backends.choose(op, impl, z)
    if impl == "reference":
        return reference.prompt_mlp(*arguments)
    if impl == "composed":
        return composed.prompt_mlp(*arguments)
    return FORWARD[impl](*arguments)[0]


class PromptMLP(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, z, w1, b1, w2, b2, index, impl):
        y, hidden = FORWARD.beneath[impl](z, w1, b1, w2, b2, index)
        ctx.impl = impl
        ctx.mark_non_differentiable(hidden)
        ctx.save_for_backward(z, w1, w2, index, hidden)
        return y, hidden

    @staticmethod
    def backward(ctx, dy, _):
        need_z, *need_weights = ctx.needs_input_grad[:5]
        dz, *dweights = BACKWARD[ctx.impl](dy, *ctx.saved_tensors, need_z, any(need_weights))
        return (
            dz if need_z else None,
            *(d if n else None for d, n in zip(dweights, need_weights, strict=True)),
            None,
            None,
        )


FORWARD = Kernels("prompt_mlp", PromptMLP, vmap=loop_vmap)
BACKWARD = once_differentiable("prompt_mlp_backward", vmap=loop_vmap)
