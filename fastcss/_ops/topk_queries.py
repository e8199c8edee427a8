"""Query pre-alignment: the tokens nearest to any class's prototype, as queries."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import kernels, loop_vmap, register_vmap
from ..composed import topk_queries as composed
from ..reference import topk_queries as reference
from ._arguments import autocast, check_alike, check_count, check_shapes

FORWARD = kernels("topk_queries")


class TopQueries(NamedTuple):
    """Holds the queries that ``topk_queries`` picks, best first.

    Attributes:
        queries: ``[B, k, D]``, the tokens themselves.
        index: int64 ``[B, k]``, which tokens they are.
        score: ``[B, k]``, the largest logit of each.
    """

    queries: Tensor
    index: Tensor  # type: ignore[assignment]  # hides a tuple's own index()
    score: Tensor


def topk_queries(
    features: Tensor, prototypes: Tensor, k: int, bias: Tensor | None = None, *, impl: str = "auto"
) -> TopQueries:
    """The ``k`` tokens of the largest ``max_c(features · prototypes_c + bias_c)``; the logits are never stored.

    Args:
        features: ``[B, N, D]``, tokens; float32, bfloat16 or float16 (float64 runs composed).
        prototypes: ``[C, D]``, one a class, dtype of ``features``: the weight of the class layer.
        k: tokens to pick, at least 1; all, best first, where there are no more.
        bias: ``[C]``, of the class layer, or None.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``TopQueries(queries [B, k, D], index [B, k], score [B, k])``; equal scores in token order, NaN above all. All
        are detached: SimCIS stops the gradient here.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: SimCIS, query pre-alignment (QPA).

    Example:
        >>> topk_queries(torch.randn(2, 8400, 256), torch.randn(150, 256), k=100).queries.shape
        torch.Size([2, 100, 256])
    """
    op = "topk_queries"
    sizes = check_shapes(op, features=(features, "B N D"), prototypes=(prototypes, "C D"))
    if sizes["C"] == 0:
        raise ValueError(f"{op}: prototypes must have at least one class, got {list(prototypes.shape)}")
    check_alike(op, features=features, prototypes=prototypes)
    if bias is not None:
        check_shapes(op, prototypes=(prototypes, "C D"), bias=(bias, "C"))
        check_alike(op, features=features, bias=bias)
        (bias,) = autocast(bias.detach())
    k = min(check_count(op, "k", k), sizes["N"])
    features, prototypes = autocast(features.detach(), prototypes.detach())
    impl = backends.choose(op, impl, features)
    if impl == "reference":
        return TopQueries(*reference.topk_queries(features, prototypes, bias, k))
    if impl == "composed":
        return TopQueries(*composed.topk_queries(features, prototypes, bias, k))
    return TopQueries(*FORWARD[impl](features, prototypes, bias, k))


register_vmap("topk_queries", loop_vmap)
