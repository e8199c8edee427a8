"""One embedding a class from its phrases, weighted by what the image shows."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, loop_vmap, once_differentiable
from ..composed import phrase_pool as composed
from ..reference import phrase_pool as reference
from ._arguments import check_alike, check_shapes, no_autocast, widest


def phrase_pool(cls: Tensor, phrases: Tensor, *, impl: str = "auto") -> Tensor:
    """Pool each class's phrases for each image: ``Σ_m softmax_m(cos(cls, phrases)) · phrases``.

    Args:
        cls: ``[B, D]``, one embedding an image; float32, bfloat16 or float16 (float64 runs composed).
        phrases: ``[C, M, D]``, M phrases (M + 1 in the paper's count) of each of C classes, dtype of ``cls``.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``[B, C, D]``. The cosine with a row of zeros is 0. Differentiable once in ``cls`` and ``phrases``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: DecoupleCSS eq. 1 and 2.

    Example:
        >>> phrase_pool(torch.randn(2, 256), torch.randn(20, 31, 256)).shape
        torch.Size([2, 20, 256])
    """
    op = "phrase_pool"
    sizes = check_shapes(op, cls=(cls, "B D"), phrases=(phrases, "C M D"))
    if sizes["C"] == 0 or sizes["M"] == 0:
        raise ValueError(f"{op}: phrases must have at least one class and one phrase, got {list(phrases.shape)}")
    check_alike(op, cls=cls, phrases=phrases)
    cls, phrases = widest(cls, phrases)
    impl = backends.choose(op, impl, cls)
    if impl in ("reference", "composed"):
        form = reference if impl == "reference" else composed
        with no_autocast(cls):
            return form.phrase_pool(cls, phrases)
    return FORWARD[impl](cls, phrases)


class PhrasePool(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, cls, phrases, impl):
        ctx.impl = impl
        ctx.save_for_backward(cls, phrases)
        return FORWARD.beneath[impl](cls, phrases)

    @staticmethod
    def backward(ctx, dpooled):
        return *BACKWARD[ctx.impl](dpooled, *ctx.saved_tensors), None


FORWARD = Kernels("phrase_pool", PhrasePool, vmap=loop_vmap)
BACKWARD = once_differentiable("phrase_pool_backward", vmap=loop_vmap)
