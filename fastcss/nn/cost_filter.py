"""Makes the category filter a module: it keeps the classes whose text fits an image best."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from .._dispatch.backends import IMPLEMENTATIONS
from .._ops._arguments import check_count, check_shapes
from ..ops import FilteredCost, PackedText, cost_filter


class CategoryFilter(nn.Module):
    """Keeps the k classes with the largest cosine anywhere in an image, with their cost maps; has no parameters.

    Args:
        k: how many classes to keep, best first; if there are no more than k, all are kept, still best first. None does
            not filter: it keeps all classes, in class order.
        impl: implementation of the op: "auto", or one of "reference", "composed", "cpu", "triton", "cuda".

    Raises:
        TypeError, ValueError: ``k`` is no integer of at least 1, or ``impl`` is unknown.

    Source: LSMSeg (thesis chapter 5) eq. 5.2–5.6.

    Example:
        >>> filtered = CategoryFilter(32)(torch.randn(2, 512, 24, 24), torch.randn(150, 1, 512))
        >>> filtered.cost.shape, filtered.index.shape
        (torch.Size([2, 32, 1, 24, 24]), torch.Size([2, 32]))
    """

    def __init__(self, k: int | None, *, impl: str = "auto") -> None:
        super().__init__()
        if impl not in ("auto", *IMPLEMENTATIONS):
            raise ValueError(
                f"CategoryFilter: impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}"
            )
        self.k, self.impl = None if k is None else check_count("CategoryFilter", "k", k), impl

    def extra_repr(self) -> str:
        return f"k={self.k}, impl={self.impl!r}"

    def forward(self, image: Tensor, text: Tensor | PackedText) -> FilteredCost:
        """Filter the classes of each image.

        Args:
            image: ``[B, D, H, W]``, the pixels' features in the space of the text; any strides.
            text: ``[T, P, D]``, P prompts of each of T classes for the whole batch, or ``[B, T, P, D]``, in the dtype
                of ``image``; or either from ``ops.pack_text``, which carries no gradient.

        Returns:
            ``FilteredCost(cost [B, k, P, H, W], index [B, k], score [B, k])``; gradients flow to ``image`` and
            ``text`` through ``cost``. ``ops.scatter_cost`` and ``ops.filtered_argmax`` process it further.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
            RuntimeError: the implementation asked for cannot run here; the message says why.
        """
        check_shapes("CategoryFilter", image=(image, "B D H W"))
        k = sys.maxsize if self.k is None else self.k
        filtered = cost_filter(image.permute(0, 2, 3, 1), text, k, impl=self.impl)
        return _in_class_order(filtered) if self.k is None else filtered


def _in_class_order(filtered: FilteredCost) -> FilteredCost:
    index, order = filtered.index.sort(dim=1)
    cost = filtered.cost.take_along_dim(order[:, :, None, None, None], dim=1)
    return FilteredCost(cost, index, filtered.score.gather(1, order))
