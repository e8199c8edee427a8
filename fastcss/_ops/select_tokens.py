"""The visual tokens of each class: those whose best class it is, above a threshold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, once_differentiable
from ..composed import select_tokens as composed
from ..reference import select_tokens as reference
from ._arguments import check_alike, check_count, check_shapes, no_autocast, widest

#: A class's presence is the mean cosine of all tokens that reach the threshold, or of those that it is best for.
PRESENCES = ("all", "best")


class SelectedTokens(NamedTuple):
    """Holds what ``select_tokens`` finds for each class.

    Attributes:
        tokens: ``[B, C, length]``, the class's tokens in token order, flattened, then zeros.
        counts: int64 ``[B, C]``, how many tokens survived for the class, also those that ``length`` cut off.
        presence: ``[B, C]``, r, the mean cosine of every token whose cosine with the class is at least the threshold,
            whatever that token's best class is, and so perhaps above 0 where ``counts`` is 0; or, with "best", of the
            tokens that survived. 0 where there is none.
    """

    tokens: Tensor
    counts: Tensor
    presence: Tensor


def select_tokens(
    tokens: Tensor, classes: Tensor, *, threshold: float, length: int, presence: str = "all", impl: str = "auto"
) -> SelectedTokens:
    """Give each token to its class of largest cosine, where that is at least ``threshold``, and collect them by class.

    Args:
        tokens: ``[B, N, D]``, visual tokens; float32, bfloat16 or float16 (float64 runs composed).
        classes: ``[B, C, D]``, a text embedding for each class and image, dtype of ``tokens``.
        threshold: τ, a cosine in [-1, 1]; the paper's is 0.3 for VOC, 0.2 for ADE20K.
        length: scalars to return for each class, at least 1: ``length / D`` tokens, the last one perhaps in part.
        presence: of which tokens a class's presence is the mean cosine: "all" that reach ``threshold`` with the class,
            as in the paper; or "best", those whose best class it is: the weaker of two near classes then has none.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``SelectedTokens(tokens [B, C, length], counts [B, C], presence [B, C])``. Equal cosines go to the lower class;
        the cosine with a row of zeros is 0; one that is NaN survives for no class. Nothing is read back from a GPU.
        Differentiable once in ``tokens`` and ``classes``, through ``tokens`` and ``presence``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or range, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: DecoupleCSS eq. 3 and 4, sections 3.3.1 and 3.3.2, eq. A.2.

    Example:
        >>> found = select_tokens(torch.randn(1, 900, 256), torch.randn(1, 20, 256), threshold=0.1, length=512)
        >>> found.tokens.shape
        torch.Size([1, 20, 512])
    """
    op = "select_tokens"
    sizes = check_shapes(op, tokens=(tokens, "B N D"), classes=(classes, "B C D"))
    if sizes["C"] == 0 or sizes["D"] == 0:
        raise ValueError(f"{op}: classes must have at least one class and one channel, got {list(classes.shape)}")
    check_alike(op, tokens=tokens, classes=classes)
    if not isinstance(threshold, float | int):
        raise TypeError(f"{op}: threshold must be a number, got {type(threshold).__name__}")
    if not -1 <= threshold <= 1:
        raise ValueError(f"{op}: threshold must be a cosine in [-1, 1], got {threshold}")
    check_count(op, "length", length)
    if presence not in PRESENCES:
        raise ValueError(f"{op}: presence must be one of {', '.join(PRESENCES)}, got {presence!r}")
    best_only = presence == "best"
    tokens, classes = widest(tokens, classes)
    impl = backends.choose(op, impl, tokens)
    if impl in ("reference", "composed"):
        form = reference if impl == "reference" else composed
        with no_autocast(tokens):
            return SelectedTokens(*form.select_tokens(tokens, classes, threshold, length, best_only))
    return SelectedTokens(*FORWARD[impl](tokens, classes, float(threshold), length, best_only)[:3])


class SelectTokens(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, tokens, classes, threshold, length, best_only, impl):
        selected, counts, presence, *saved = FORWARD.beneath[impl](tokens, classes, threshold, length, best_only)
        ctx.impl = impl
        ctx.mark_non_differentiable(counts, *saved)  # support, best, above
        ctx.save_for_backward(tokens, classes, *saved)
        return selected, counts, presence, *saved

    @staticmethod
    def backward(ctx, dselected, _counts, dpresence, *_):
        return *BACKWARD[ctx.impl](dselected, dpresence, *ctx.saved_tensors), None, None, None, None


FORWARD = Kernels("select_tokens", SelectTokens, vmap=fold_vmap)
BACKWARD = once_differentiable("select_tokens_backward", vmap=fold_vmap)
